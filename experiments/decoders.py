"""Decoders: ways to get one good response from a model without training it.

    soft best-of-n           one of n responses, with probability ∝ exp(r / β) (arXiv 2505.03156)
    InferenceTimePessimism   the first of n that is accepted (arXiv 2503.21878)

Both have a distribution that is known, and so a KL.
"""
import math

import torch
from torch import Tensor

import vbon
from experiments import theory
from support.sampling import seeded_generator
from train import World, decoded_row


def soft_best_of_n(reward: Tensor, beta: float, generator: torch.Generator) -> Tensor:
    """Return the index of one of N responses, with probability ∝ exp(r / β). (P, N) -> (P,)"""
    chance = (reward.cpu().double() / beta).softmax(-1)
    return torch.multinomial(chance, 1, generator=generator)[:, 0]


def soft_bon_logprob(ref_logprob: Tensor, reward: Tensor, ref_rewards: Tensor, n: int, beta: float
                     ) -> Tensor:  # (P, K), (P, K), (P, M) -> (P, K)
    """Return the log-probability of y under soft best-of-n: π_ref(y) · n · P(y wins).

    Against n - 1 rivals, y wins with probability e^(r/β) / (e^(r/β) + Σ e^(rival/β)). This is
    averaged over groups of n - 1 of the M reference rewards, each used once. Needs M >= n - 1.
    """
    ref_logprob = ref_logprob.cpu().double()
    if n == 1:
        return ref_logprob
    P, M = ref_rewards.shape
    groups = M // (n - 1)
    rivals = ref_rewards.cpu().double()[:, :groups * (n - 1)] / beta
    rivals = rivals.view(P, 1, groups, n - 1).logsumexp(-1)                 # (P, 1, groups)
    own = reward.cpu().double()[:, :, None] / beta                          # (P, K, 1)
    log_win = torch.nn.functional.logsigmoid(own - rivals)                  # (P, K, groups)
    return ref_logprob + math.log(n) + log_win.logsumexp(-1) - math.log(groups)


def pessimism_chance(values: Tensor, ref_values: Tensor, beta: float) -> Tensor:
    """Return the probability with which a response is accepted: (P, K), (P, M) -> (P, K).

    The target is π_ref times relu(value - λ) / β. So this is rejection sampling, where the largest
    factor is that of the best of the M cached responses.
    """
    threshold = theory.pessimism_threshold(ref_values, beta)
    largest = ref_values.max(-1, keepdim=True).values - threshold
    return ((values - threshold) / largest).clamp(0, 1)


def pessimism_choice(chance: Tensor, generator: torch.Generator) -> Tensor:  # (P, n + 1) -> (P,)
    """Return the index of the first of n responses that is accepted; of the last one if none is."""
    accepted = torch.rand(chance.shape, generator=generator).double() < chance
    accepted[:, -1] = True
    return accepted.double().argmax(-1)


def pessimism_logprob(ref_logprob: Tensor, chance: Tensor, ref_chance: Tensor, n: int) -> Tensor:
    """Return the log-probability of y: accepted as one of n, or taken as the last one.

    π_ref · (a (1 - (1-q)^n) / q + (1-q)^n), where a is y's own chance, and q that of a reference
    response. ref_logprob (P, K), chance (P, K), ref_chance (P, M) -> (P, K).
    """
    q = ref_chance.mean(-1, keepdim=True)
    rejected = (1 - q) ** n
    return ref_logprob.cpu().double() + (chance * (1 - rejected) / q + rejected).log()


def soft_best_of_n_row(world: World, n: int, beta: float, seed: int) -> tuple[dict, Tensor]:
    """Return the row of soft best-of-n, and the candidates (P', G) that it has chosen.

    It chooses from the same groups of n candidates as best-of-n.
    """
    candidates = world.candidates
    generator = seeded_generator("cpu", "soft best", n, beta, seed)
    groups = in_groups(candidates.reward, n)
    chosen = numbers_of(soft_best_of_n(groups, beta, generator), len(candidates.reward), n)
    # the rivals are other samples than those that were chosen from
    ref_logprob = candidates.logprob.gather(1, chosen)
    reward = candidates.reward.gather(1, chosen)
    own = soft_bon_logprob(ref_logprob, reward, world.held_out.reward, n, beta)
    return decoded_row("soft-bon", world, n, chosen, own), chosen


def pessimism_row(world: World, n: int, beta: float, seed: int) -> tuple[dict, Tensor]:
    """Return the row of InferenceTimePessimism on the win rate, and the candidates (P', G) that it
    has chosen, from groups of n + 1."""
    candidates = world.candidates
    refs = world.held_out.reward
    ref_wins = vbon.win_rate(refs, refs)
    ref_chance = pessimism_chance(ref_wins, ref_wins, beta)
    chance = pessimism_chance(vbon.win_rate(candidates.reward, refs), ref_wins, beta)
    generator = seeded_generator("cpu", "pessimism", n, beta, seed)
    first = pessimism_choice(in_groups(chance, n + 1), generator)
    chosen = numbers_of(first, len(chance), n + 1)
    ref_logprob = candidates.logprob.gather(1, chosen)
    own = pessimism_logprob(ref_logprob, chance.gather(1, chosen), ref_chance, n)
    row = decoded_row("pessimism", world, n, chosen, own)
    # on average; the first that is accepted ends it
    row["samples_per_answer"] = round((first + 1).double().mean().item(), 1)
    return row, chosen


def in_groups(values: Tensor, size: int) -> Tensor:  # (P, M) -> (P·G, size)
    """Return the values in groups of `size`; those that are left over are left out."""
    P, M = values.shape
    G = M // size
    return values[:, :G * size].reshape(P * G, size)


def numbers_of(chosen: Tensor, P: int, size: int) -> Tensor:  # (P·G,) -> (P, G)
    """Return the number, among all M, of the one that is chosen in each group."""
    chosen = chosen.view(P, -1)
    return chosen + size * torch.arange(chosen.shape[1])
