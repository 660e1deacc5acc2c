"""The aim of each method, computed without training, from M reference rewards of each prompt.

A policy π ∝ π_ref · exp(score) is a tilt of the reference. All methods here aim at a tilt. Its
reward, win rate and KL are estimated from samples of the reference, with exp(score) as weights.

    score                  the tilt
    t · win rate of y      has the highest win rate of all policies with its KL to the reference
    reward of y / β        has the highest reward of these; the aim of KL-regularised RL
    (N-1) · log F          the aim of the bound (3)
    Φ(y) / β               the aims of max@k, InfAlign and WIND, where Φ depends on π: fixed points

Some weights are much larger than others. The effective sample size, 1 / Σ weight², is the number of
equally weighted samples with the same error. Below 16 no estimate is shown.
"""
import math

import torch
from torch import Tensor

import vbon
from support import code
from support.files import UnusableInput

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
    """Return π_bon, if the M responses, equally probable, were all there are."""
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


LARGEST = 2.0 ** 60                     # of t · spread: beyond, only the best responses are left


def _spread(values: Tensor) -> float:
    """Return the largest distance of a value from the best one of its prompt; 1 for equal ones."""
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


def find_beta(ref_rewards: Tensor, n: int, method: str = "kl-rl") -> float:  # (P, M)
    """Return the β, to three digits, for which the aim of a method has the KL to the reference of
    best-of-n.

    Raises UnusableInput if there is none, or if too few effective samples are left.
    """
    kl = best_of_n(n, ref_rewards)["kl_ref"]
    instead = "give --beta" if method == "kl-rl" else f"leave out {method}"
    if method in ("kl-rl", "infalign-ctrl"):
        t = strength(kl, method_values(method, n, ref_rewards, ref_rewards))
        beta = 1 / t if t > 0 else math.inf
    else:
        beta = _bisect_beta(kl, ref_rewards, n, method)
    if kl <= 0 or not 0 < beta < math.inf:
        raise UnusableInput(f"--n {n}: with this reward, no beta of {method} goes as far as "
                            f"best of {n}; {instead}")
    size = _size(aim_weights(method, n, beta, ref_rewards))
    if size < MIN_SIZE:
        raise UnusableInput(f"--n {n}: beta cannot be found, since the {ref_rewards.shape[1]} "
                            f"samples of a prompt are worth only {size:.0f} at this distance, want "
                            f"{MIN_SIZE}; {instead}")
    return float(f"{beta:.3g}")


def _bisect_beta(kl: float, ref_rewards: Tensor, n: int, method: str) -> float:
    """Return the β of an aim with this KL, or inf: the KL falls as β grows."""
    spread = _spread(method_values(method, n, ref_rewards, ref_rewards))
    low = math.log(spread) - 7
    high = math.log(spread) + 7
    if _kl(aim_weights(method, n, math.exp(low), ref_rewards)) < kl:
        return math.inf
    while high - low > 1e-3:
        middle = (low + high) / 2
        if _kl(aim_weights(method, n, math.exp(middle), ref_rewards)) > kl:
            low = middle
        else:
            high = middle
    return math.exp(middle)

# ------------------------------------------------------------------- who wins if it is decoded by N

def decoded_win_rate(reward: Tensor, ref_rewards: Tensor, n: int, own_n: int | None = None
                     ) -> Tensor | None:
    """Return how often the best of n responses of a policy beats the best of n of the reference.

    reward (P, K) of the policy's responses, ref_rewards (P, M) -> (P,). Unbiased: a mean over all
    sets of different responses on both sides; a tie counts half. own_n: the number of responses of
    the policy, if it is not n. None if there are fewer responses.
    """
    own_n = own_n or n
    if n > ref_rewards.shape[1] or own_n > reward.shape[1]:
        return None
    return (winner_weights(reward, own_n) * wins_over_best(reward, ref_rewards, n)).sum(-1)


def wins_over_best(reward: Tensor, ref_rewards: Tensor, n: int) -> Tensor:
    """Return how often y beats the best of n reference responses: (P, K), (P, M) -> (P, K).

    An unbiased estimate of F^n: the share of sets of n whose rewards are all lower; a tie counts
    half.
    """
    less, equal = vbon._count_less_and_equal(reward, ref_rewards)
    m = ref_rewards.shape[1]
    return (vbon._share_of_sets(less, n, m) + vbon._share_of_sets(less + equal, n, m)) / 2


