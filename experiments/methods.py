"""Other methods beside vBoN: other targets, or other losses. train.fine_tune trains them all.

README.md has a table of what they aim at. Each gradient function below takes the place of
train.vbon_gradient: it adds the gradient of its loss to the policy's .grad, and returns means that
are worth watching. β is chosen such that the aim is as far from the reference as best-of-N (see
theory.py). own_method.py takes a method from a file of yours.
"""
import functools
from collections.abc import Callable

import torch
from torch import Tensor

import vbon
from experiments import theory
from model import GPT, prompts_at_a_time
from support.statistics import share_of_sets
from train import TUNING, Batch, Method, vbon_gradient, watch

METHODS = ("vbon", "bound", "kl-rl", "infalign-ctrl", "wind", "max-at-k", "max-at-k-win",
           "infalign", "bon-sft", "bond", "bonbon")
FROM_WINNERS = ("bon-sft", "bond", "bonbon")            # these need n different cached responses
FROM_SETS = ("max-at-k", "max-at-k-win", "infalign")    # these need n own responses to a prompt
ALPHA = 0.005                           # the share of the likelihood in BoNBoN's loss
CODE = (*TUNING, "experiments.methods", *theory.CODE)   # computes a policy; for `keep`


def choose_method(name: str, n: int, beta: float | None) -> Method:
    """Return one of METHODS; β belongs to those in theory.WITH_BETA."""
    losses = {"vbon": vbon_gradient, "bon-sft": bon_sft_gradient, "bond": bond_gradient,
              "bonbon": bonbon_gradient}
    targets = {"bound": bound_target, "wind": wind_target}
    if name in losses:
        gradient = losses[name]
    elif name in FROM_SETS:
        gradient = functools.partial(max_at_k_gradient, name=name, beta=beta)
    else:
        target = targets.get(name, functools.partial(value_target, name=name))
        gradient = functools.partial(target_gradient, target=target, beta=beta)
    names = ("vbon", n) if name == "vbon" else (name, beta, n)
    label = f"{name} n={n}" if beta is None else f"{name} beta={beta:g}"
    return Method(label, names, gradient)


def grow_beta(beta: float, step: int, steps: int) -> float:
    """Return the β of this update: 1/β grows from 0 over the first 40 %, as N does for vBoN."""
    share = min(1.0, (step + 1) / (0.4 * steps))
    return beta / share


def roll_out(policy: GPT, reference: GPT, reward_fn, batch: Batch, k: int,
             generator: torch.Generator) -> tuple[vbon.Rollout, int]:
    """Do steps (a) and (b) of an update, with k responses to each prompt of a batch; also return
    the number of prompts to score at a time."""
    length = batch.ref_response.shape[2]
    part = prompts_at_a_time(policy, k, length)
    rollout = vbon.roll_out(policy, reference, reward_fn, batch.prompt, k, length, generator, part)
    return rollout, part


def descend(policy: GPT, prompt: Tensor, response: Tensor, loss: Callable) -> Tensor:
    """Add the gradient of a loss to .grad, some prompts at a time, as vbon.reinforce does.

    loss takes log π_θ(y) (part, K) and the rows of these prompts, and returns a mean over them.
    Returns log π_θ(y) (P, K), without gradients.
    """
    part = prompts_at_a_time(policy, *response.shape[1:])
    found = []
    for first in range(0, len(prompt), part):
        rows = slice(first, first + part)
        logprob = policy.logprob(prompt[rows], response[rows]).cpu().double()
        share = len(logprob) / len(prompt)
        (share * loss(logprob, rows)).backward()
        found.append(logprob.detach())
    return torch.cat(found)


def target_gradient(policy: GPT, reference: GPT, reward_fn, batch: Batch, n: int,
                    settings, generator: torch.Generator, target: Callable,
                    beta: float | None) -> dict[str, float]:
    """train.vbon_gradient with another log target; returns win_rate and kl_ref."""
    n = vbon.grow(n, batch.step, settings.steps)
    if beta is not None:
        beta = grow_beta(beta, batch.step, settings.steps)
    rollout, part = roll_out(policy, reference, reward_fn, batch, settings.k, generator)
    # (c): the target may be known up to a factor, which the baseline subtracts
    log_target = target(rollout, batch.ref_rewards, n, beta)
    logprob = vbon.reinforce(policy, batch.prompt, rollout.response, log_target, part)
    return watch(batch, rollout, logprob)


