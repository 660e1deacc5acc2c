"""The aim of each method, computed without training, from M reference rewards of each prompt.

A policy π ∝ π_ref · exp(score) is a tilt of the reference. All methods here aim at a tilt. Its
reward, win rate and KL are estimated from samples of the reference, with exp(score) as weights.

    score                  the tilt
    t · win rate of y      has the highest win rate of all policies with its KL to the reference
    reward of y / β        has the highest reward of these; the aim of KL-regularised RL
    (N-1) · log F          the aim of the bound (3)

Some weights are much larger than others. The effective sample size, 1 / Σ weight², is the number of
equally weighted samples with the same error. Below 16 no estimate is shown.
"""
import math

import torch
from torch import Tensor

import vbon
from support import code
from support.errors import UnusableInput

code.read_source(__file__)

MIN_SIZE = 16                           # effective samples below which no estimate is shown

# -------------------------------------------------------------- best-of-n, from M rewards a prompt

def bon_theory(n: int) -> tuple[float, float]:
    """Return KL(π_bon || π_ref) in nats and win rate of best-of-n, if the reward is continuous.

    n = 4 gives log 4 - 3/4 = 0.636 and 4/5.
    """
    vbon._check_n(n)
    kl = math.log(n) - (n - 1) / n
    return kl, n / (n + 1)