def decoded_win_rate_of(weight: Tensor, ref_rewards: Tensor, n: int, worst: bool = False
                        ) -> float:  # (P, M), (P, M)
    """Return the same for a policy with known weights of the M responses, as a mean over prompts.

    worst: both sides return the worst of n instead.
    """
    rewards = ref_rewards.cpu().double()
    if worst:
        return 1 - decoded_win_rate_of(weight, -rewards, n)
    below, at_most = _cdf(weight, rewards)
    # the probability of being the best of n: (4), in sums of products
    j = vbon._numbers(0, n - 1, weight)
    chance = weight * (at_most ** (n - 1 - j) * below ** j).sum(0)
    return (chance * _power_of_cdf(rewards, n)).sum(-1).mean().item()


def _power_of_cdf(rewards: Tensor, n: int) -> Tensor:  # (P, M) -> (P, M)
    """Return F^n, ties averaged, if the M responses are all there are."""
    less, equal = vbon._count_less_and_equal(rewards, rewards)
    m = rewards.shape[1]
    return ((less / m) ** n + ((less + equal) / m) ** n) / 2


def _cdf(weight: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probabilities (P, M) of a lower value, and of one that is lower or equal."""
    values = values.contiguous()
    ordered, order = values.sort(-1)
    cumulative = weight.gather(-1, order).cumsum(-1)
    cumulative = torch.nn.functional.pad(cumulative, (1, 0))
    first = torch.searchsorted(ordered, values)
    last = torch.searchsorted(ordered, values, right=True)
    return cumulative.gather(-1, first), cumulative.gather(-1, last)

# ---------------------------------------------------------------------------- aims of the methods

AT_BON = ("vbon", "bon-sft", "bond")
FIXED_POINTS = ("max-at-k", "max-at-k-win", "infalign", "wind")
WITH_BETA = ("kl-rl", "infalign-ctrl", *FIXED_POINTS, "pessimism")
KNOWN = (*AT_BON, "bound", "bonbon", *WITH_BETA)


def aim(method: str, n: int, beta: float | None, ref_rewards: Tensor) -> dict[str, float] | None:
    """Return what a policy attains that has reached the target of its method.

    As `tilt`; kl_bon, the KL of the target itself to best-of-n; and decoded_win_rate and
    worst_win_rate, what it wins if it is decoded by best-of-n or worst-of-n. None if fewer than 16
    effective samples are left.
    """
    weight = aim_weights(method, n, beta, ref_rewards)
    found = _attained(weight, ref_rewards)
    if found["ess"] < MIN_SIZE:
        return None
    if method in AT_BON:
        found = best_of_n(n, ref_rewards)
    kl_bon = torch.xlogy(weight, weight) - torch.xlogy(weight, bon_weights(n, ref_rewards))
    return found | {"kl_bon": kl_bon.sum(-1).mean().item(),
                    "decoded_win_rate": decoded_win_rate_of(weight, ref_rewards, n),
                    "worst_win_rate": decoded_win_rate_of(weight, ref_rewards, n, worst=True)}


def aim_weights(method: str, n: int, beta: float | None, ref_rewards: Tensor) -> Tensor:
    """Return the target of a method, as weights (P, M) of the M responses.

    Exact if these are all responses there are, with equal probabilities.
    """
    rewards = ref_rewards.cpu().double()
    if method in AT_BON:
        return bon_weights(n, rewards)
    if method == "bound":
        return ((n - 1) * vbon.empirical_cdf(rewards, rewards).log()).softmax(-1)
    if method == "bonbon":
        return bonbon_weights(n, rewards)
    if method not in WITH_BETA:
        raise ValueError(f"the aim of {method} is unknown")
    values = method_values(method, n, rewards, rewards)
    if method == "infalign":
        # here the M responses are all there are, so F is known
        values = _power_of_cdf(rewards, n)
    if method == "pessimism":
        return pessimism_weights(values, beta)
    if method == "wind":
        return fixed_point(lambda weight: sum(_cdf(weight, values)) / 2, beta, values)
    if method in FIXED_POINTS:
        return fixed_point(lambda weight: expected_best(weight, values, n), beta, values)
    return (values / beta).softmax(-1)


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


def fixed_point(phi, beta: float, values: Tensor) -> Tensor:
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


def pessimism_weights(values: Tensor, beta: float) -> Tensor:  # (P, M)
    """Return the target of InferenceTimePessimism: weights ∝ relu(value - λ)."""
    weight = (values - pessimism_threshold(values, beta)).clamp(min=0)
    return weight / weight.sum(-1, keepdim=True)


def pessimism_threshold(values: Tensor, beta: float) -> Tensor:  # (P, M) -> (P, 1)
    """Return λ, for which relu((value - λ) / β) has the mean 1 over the M responses."""
    ordered = values.cpu().double().sort(-1, descending=True).values
    count = torch.arange(1, values.shape[1] + 1).double()
    # λ if the `count` best responses are above it; it is the largest count for which they are
    threshold = (ordered.cumsum(-1) - beta * values.shape[1]) / count
    above = (ordered > threshold).sum(-1, keepdim=True)
    return threshold.gather(-1, above - 1)

# ------------------------------------------------------------------------------- the aim of BoNBoN

BONBON_ALPHA = 0.005                    # the share of the likelihood of winners in its loss


def bonbon_margin(n: int) -> float:
    """Return c = (n-1) · Σ_{k<n} 1/k: the mean over best and worst of n responses of the difference
    of log(π_bon / π_ref)."""
    return (n - 1) * sum(1 / k for k in range(1, n))


def bonbon_weights(n: int, ref_rewards: Tensor) -> Tensor:  # (P, M)
    """Return the optimum of BoNBoN's loss, prompt by prompt, by Newton's method: it is convex."""
    weights = []
    for rewards in ref_rewards.cpu().double():
        pairs = best_and_worst(n, rewards)              # (M, M)
        winners = pairs.sum(1)
        m = len(rewards)
        log_weight = torch.zeros(m).double()
        # the squared differences: Σ pairs_ij (h_i - h_j - c)²
        both = pairs + pairs.T
        curvature = 2 * (1 - BONBON_ALPHA) * (both.sum(1).diag() - both)
        push = 2 * (1 - BONBON_ALPHA) * bonbon_margin(n) * (pairs.sum(1) - pairs.sum(0))
        for _ in range(100):
            p = log_weight.softmax(-1)
            gradient = BONBON_ALPHA * (p - winners) + curvature @ log_weight - push
            hessian = BONBON_ALPHA * (p.diag() - torch.outer(p, p)) + curvature
            # the loss does not depend on the sum: fix it
            step = torch.linalg.solve(hessian + 1 / m, gradient)
            log_weight = log_weight - step / max(1.0, step.abs().max().item())
            if step.abs().max() < 1e-11:
                break
        weights.append(log_weight.softmax(-1))
    return torch.stack(weights)


def best_and_worst(n: int, rewards: Tensor) -> Tensor:  # (M,) -> (M, M)
    """Return the probability that y_i is the best and y_j the worst of n responses.

    Each of the n is one of the M with equal probability. Ties are broken at random; of n responses
    with the same reward, the best and the worst are two of them.
    """
    less, equal = vbon._count_less_and_equal(rewards[None], rewards[None])
    m = len(rewards)
    below = less[0] / m
    size = equal[0] / m
    at_most = below + size

    def between(high: Tensor, low: Tensor) -> Tensor:
        """Return the probability that all n are above low_j and below high_i."""
        return (high[:, None] - low[None, :]).clamp(min=0) ** n

    # all n are in the levels from j to i, but not all above j, and not all below i
    chance = between(at_most, below) - between(at_most, at_most) - between(below, below)
    chance = chance + between(below, at_most)
    pairs = chance / (equal[0][:, None] * equal[0][None, :])
    # where y_j is better than y_i, there is no such pair
    return torch.where(rewards[:, None] >= rewards[None, :], pairs, 0.0)

# ------------------------------------------------------------------------------------ three curves

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