def bound_target(rollout: vbon.Rollout, ref_rewards: Tensor, n: int, beta: None) -> Tensor:
    """The bound (3): only the term i = 1 of equation (2)."""
    log_cdf = vbon.empirical_cdf(rollout.reward, ref_rewards).log()
    return vbon.bon_logprob_bound(rollout.ref_logprob, log_cdf, n)


def value_target(rollout: vbon.Rollout, ref_rewards: Tensor, n: int, beta: float, name: str
                 ) -> Tensor:
    """KL-regularised RL (arXiv 1909.08593), as a reverse KL to π_ref · exp(value / β).

    The value is the reward itself, or InfAlign-CTRL's exp(10 · win rate) (arXiv 2412.19792).
    """
    values = theory.method_values(name, n, rollout.reward, ref_rewards)
    return rollout.ref_logprob + values / beta


def wind_target(rollout: vbon.Rollout, ref_rewards: Tensor, n: int, beta: float) -> Tensor:
    """WIND (arXiv 2410.20727): the value of y is how often it beats the policy's other responses.

    Each comparison also enters the baseline of the other response, with the opposite sign, so it
    counts K/(K-1) times. To divide by K instead of K - 1 corrects this.
    """
    k = rollout.reward.shape[1]
    # a response ties with itself, which counts half
    wins = vbon.win_rate(rollout.reward, rollout.reward) * k - 0.5
    return rollout.ref_logprob + wins / (k * beta)


def max_at_k_gradient(policy: GPT, reference: GPT, reward_fn, batch: Batch, n: int, settings,
                      generator: torch.Generator, name: str, beta: float) -> dict[str, float]:
    """E[the best value of n own responses] / β - KL(π_θ || π_ref): PKPO (arXiv 2505.15201).

    The value is the reward, the win rate, or F^n: the last one is InfAlign's objective (arXiv
    2412.19792), the win rate of best-of-n of the policy over best-of-n of the reference.
    """
    beta = grow_beta(beta, batch.step, settings.steps)
    rollout, _ = roll_out(policy, reference, reward_fn, batch, settings.k, generator)
    values = theory.method_values(name, n, rollout.reward, batch.ref_rewards)
    weights = max_at_k_weights(values, n)

    def loss(logprob: Tensor, rows: slice) -> Tensor:
        kl = vbon.reverse_kl_loss(logprob, rollout.ref_logprob[rows])
        # a sum over the K responses; no baseline, since the weights compare with the others already
        gain = (weights[rows] * logprob).sum(-1).mean()
        return kl - gain / beta

    return watch(batch, rollout, descend(policy, batch.prompt, rollout.response, loss))


def max_at_k_weights(values: Tensor, k: int) -> Tensor:  # (P, K) -> (P, K)
    """Return w, with which Σ w_i ∇log π_θ(y_i) is an unbiased gradient of E[best value of k].

    w_i is what y_i adds to the best value of a set of k responses, summed over all sets that it is
    in, divided by C(K, k): PKPO with the leave-one-out baseline. Values 1, 2, 4 with k = 2 give
    0, (2-1)/3, (4-1 + 4-2)/3. Raises ValueError unless 1 <= k <= K.
    """
    K = values.shape[1]
    if not 1 <= k <= K:
        raise ValueError(f"want k from 1 to K = {K}, got {k}")
    if k == 1:
        # nothing to compare with: keep the leave-one-out baseline of (6)
        return (values - vbon.leave_one_out(values)) / K
    ordered, order = values.sort(-1)
    # y_i is in C(j, k-2) sets in which the j-th response (from 0) is the best of the others
    j = torch.arange(K).double()
    ratio = k * (k - 1) / ((K - k + 2) * (K - k + 1))   # C(K, k-2) / C(K, k)
    sets = share_of_sets(j, k - 2, K) * ratio
    count = sets.cumsum(0) - sets
    best = (sets * ordered).cumsum(-1) - sets * ordered
    return torch.zeros_like(ordered).scatter(-1, order, count * ordered - best)


def bon_sft_gradient(policy: GPT, reference: GPT, reward_fn, batch: Batch, n: int,
                     settings, generator: torch.Generator) -> dict[str, float]:
    """Maximum likelihood on winners: the forward KL(π_bon || π_θ), up to a constant.

    It has no score that could be huge, so it aims for the full n from the first update. It needs
    neither reward nor reference. Returns nll, the loss in nats per response.
    """
    winners = sample_winners(batch, n, settings.k, generator)
    return {"nll": follow_likelihood(policy, batch.prompt, winners)}


