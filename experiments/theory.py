"""What each method aims at, without any training: from M reference rewards of each prompt alone.

A policy that gives a response exp(score) times the probability it has under the reference, up to a
constant, is a tilt of the reference. All methods here aim at a tilt. What a tilt attains can be
estimated from samples of the reference: by their mean, with exp(score) as weights.

    score                  what the tilt is
    t · win rate of y      the highest win rate of all policies that are as far from the reference
    reward of y / β        the highest reward of all of them; what KL-regularised RL aims at
    (N-1) · log F          what the bound (3) aims at

The weights make some samples count much more than others. The effective sample size, 1 / Σ weight²,
says how many samples of equal weight would be as good. Where it is below 16, nothing is told.
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
    """The expected reward of best-of-n, for every n up to M from the same M rewards, unbiased.

    It is the mean of the best reward over all sets of n of the M responses. With n = 2, rewards
    1, 2, 4 give (2 + 4 + 4) / 3. Raises ValueError for n < 1, n > M, and unusable rewards.
    """
    # only to be told what is wrong with the rewards, if anything is
    vbon._count_less_and_equal(ref_rewards, ref_rewards)
    m = ref_rewards.shape[1]
    _check_n(n, m)
    ordered = ref_rewards.cpu().double().sort(-1).values
    # The j-th lowest reward is the best of C(j-1, n-1) sets; for j < n of none.
    j = torch.arange(n, m + 1).double()
    log_sets = torch.lgamma(j) - torch.lgamma(j - n + 1)        # + what is the same for all j
    weight = log_sets.softmax(0)
    return (ordered[:, n - 1:] * weight).sum(-1)


def winner_weights(rewards: Tensor, n: int) -> Tensor:  # (P, M) -> (P, M)
    """How probable it is that each of M responses is the best of n *different* ones of them.

    A response that shares its reward with others has an equal part in their chance. With n = 2,
    rewards 1, 2, 2 give 0, 1/2, 1/2. Drawn by these weights, a response is distributed as the best
    of n fresh ones, exactly. Drawing with replacement would let a response compete with itself.
    Raises ValueError for n < 1, n > M, and unusable rewards.
    """
    less, equal = vbon._count_less_and_equal(rewards, rewards)
    m = rewards.shape[1]
    _check_n(n, m)
    # the share of all sets of n whose best response has at most, or less than, this reward
    at_most = _share_of_sets(less + equal, n, m)
    below = _share_of_sets(less, n, m)
    return (at_most - below) / equal


def _share_of_sets(count: Tensor, n: int, m: int) -> Tensor:
    """C(count, n) / C(m, n), for counts that need not reach n."""
    enough = count.clamp(min=n)
    log_count = torch.lgamma(enough + 1) - torch.lgamma(enough - n + 1)
    log_all = math.lgamma(m + 1) - math.lgamma(m - n + 1)
    return torch.where(count >= n, (log_count - log_all).exp(), 0.0)


def _check_n(n: int, m: int) -> None:
    if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= m:
        raise ValueError(f"want an integer n from 1 to M = {m}, got {n!r}")

# -------------------------------------------------------------------------------- what tilts attain

def tilt(score: Tensor, ref_rewards: Tensor) -> dict[str, float]:  # (P, M), (P, M)
    """What the tilt of the reference by exp(score) attains, as means over the prompts.

    Returns reward, win_rate, kl_ref in nats, and ess, the effective sample size. A score of 0
    gives the reference itself: win rate 1/2, KL 0, and M effective samples.
    """
    weight = score.cpu().double().softmax(-1)
    return _attained(weight, ref_rewards)


def best_of_n(n: int, ref_rewards: Tensor) -> dict[str, float]:
    """What best-of-n attains, under the same names; win rate and KL are vbon.bon_attains'."""
    found = _attained(bon_weights(n, ref_rewards), ref_rewards)
    # this mean of the reward lets a response compete with itself; the following one does not
    found["reward"] = bon_expected_reward(ref_rewards, n).mean().item()
    return found


def bon_weights(n: int, ref_rewards: Tensor) -> Tensor:  # (P, M) -> (P, M)
    """How often best-of-n returns each of the M responses, if they were all there are."""
    less, equal = vbon._count_less_and_equal(ref_rewards, ref_rewards)
    m = ref_rewards.shape[1]
    return (((less + equal) / m) ** n - (less / m) ** n) / equal


def _attained(weight: Tensor, ref_rewards: Tensor) -> dict[str, float]:
    """Means over responses with these weights (P, M), which add up to 1 for each prompt."""
    rewards = ref_rewards.cpu().double()
    wins = vbon.win_rate(rewards, rewards)
    return {
        "reward": (weight * rewards).sum(-1).mean().item(),
        "win_rate": (weight * wins).sum(-1).mean().item(),
        "kl_ref": _kl(weight),
        "ess": _size(weight),
    }


