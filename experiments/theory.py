"""The aim of each method, computed without training, from M reference rewards of each prompt.

A policy π ∝ π_ref · exp(score) is a tilt of the reference. All methods here aim at a tilt. Its win
rate and KL are estimated from samples of the reference, with exp(score) as weights.

    score                  the tilt
    t · win rate of y      has the highest win rate of all policies with its KL to the reference
    reward of y / β        has the highest reward of these; the aim of KL-regularised RL
    (N-1) · log F          the aim of the bound (3)
    Φ(y) / β               the aims of max@k, InfAlign and WIND, where Φ depends on π: fixed points

The effective sample size, 1 / Σ weight², is the number of equally weighted samples with the same
error. Below 16 no estimate is shown.
"""
import math
from collections.abc import Callable

import torch
from torch import Tensor

import vbon
from support.files import UnusableInput
from support.statistics import share_of_sets

MIN_SIZE = 16                           # effective samples below which no estimate is shown
CODE = ("experiments.theory", "support.statistics", "vbon")     # computes the aims; for `keep`


def bon_theory(n: int) -> tuple[float, float]:
    """Return what best-of-n attains with a continuous reward: KL to the reference, and win rate.

    log n - (n-1)/n nats, and n/(n+1). Raises ValueError for an n that is no integer >= 1.
    """
    if type(n) is not int or n < 1:
        raise ValueError(f"want an integer n >= 1, got {n!r}")
    return math.log(n) - (n - 1) / n, n / (n + 1)