def bond_gradient(policy: GPT, reference: GPT, reward_fn, batch: Batch, n: int,
                  settings, generator: torch.Generator) -> dict[str, float]:
    """BOND's Jeffreys loss with N fixed (arXiv 2407.14622): the forward KL of bon-sft plus the
    reverse KL of vBoN.

    Of the k responses to a prompt, half are winners and half are the policy's own. Returns nll of
    the winners, and win_rate and kl_ref of the policy's own responses.
    """
    n = vbon.grow(n, batch.step, settings.steps)
    # the forward KL
    winners = sample_winners(batch, n, settings.k // 2, generator)
    nll = follow_likelihood(policy, batch.prompt, winners)
    # the reverse KL
    own = settings.k - settings.k // 2
    rollout, part = roll_out(policy, reference, reward_fn, batch, own, generator)
    log_target = vbon.bon_target(rollout.ref_logprob, rollout.reward, batch.ref_rewards, n)
    logprob = vbon.reinforce(policy, batch.prompt, rollout.response, log_target, part)
    return {"nll": nll} | watch(batch, rollout, logprob)


def bonbon_gradient(policy: GPT, reference: GPT, reward_fn, batch: Batch, n: int,
                    settings, generator: torch.Generator) -> dict[str, float]:
    """BoNBoN (arXiv 2406.00832): from the best and the worst of the same n cached responses.

    With h = log π_θ - log π_ref, the loss is -α log π_θ(best) + (1-α) (h(best) - h(worst) - c)².
    For best-of-n, h(best) - h(worst) has the mean c; it is not c for each pair, and so the optimum
    is not π_bon. Returns margin, the mean of h(best) - h(worst).
    """
    response = torch.cat(sample_pairs(batch, n, settings.k // 2, generator), 1)
    part = prompts_at_a_time(policy, *response.shape[1:])
    with torch.no_grad():
        ref_logprob = [reference.logprob(x, y) for x, y in
                       zip(batch.prompt.split(part), response.split(part))]
    ref_logprob = torch.cat(ref_logprob).cpu().double()
    c = (n - 1) * sum(1 / k for k in range(1, n))

    def loss(logprob: Tensor, rows: slice) -> Tensor:
        log_best, _ = logprob.chunk(2, 1)
        h_best, h_worst = (logprob - ref_logprob[rows]).chunk(2, 1)
        return (-ALPHA * log_best + (1 - ALPHA) * (h_best - h_worst - c) ** 2).mean()

    logprob = descend(policy, batch.prompt, response, loss)
    h_best, h_worst = (logprob - ref_logprob).chunk(2, 1)
    return {"margin": (h_best - h_worst).mean().item()}


def follow_likelihood(policy: GPT, prompt: Tensor, response: Tensor) -> float:
    """Add the gradient of the negative log-likelihood of responses (P, K, L) to .grad; return it in
    nats per response."""
    logprob = descend(policy, prompt, response, lambda logprob, rows: -logprob.mean())
    return -logprob.mean().item()


def sample_winners(batch: Batch, n: int, k: int, generator: torch.Generator) -> Tensor:
    """Return k responses to each prompt (P, k, L), each the best of n different cached ones."""
    weight = theory.winner_weights(batch.ref_rewards, n).float().to(generator.device)
    best = torch.multinomial(weight, k, replacement=True, generator=generator)
    return take(batch.ref_response, best)


def sample_pairs(batch: Batch, n: int, k: int, generator: torch.Generator
                 ) -> tuple[Tensor, Tensor]:
    """Return k pairs (P, k, L): the best and the worst of the same n different cached responses.
    Ties are broken at random, since they are in random order."""
    P, M = batch.ref_rewards.shape
    order = torch.rand(P, k, M, generator=generator, device=generator.device).argsort(-1)
    chosen = order[..., :n].cpu()
    rewards = batch.ref_rewards.cpu().double()[:, None].expand(P, k, M).gather(-1, chosen)
    best = chosen.gather(-1, rewards.argmax(-1, keepdim=True))[..., 0]
    # the first of the worst in the opposite order: independent of which one is the best
    flipped = chosen.flip(-1)
    worst = flipped.gather(-1, rewards.flip(-1).argmin(-1, keepdim=True))[..., 0]
    return take(batch.ref_response, best), take(batch.ref_response, worst)


def take(response: Tensor, chosen: Tensor) -> Tensor:
    """Return the responses (P, k, L) with these numbers (P, k) among (P, M, L)."""
    chosen = chosen.to(response.device)
    rows = torch.arange(len(chosen), device=response.device)[:, None]
    return response[rows, chosen]