def _kl(weight: Tensor) -> float:
    """The KL to the reference, which gives each of the M responses 1/M."""
    ratio = weight * weight.shape[1]
    return torch.xlogy(ratio, ratio).mean().item()


def _size(weight: Tensor) -> float:
    """The effective sample size, as a mean over the prompts."""
    return (1 / weight.square().sum(-1)).mean().item()


def strength(kl: float, values: Tensor) -> float:  # (P, M)
    """The t for which the tilt by exp(t · values) has this KL to the reference; inf if none has.

    The KL grows with t. So t is found by bisection, to 12 digits.
    """
    values = _from_the_top(values)
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
    return high


def _kl_of_tilt(t: float, values: Tensor) -> float:
    """The mean KL of the tilt by exp(t · values): t times the mean value, minus log of the mean of
    exp(t · values) under the reference."""
    weight = (t * values).exp()
    total = weight.sum(-1)
    mean = (weight * values).sum(-1) / total
    kl = t * mean - (total / values.shape[1]).log()
    return kl.mean().item()


LARGEST = 2.0 ** 60                     # a t that leaves no chance to all but the best responses


def _from_the_top(values: Tensor) -> Tensor:
    """How far each value is below the best one of its prompt: the same tilt, and no overflow."""
    values = values.cpu().double()
    return values - values.max(-1, keepdim=True).values


def highest(plane: str, kl: float, ref_rewards: Tensor) -> float | None:
    """The highest "win_rate" or "reward" that any policy can have at this KL to the reference.

    Returns None where fewer than 16 effective samples are left: so far out, M rewards do not tell.
    """
    weight = highest_weights(plane, kl, ref_rewards)
    if weight is None:
        return None
    return _attained(weight, ref_rewards)[plane]


def highest_weights(plane: str, kl: float, ref_rewards: Tensor) -> Tensor | None:
    """The policy that is the highest at this KL, as weights (P, M) of the M responses."""
    rewards = ref_rewards.cpu().double()
    values = rewards
    if plane == "win_rate":
        values = vbon.win_rate(rewards, rewards)
    # If no tilt is so far away, then the one that keeps only the best responses is the highest:
    # the rest of the KL brings nothing.
    t = min(strength(kl, values), LARGEST)
    weight = (t * _from_the_top(values)).softmax(-1)
    return weight if _size(weight) >= MIN_SIZE else None


def find_beta(ref_rewards: Tensor, n: int) -> float:  # (P, M)
    """The β of KL-regularised RL whose optimum is as far from the reference as best-of-n.

    Three digits. Raises UnusableInput where there is none, or too few effective samples to tell.
    """
    kl, _ = vbon.bon_attains(ref_rewards, n)
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

# ------------------------------------------------------------------------- what the methods aim at

def aim(method: str, n: int, beta: float | None, ref_rewards: Tensor) -> dict[str, float] | None:
    """What a policy attains that has reached the target of its method; None if M does not tell.

    As `tilt`, and kl_bon, the KL of the target itself to best-of-n.
    """
    log_bon = bon_weights(n, ref_rewards).log()
    if method == "bound":
        score = (n - 1) * vbon.empirical_cdf(ref_rewards, ref_rewards).log()
        found = tilt(score, ref_rewards)
    elif method == "kl-rl":
        score = ref_rewards.cpu().double() / beta
        found = tilt(score, ref_rewards)
    else:
        score = log_bon
        found = best_of_n(n, ref_rewards)
    if found["ess"] < MIN_SIZE:
        return None
    log_weight = score.log_softmax(-1)
    log_ratio = log_weight - log_bon
    return found | {"kl_bon": (log_weight.exp() * log_ratio).sum(-1).mean().item()}


def curves(ref_rewards: Tensor) -> dict[str, list[dict[str, float]]]:
    """Three curves, as lists of what `tilt` returns; each ends with the effective samples.

    "best-of-n": n = 1, 2, 3, ... "win_rate", "reward": the highest one at a KL.
    """
    found = {"best-of-n": [], "win_rate": [], "reward": []}
    n = 1
    while n <= ref_rewards.shape[1]:
        point = best_of_n(n, ref_rewards)
        if point["ess"] < MIN_SIZE:
            break
        found["best-of-n"].append(point)
        # from 6 on, every n would only make the drawing slow
        n = max(n + 1, round(1.2 * n))
    rewards = ref_rewards.cpu().double()
    wins = vbon.win_rate(rewards, rewards)
    for plane, values in (("win_rate", wins), ("reward", rewards)):
        found[plane].append(tilt(0 * values, rewards))
        t = strength(0.001, values)
        for _ in range(100):
            if t > LARGEST:
                break
            point = tilt(t * _from_the_top(values), rewards)
            if point["ess"] < MIN_SIZE:
                break
            found[plane].append(point)
            t = 1.1 * t
    return found
