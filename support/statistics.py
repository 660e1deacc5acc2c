"""Numbers for the evaluation: means with their errors, and what best-of-N attains by theory."""
import math

import torch
from torch import Tensor

from vbon import count_less_and_equal


def mean_and_error(x: Tensor) -> tuple[float, float]:  # (P, K) -> mean, standard error
    """Return the mean of a metric, and its standard error over prompts.

    Responses to one prompt are correlated. So each prompt counts as one observation, its mean.
    """
    per_prompt = x.double().mean(1)
    error = per_prompt.std() / math.sqrt(len(per_prompt))
    return per_prompt.mean().item(), error.item()


def bon_attains(ref_rewards: Tensor, n: int) -> tuple[float, float]:  # (P, M) -> kl, win_rate
    """Return what best-of-N attains with this reward: KL to π_ref in nats, and win rate.

    Without ties they are log N - (N-1)/N and N/(N+1). Both are estimated from the M rewards of each
    prompt; the KL is nan where best-of-N is determined by fewer than 16 of them. Raises ValueError
    for n < 1, and for rewards that are empty or not finite.
    """
    if type(n) is not int or n < 1:
        raise ValueError(f"want an integer n >= 1, got {n!r}")
    less, equal = count_less_and_equal(ref_rewards, ref_rewards)
    m = ref_rewards.shape[1]
    cdf_lt = less / m
    cdf_le = (less + equal) / m
    # π_bon / π_ref of each response; a mean under best-of-n has these ratios as weights
    ratio = (cdf_le ** n - cdf_lt ** n) / (cdf_le - cdf_lt)
    kl = torch.xlogy(ratio, ratio).mean()          # ratio · log ratio
    effective_samples = (m / ratio.square().mean(-1)).mean()
    if effective_samples < 16:
        kl = torch.tensor(math.nan)
    if n < m:
        # Compare each response with the best of n others: unbiased, with any ties. Best-of-n loses
        # if all n have a lower reward; a tie counts half.
        lower = share_of_sets(less + equal - 1, n, m - 1)
        strictly_lower = share_of_sets(less, n, m - 1)
        wins = 1 - (lower + strictly_lower) / 2
    else:
        wins = ratio * (cdf_lt + cdf_le) / 2
    return kl.item(), wins.mean().item()


def share_of_sets(count: Tensor, n: int, m: int) -> Tensor:
    """Return C(count, n) / C(m, n): the share of sets of n of m that lie among `count` of them."""
    enough = count.clamp(min=n)
    log_count = torch.lgamma(enough + 1) - torch.lgamma(enough - n + 1)
    log_all = math.lgamma(m + 1) - math.lgamma(m - n + 1)
    return torch.where(count >= n, (log_count - log_all).exp(), 0.0)


def share_of_ties(rewards: Tensor) -> float:  # (P, M)
    """Return the share of pairs of responses to the same prompt that have the same reward."""
    _, equal = count_less_and_equal(rewards, rewards)
    m = rewards.shape[1]
    # the pair of a response with itself is no pair
    return (equal.mean() - 1).item() / (m - 1)
