"""Decoders: ways to get one good response from a model without training it.

    soft best-of-n           one of n responses, with probability ∝ exp(r / β) (arXiv 2505.03156)
    InferenceTimePessimism   the first of n that is accepted (arXiv 2503.21878)
    Speculative Rejection    start many, and drop the worse half on the way (arXiv 2410.20290)
    TreeBoN                  keep the better ones, and let them branch (arXiv 2410.16033)

The first two have a distribution that is known, and so a KL. For the others, all we have is what
they return, and what it costs.
"""
import math

import torch
from torch import Tensor

import vbon
from experiments import theory
from experiments.methods import take
from model import GPT
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
    """Return the row of soft best-of-n, and the rewards (P', G) of what it has chosen.

    It chooses from the same groups of n candidates as best-of-n.
    """
    candidates = world.candidates
    generator = seeded_generator("cpu", "soft best", n, beta, seed)
    groups = in_groups(candidates.reward, n)
    chosen = numbers_of(soft_best_of_n(groups, beta, generator), len(candidates.reward), n)
    reward = candidates.reward.gather(1, chosen)
    # the rivals are other samples than those that were chosen from
    own = soft_bon_logprob(candidates.logprob.gather(1, chosen), reward, world.held_out.reward, n,
                           beta)
    return decoded_row("soft-bon", world, n, chosen, own), reward


def pessimism_row(world: World, n: int, beta: float, seed: int) -> tuple[dict, Tensor]:
    """Return the row of InferenceTimePessimism on the win rate, and the rewards of its choices.

    Of each group of n + 1 candidates, the last one is taken if none of the n is accepted.
    """
    candidates = world.candidates
    refs = world.held_out.reward
    ref_wins = vbon.win_rate(refs, refs)
    ref_chance = pessimism_chance(ref_wins, ref_wins, beta)
    chance = pessimism_chance(vbon.win_rate(candidates.reward, refs), ref_wins, beta)
    generator = seeded_generator("cpu", "pessimism", n, beta, seed)
    first = pessimism_choice(in_groups(chance, n + 1), generator)
    chosen = numbers_of(first, len(chance), n + 1)
    own = pessimism_logprob(candidates.logprob.gather(1, chosen), chance.gather(1, chosen),
                            ref_chance, n)
    row = decoded_row("pessimism", world, n, chosen, own)
    # on average; the first that is accepted ends it
    row["samples_per_answer"] = round((first + 1).double().mean().item(), 1)
    return row, candidates.reward.gather(1, chosen)


def in_groups(values: Tensor, size: int) -> Tensor:  # (P, M) -> (P·G, size)
    """Return the values in groups of `size`; those that are left over are left out."""
    P, M = values.shape
    G = M // size
    return values[:, :G * size].reshape(P * G, size)


def numbers_of(chosen: Tensor, P: int, size: int) -> Tensor:  # (P·G,) -> (P, G)
    """Return the number, among all M, of the one that is chosen in each group."""
    chosen = chosen.view(P, -1)
    return chosen + size * torch.arange(chosen.shape[1])


def count_tokens(response: Tensor, eot: int) -> Tensor:  # (..., L) -> (...)
    """Return the number of tokens that are sampled for each response, its end-of-text included."""
    return ((response != eot).sum(-1) + 1).clamp(max=response.shape[-1])


def cut_after(response: Tensor, tokens: int, eot: int) -> Tensor:
    """Return the first tokens of the responses (P, K, L), padded with end-of-text."""
    cut = response.clone()
    cut[..., tokens:] = eot
    return cut


def speculative_rejection(prompt: Tensor, response: Tensor, reward_fn, cuts: list[int], eot: int
                          ) -> tuple[Tensor, Tensor]:
    """Start with all N responses (P, N, L); after each number of tokens keep the better half.

    Better: by the reward of the unfinished text. Returns the index of the best one at the end, and
    the number of tokens that were sampled, both (P,).
    """
    P, N, L = response.shape
    alive = torch.arange(N).expand(P, N)
    length = count_tokens(response, eot).cpu()
    sampled = torch.zeros(P).double()
    start = 0
    for cut in [*cuts, L]:
        # what those that are alive add between the last cut and this one
        tokens = length.gather(1, alive).clamp(max=cut) - start
        sampled += tokens.clamp(min=0).sum(1)
        seen = cut_after(take(response, alive), cut, eot)
        reward = reward_fn(prompt, seen).cpu().double()
        keep = max(1, alive.shape[1] // 2) if cut < L else 1
        alive = alive.gather(1, reward.topk(keep).indices)
        start = cut
    return alive[:, 0], sampled


@torch.no_grad()
def tree_bon(model: GPT, prompt: Tensor, reward_fn, roots: int, children: int, cuts: list[int],
             length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Start with some roots; after each number of tokens keep the best 1/children, and branch.

    prompt (P, T). The paper scores unfinished texts by a model of their preference; here it is the
    reward of the unfinished text. Returns the best response (P, L), and the tokens sampled (P,).
    """
    P = len(prompt)
    eot = model.eot
    kept = torch.full((P, roots, 0), eot, device=prompt.device)
    sampled = torch.zeros(P).double()
    branches = 1
    for cut, end in zip([0, *cuts], [*cuts, length]):
        # continue each kept beginning several times, as if it were a part of the prompt
        beginning = kept[..., :cut]
        width = beginning.shape[1]
        full = torch.cat([prompt[:, None].expand(-1, width, -1), beginning], -1)
        more, _ = model.sample(full.reshape(P * width, -1), branches, end - cut, generator)
        more = more.view(P, width, branches, end - cut)
        beginning = beginning[:, :, None].expand(-1, -1, branches, -1)
        # one that has ended stays as it is
        ended = (beginning == eot).any(-1, keepdim=True)
        more = more.masked_fill(ended, eot)
        cost = count_tokens(more, eot).masked_fill(ended[..., 0], 0)
        sampled += cost.sum((1, 2)).cpu()
        grown = torch.cat([beginning, more], -1).flatten(1, 2)     # (P, width·branches, end)
        padded = torch.nn.functional.pad(grown, (0, length - end), value=eot)
        reward = reward_fn(prompt, padded).cpu().double()
        keep = max(1, grown.shape[1] // children) if end < length else 1
        kept = take(padded, reward.topk(keep).indices)
        branches = children
    return kept[:, 0], sampled