def cdf_interval(reward: Tensor, ref_rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Return F_lt and F_le, each (P, K), if y is counted as one more reference response.

    (P, K), (P, M): #less / (M+1), and (#less + #equal + 1) / (M+1), an estimate beside (7). The
    reward 2 among 1, 2, 2, 3 has 1/5 and 4/5.
    """
    less, equal = vbon.count_less_and_equal(reward, ref_rewards)
    m = ref_rewards.shape[1]
    return less / (m + 1), (less + equal + 1) / (m + 1)


def winner_weights(rewards: Tensor, n: int) -> Tensor:  # (P, M) -> (P, M)
    """Return the probability that each of M responses is the best of n *different* ones of them.

    Rewards 1, 2, 2 with n = 2 give 0, 1/2, 1/2. A response sampled with these weights is
    distributed exactly as the best of n new ones; with replacement, it would compete with itself.
    Raises ValueError for n < 1, n > M, and unusable rewards.
    """
    less, equal = vbon.count_less_and_equal(rewards, rewards)
    m = rewards.shape[1]
    if type(n) is not int or not 1 <= n <= m:
        raise ValueError(f"want an integer n from 1 to M = {m}, got {n!r}")
    # the share of sets of n whose best response has at most, or less than, this reward
    at_most = share_of_sets(less + equal, n, m)
    below = share_of_sets(less, n, m)
    return (at_most - below) / equal


def bon_expected_reward(ref_rewards: Tensor, n: int) -> Tensor:  # (P, M) -> (P,)
    """Return the expected reward of best-of-n, unbiased: the mean over all sets of n of the M.

    Rewards 1, 2, 4 with n = 2 give (2 + 4 + 4) / 3. Raises ValueError as `winner_weights`.
    """
    return (winner_weights(ref_rewards, n) * ref_rewards.cpu().double()).sum(-1)


def bon_weights(n: int, ref_rewards: Tensor) -> Tensor:  # (P, M) -> (P, M)
    """Return π_bon, if the M responses, equally probable, were all there are."""
    less, equal = vbon.count_less_and_equal(ref_rewards, ref_rewards)
    m = ref_rewards.shape[1]
    return (((less + equal) / m) ** n - (less / m) ** n) / equal


def attained(weight: Tensor, ref_rewards: Tensor) -> dict[str, float]:
    """Return what a policy attains that has the weights (P, M), which sum to 1 for each prompt.

    These are win_rate, kl_ref in nats, and ess, the effective sample size, as means over prompts.
    """
    wins = vbon.win_rate(ref_rewards, ref_rewards)
    return {
        "win_rate": (weight * wins).sum(-1).mean().item(),
        "kl_ref": kl_to_reference(weight),
        "ess": (1 / weight.square().sum(-1)).mean().item(),
    }


def kl_to_reference(weight: Tensor) -> float:  # (P, M)
    """Return the KL to the reference, which has the weight 1/M for each of the M responses."""
    ratio = weight * weight.shape[1]
    return torch.xlogy(ratio, ratio).mean().item()


def highest_win_rate(kl: float, ref_rewards: Tensor) -> float | None:
    """Return the highest win rate of all policies with this KL to the reference.

    None if fewer than 16 effective samples are left: M rewards are too few that far away.
    """
    beta = bisect_beta(kl, ref_rewards, 1, "highest")
    found = attained(aim_weights("highest", 1, beta, ref_rewards), ref_rewards)
    return found["win_rate"] if found["ess"] >= MIN_SIZE else None


def decoded_win_rate(reward: Tensor, ref_rewards: Tensor, n: int) -> Tensor | None:
    """Return how often the best of n responses of a policy beats the best of n of the reference.

    (P, K), (P, M) -> (P,). Unbiased: a mean over all sets of different responses on both sides; a
    tie counts half. None if there are fewer responses.
    """
    if n > ref_rewards.shape[1] or n > reward.shape[1]:
        return None
    return (winner_weights(reward, n) * wins_over_best(reward, ref_rewards, n)).sum(-1)


def wins_over_best(reward: Tensor, ref_rewards: Tensor, n: int) -> Tensor:
    """Return how often y beats the best of n reference responses: (P, K), (P, M) -> (P, K).

    An unbiased estimate of F^n: the share of sets of n whose rewards are all lower, ties half.
    """
    less, equal = vbon.count_less_and_equal(reward, ref_rewards)
    m = ref_rewards.shape[1]
    return (share_of_sets(less, n, m) + share_of_sets(less + equal, n, m)) / 2


def decoded_win_rate_of(weight: Tensor, ref_rewards: Tensor, n: int) -> float:
    """Return the same for known weights (P, M) of the M responses, as a mean over prompts."""
    below, at_most = cdf(weight, ref_rewards)
    # the probability of being the best of n: (4), as a sum of products
    total = torch.zeros_like(weight)
    for j in range(n):
        total += at_most ** (n - 1 - j) * below ** j
    return (weight * total * power_of_cdf(ref_rewards, n)).sum(-1).mean().item()


def power_of_cdf(rewards: Tensor, n: int) -> Tensor:  # (P, M) -> (P, M)
    """Return F^n, ties averaged, if the M responses are all there are."""
    less, equal = vbon.count_less_and_equal(rewards, rewards)
    m = rewards.shape[1]
    return ((less / m) ** n + ((less + equal) / m) ** n) / 2


def cdf(weight: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probabilities (P, M) of a lower value, and of one that is lower or equal."""
    values = values.contiguous()
    ordered, order = values.sort(-1)
    cumulative = weight.gather(-1, order).cumsum(-1)
    cumulative = torch.nn.functional.pad(cumulative, (1, 0))
    first = torch.searchsorted(ordered, values)
    last = torch.searchsorted(ordered, values, right=True)
    return cumulative.gather(-1, first), cumulative.gather(-1, last)


AT_BON = ("vbon", "bon-sft", "bond")
FIXED_POINTS = ("max-at-k", "max-at-k-win", "infalign", "wind")
WITH_BETA = ("kl-rl", "infalign-ctrl", *FIXED_POINTS, "pessimism")
TILTS = ("kl-rl", "infalign-ctrl", "highest")           # by exp(value / β), in one step


def find_aim(method: str, n: int, ref_rewards: Tensor, beta: float | None = None) -> dict:
    """Return β (None for a method without it) and what the method aims at, as `describe_aim`; a
    stage for `keep`.

    BoNBoN's aim is unknown. A β that is not given is found. Raises UnusableInput as `find_beta`.
    """
    if beta is None and method in WITH_BETA:
        beta = find_beta(ref_rewards, n, method)
    if method == "bonbon":
        return {"beta": beta}
    return {"beta": beta} | describe_aim(aim_weights(method, n, beta, ref_rewards), ref_rewards, n)


def describe_aim(weight: Tensor, ref_rewards: Tensor, n: int) -> dict[str, float]:
    """Return what a policy attains that has the weights (P, M), beside best-of-n.

    win_rate, kl_ref and ess, as `attained`; kl_bon, the KL to best-of-n; below_win_rate, how far it
    is below the highest win rate at its KL; decoded_win_rate, if decoded by best-of-n. None of them
    if there are too few effective samples.
    """
    found = attained(weight, ref_rewards)
    highest = highest_win_rate(found["kl_ref"], ref_rewards)
    if found["ess"] < MIN_SIZE or highest is None:
        return {}
    bon = bon_weights(n, ref_rewards)
    kl_bon = (torch.xlogy(weight, weight) - torch.xlogy(weight, bon)).sum(-1)
    found["kl_bon"] = kl_bon.mean().item()
    found["below_win_rate"] = highest - found["win_rate"]
    found["decoded_win_rate"] = decoded_win_rate_of(weight, ref_rewards, n)
    return found


def find_beta(ref_rewards: Tensor, n: int, method: str) -> float:  # (P, M)
    """Return the β, to three digits, whose aim is as far from the reference as best-of-n.

    Raises UnusableInput if there is none, or if too few effective samples are left.
    """
    kl = kl_to_reference(bon_weights(n, ref_rewards))
    beta = float(f"{bisect_beta(kl, ref_rewards, n, method):.3g}")
    found = attained(aim_weights(method, n, beta, ref_rewards), ref_rewards)
    if kl <= 0 or found["kl_ref"] < 0.95 * kl:
        raise UnusableInput(f"{method} at n = {n}: with this reward, no beta takes it as far as "
                            f"best of {n}; want another n or reward, or leave it out of --method")
    if found["ess"] < MIN_SIZE:
        raise UnusableInput(f"{method} at n = {n}: as far away as best of {n}, the "
                            f"{ref_rewards.shape[1]} held-out samples of a prompt are worth only "
                            f"{found['ess']:.0f}, want {MIN_SIZE}; give a larger --m-eval")
    return beta


def bisect_beta(kl: float, ref_rewards: Tensor, n: int, method: str) -> float:
    """Return the β for which an aim has this KL to the reference: the KL falls as β grows.

    If no β takes it that far, it returns a β so small that only the best responses are left.
    """
    values = method_values(method, n, ref_rewards, ref_rewards)
    # in units of the values' own spread: rewards may be of size 1e20 or 1e-20
    spread = (values.max(-1).values - values.min(-1).values).max().item() or 1.0
    # the others take long, and do not converge for extreme β
    reach, precision = (40, 1e-10) if method in TILTS else (7, 1e-3)
    low = math.log(spread) - reach
    high = math.log(spread) + reach
    while high - low > precision:
        middle = (low + high) / 2
        if kl_to_reference(aim_weights(method, n, math.exp(middle), ref_rewards)) > kl:
            low = middle
        else:
            high = middle
    return math.exp(middle)


def aim_weights(method: str, n: int, beta: float | None, ref_rewards: Tensor) -> Tensor:
    """Return the target of a method, if the M responses, equally probable, are all there are."""
    rewards = ref_rewards.cpu().double()
    if method in AT_BON:
        return bon_weights(n, rewards)
    if method == "bound":
        return ((n - 1) * vbon.empirical_cdf(rewards, rewards).log()).softmax(-1)
    values = method_values(method, n, rewards, rewards)
    if method == "infalign":
        # here the M responses are all there are, so F is known
        values = power_of_cdf(rewards, n)
    if method == "pessimism":
        weight = (values - pessimism_threshold(values, beta)).clamp(min=0)
        return weight / weight.sum(-1, keepdim=True)
    if method == "wind":
        return fixed_point(lambda weight: sum(cdf(weight, values)) / 2, beta, values)
    if method in FIXED_POINTS:
        return fixed_point(lambda weight: expected_best(weight, values, n), beta, values)
    # the largest value of each prompt becomes 0: the same tilt, without overflow
    return ((values - values.max(-1, keepdim=True).values) / beta).softmax(-1)


def method_values(method: str, n: int, reward: Tensor, ref_rewards: Tensor) -> Tensor:
    """Return what a method makes of a reward: its value of each response, (P, K)."""
    if method in ("kl-rl", "max-at-k"):
        return reward.cpu().double()
    if method == "infalign":
        return wins_over_best(reward, ref_rewards, n)
    wins = vbon.win_rate(reward, ref_rewards)
    if method == "infalign-ctrl":
        return (10 * wins).exp()
    return wins


def fixed_point(phi: Callable, beta: float, values: Tensor) -> Tensor:
    """Return the weights (P, M) that are ∝ exp(phi(weights) / β).

    The plain iteration oscillates, so each step goes only a part of the way, in logs.
    """
    log_weight = torch.zeros_like(values).log_softmax(-1)
    part = 0.25
    before = math.inf
    for _ in range(2000):
        wanted = (phi(log_weight.exp()) / beta).log_softmax(-1)
        change = (wanted - log_weight).abs().max().item()
        if change < 1e-8:
            break
        if change > before:
            part = part / 2
        before = change
        log_weight = (log_weight + part * (wanted - log_weight)).log_softmax(-1)
    return log_weight.exp()


def expected_best(weight: Tensor, values: Tensor, k: int) -> Tensor:  # (P, M)
    """Return Φ(y) = k · E[the best value of y and of k - 1 others], sampled with these weights."""
    ordered, order = values.sort(-1)
    at_most = weight.gather(-1, order).cumsum(-1).clamp(max=1)
    below = torch.nn.functional.pad(at_most, (1, 0))[:, :-1]
    chance = at_most ** (k - 1) - below ** (k - 1)      # that this one is the best of k - 1
    mass = chance * ordered
    above = mass.flip(-1).cumsum(-1).flip(-1) - mass    # Σ over the better ones
    best = ordered * at_most ** (k - 1) + above
    return k * torch.zeros_like(values).scatter(-1, order, best)


def pessimism_threshold(values: Tensor, beta: float) -> Tensor:  # (P, M) -> (P, 1)
    """Return λ, for which relu((value - λ) / β) has the mean 1 over the M responses."""
    ordered = values.cpu().double().sort(-1, descending=True).values
    count = torch.arange(1, values.shape[1] + 1).double()
    # λ if the `count` best responses are above it; it is the largest count for which they are
    threshold = (ordered.cumsum(-1) - beta * values.shape[1]) / count
    above = (ordered > threshold).sum(-1, keepdim=True)
    return threshold.gather(-1, above - 1)