def cdf_interval(reward: Tensor, ref_rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Another estimate of F_lt and F_le, each (P, K): y counts as one of M + 1 responses.

    Reward 2 against 1, 2, 2, 3 gives 1/5 and 4/5. Over y ~ π_ref, π_bon/π_ref then has mean 1. It
    serves to be compared with (7); training does not use it.
    """
    less, equal = vbon._count_less_and_equal(reward, ref_rewards)
    total = ref_rewards.shape[1] + 1
    return less / total, (less + equal + 1) / total


def bon_expected_reward(ref_rewards: Tensor, n: int) -> Tensor:  # (P, M) -> (P,)
    """Return the expected reward of best-of-n, unbiased, for any n up to M.

    It is the mean of the best reward over all sets of n of the M responses. With n = 2, rewards
    1, 2, 4 give (2 + 4 + 4) / 3. Raises ValueError for n < 1, n > M, and unusable rewards.
    """
    # called only for its checks of the rewards
    vbon._count_less_and_equal(ref_rewards, ref_rewards)
    m = ref_rewards.shape[1]
    _check_n(n, m)
    ordered = ref_rewards.cpu().double().sort(-1).values
    # The j-th lowest reward is the best of C(j-1, n-1) sets, for j < n of none.
    j = torch.arange(n, m + 1).double()
    log_sets = torch.lgamma(j) - torch.lgamma(j - n + 1)        # up to a constant
    weight = log_sets.softmax(0)
    return (ordered[:, n - 1:] * weight).sum(-1)


def winner_weights(rewards: Tensor, n: int) -> Tensor:  # (P, M) -> (P, M)
    """Return the probability that each of M responses is the best of n *different* ones of them.

    Responses with the same reward share their probability equally. With n = 2, rewards 1, 2, 2 give
    0, 1/2, 1/2. A response sampled with these weights is distributed exactly as the best of n new
    ones. Sampling with replacement would let a response compete with itself. Raises ValueError for
    n < 1, n > M, and unusable rewards.
    """
    less, equal = vbon._count_less_and_equal(rewards, rewards)
    m = rewards.shape[1]
    _check_n(n, m)
    # the share of sets of n whose best response has at most, or less than, this reward
    at_most = vbon._share_of_sets(less + equal, n, m)
    below = vbon._share_of_sets(less, n, m)
    return (at_most - below) / equal


def _check_n(n: int, m: int) -> None:
    if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= m:
        raise ValueError(f"want an integer n from 1 to M = {m}, got {n!r}")

# -------------------------------------------------------------------------------- what tilts attain

def tilt(score: Tensor, ref_rewards: Tensor) -> dict[str, float]:  # (P, M), (P, M)
    """Return what the tilt of the reference by exp(score) attains, as means over the prompts.

    That is reward, win_rate, kl_ref in nats, and ess, the effective sample size. A score of 0 gives
    the reference itself: win rate 1/2, KL 0, and M effective samples.
    """
    weight = score.cpu().double().softmax(-1)
    return _attained(weight, ref_rewards)


def best_of_n(n: int, ref_rewards: Tensor) -> dict[str, float]:
    """Return what best-of-n attains, under the same names; the win rate is vbon.bon_attains'."""
    found = _attained(bon_weights(n, ref_rewards), ref_rewards)
    _, found["win_rate"] = vbon.bon_attains(ref_rewards, n)
    # in this mean a response competes with itself; in the following one it does not
    found["reward"] = bon_expected_reward(ref_rewards, n).mean().item()
    return found


def bon_weights(n: int, ref_rewards: Tensor) -> Tensor:  # (P, M) -> (P, M)
    """Return how often best-of-n returns each of the M responses, if there were no others."""
    less, equal = vbon._count_less_and_equal(ref_rewards, ref_rewards)
    m = ref_rewards.shape[1]
    return (((less + equal) / m) ** n - (less / m) ** n) / equal


def _attained(weight: Tensor, ref_rewards: Tensor) -> dict[str, float]:
    """Return means over responses with the weights (P, M), which sum to 1 for each prompt."""
    rewards = ref_rewards.cpu().double()
    wins = vbon.win_rate(rewards, rewards)
    return {
        "reward": (weight * rewards).sum(-1).mean().item(),
        "win_rate": (weight * wins).sum(-1).mean().item(),
        "kl_ref": _kl(weight),
        "ess": _size(weight),
    }


def _kl(weight: Tensor) -> float:
    """Return the KL to the reference, which has the weight 1/M for each of the M responses."""
    ratio = weight * weight.shape[1]
    return torch.xlogy(ratio, ratio).mean().item()


def _size(weight: Tensor) -> float:
    """Return the effective sample size, as a mean over the prompts."""
    return (1 / weight.square().sum(-1)).mean().item()


def strength(kl: float, values: Tensor) -> float:  # (P, M)
    """Return the t for which the tilt by exp(t · values) has this KL to the reference, or inf.

    The KL grows with t, so t is found by bisection, to 12 digits.
    """
    values = _from_the_top(values)
    # in units of the values' own spread: rewards may be of size 1e20 or 1e-20
    spread = _spread(values)
    values = values / spread
    low = 0.0
    high = 1.0
    while _kl_of_tilt(high, values) < kl:
        low = high
        high = 2 * high
        if high > LARGEST:
            return math.inf
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if _kl_of_tilt(middle, values) < kl:
            low = middle
        else:
            high = middle
        if high < 1 / LARGEST:
            return 0.0
    return high / spread


def _kl_of_tilt(t: float, values: Tensor) -> float:
    """Return the KL of the tilt by exp(t · values), as a mean over the prompts.

    It is t times the mean value, minus the log of the mean of exp(t · values) under the reference.
    """
    weight = (t * values).exp()
    total = weight.sum(-1)
    mean = (weight * values).sum(-1) / total
    kl = t * mean - (total / values.shape[1]).log()
    return kl.mean().item()


LARGEST = 2.0 ** 60                     # · spread: only the best responses have a probability


def _spread(values: Tensor) -> float:
    """Return the largest distance of a value from the best one of its prompt; 1 if there is none."""
    return _from_the_top(values).abs().max().item() or 1.0


def _from_the_top(values: Tensor) -> Tensor:
    """Subtract the largest value of each prompt: the tilt is the same, without overflow."""
    values = values.cpu().double()
    return values - values.max(-1, keepdim=True).values


def highest(plane: str, kl: float, ref_rewards: Tensor) -> float | None:
    """Return the highest "win_rate" or "reward" of all policies with this KL to the reference.

    None if fewer than 16 effective samples are left: M rewards are too few that far away.
    """
    weight = highest_weights(plane, kl, ref_rewards)
    if weight is None:
        return None
    return _attained(weight, ref_rewards)[plane]


def highest_weights(plane: str, kl: float, ref_rewards: Tensor) -> Tensor | None:
    """Return the policy that is the highest at this KL, as weights (P, M) of the M responses."""
    rewards = ref_rewards.cpu().double()
    values = rewards
    if plane == "win_rate":
        values = vbon.win_rate(rewards, rewards)
    # If no tilt is that far away, the tilt that keeps only the best responses is the highest: the
    # rest of the KL brings nothing.
    t = min(strength(kl, values), LARGEST / _spread(values))
    weight = (t * _from_the_top(values)).softmax(-1)
    return weight if _size(weight) >= MIN_SIZE else None


def find_beta(ref_rewards: Tensor, n: int) -> float:  # (P, M)
    """Return the β, to three digits, for which the optimum of KL-regularised RL has the KL to the
    reference of best-of-n.

    Raises UnusableInput if there is none, or if too few effective samples are left.
    """
    kl = best_of_n(n, ref_rewards)["kl_ref"]
    t = strength(kl, ref_rewards)
    if kl <= 0 or t == math.inf:
        raise UnusableInput(f"--n {n}: with this reward, no beta goes as far as best of {n}; give "
                            f"--beta")
    size = tilt(t * _from_the_top(ref_rewards), ref_rewards)["ess"]
    if size < MIN_SIZE:
        raise UnusableInput(f"--n {n}: beta cannot be found, since the {ref_rewards.shape[1]} "
                            f"samples of a prompt are worth only {size:.0f} at this distance, want "
                            f"{MIN_SIZE}; give --beta")
    return float(f"{1 / t:.3g}")

# ---------------------------------------------------------------------------- aims of the methods

def aim(method: str, n: int, beta: float | None, ref_rewards: Tensor) -> dict[str, float] | None:
    """Return what a policy attains that has reached the target of its method.

    As `tilt`, and kl_bon, the KL of the target itself to best-of-n. None if fewer than 16 effective
    samples are left.
    """
    log_bon = bon_weights(n, ref_rewards).log()
    if method == "bound":
        score = (n - 1) * vbon.empirical_cdf(ref_rewards, ref_rewards).log()
        found = tilt(score, ref_rewards)
    elif method == "kl-rl":
        score = ref_rewards.cpu().double() / beta
        found = tilt(score, ref_rewards)
    elif method in ("vbon", "bon-sft", "bond"):
        score = log_bon
        found = best_of_n(n, ref_rewards)
    else:
        raise ValueError(f"the aim of {method} is unknown")
    if found["ess"] < MIN_SIZE:
        return None
    log_weight = score.log_softmax(-1)
    log_ratio = log_weight - log_bon
    return found | {"kl_bon": (log_weight.exp() * log_ratio).sum(-1).mean().item()}


def curves(ref_rewards: Tensor) -> dict[str, list[dict[str, float]]]:
    """Return three curves, as lists of results of `tilt`.

    "best-of-n": n = 1, 2, 3, ... "win_rate", "reward": the highest one at each KL. Each curve ends
    where fewer than 16 effective samples are left.
    """
    found = {"best-of-n": [], "win_rate": [], "reward": []}
    n = 1
    while n <= ref_rewards.shape[1]:
        point = best_of_n(n, ref_rewards)
        if point["ess"] < MIN_SIZE:
            break
        found["best-of-n"].append(point)
        # from 6 on not every n: it would only make plotting slow
        n = max(n + 1, round(1.2 * n))
    rewards = ref_rewards.cpu().double()
    wins = vbon.win_rate(rewards, rewards)
    for plane, values in (("win_rate", wins), ("reward", rewards)):
        found[plane].append(tilt(0 * values, rewards))
        t = strength(0.001, values)
        for _ in range(100):
            if t > LARGEST / _spread(values):
                break
            point = tilt(t * _from_the_top(values), rewards)
            if point["ess"] < MIN_SIZE:
                break
            found[plane].append(point)
            t = 1.1 * t
    return found
