"""What a run will take, and what it cannot reach: the lines before the work begins."""
import argparse

import torch

from model import GPT
from support.settings import AllSettings
from support.text import Text


def announce(settings: AllSettings, model: GPT, n: int, args: argparse.Namespace) -> list[str]:
    """Return notes on this run, each a line; for the built-in text there are none."""
    notes = []
    size = sum(4 * p.numel() for p in model.parameters())
    if size > 2 ** 28:
        # training holds weights, gradients and two averages of the optimizer; then come copies
        notes.append(f"this model needs about {8 * size / 1e9:.0f} GB of memory, and "
                     f"{4 * size / 1e9:.0f} GB on the disk")
    wins = wins_of_target(n, settings.samples.m)
    by_default_quick = args.quick and args.m is None
    if wins < n / (n + 1) - 0.01 and not by_default_quick:
        notes.append(f"M = {settings.samples.m} is small for n = {n}: even a perfect policy would "
                     f"win only {wins:.3f} ({n / (n + 1):.3f} by best of {n}); raise --m")
    return notes


def wins_of_target(n: int, m: int) -> float:
    """Return the win rate of the estimated target (7) itself, for a continuous reward.

    Where F = u, the rank of a response among the M rewards has a binomial distribution. In the
    mean over prompts, the policy learns from E log F̂, so it arrives at exp((N-1) · E log F̂(u)).
    """
    u = (torch.arange(1000).double() + 0.5)[:, None] / 1000             # (1000, 1)
    rank = torch.arange(m + 1).double()                                 # (M + 1,)
    m = torch.tensor(m).double()
    log_choose = torch.lgamma(m + 1) - torch.lgamma(rank + 1) - torch.lgamma(m - rank + 1)
    log_chance = log_choose + torch.xlogy(rank, u) + torch.xlogy(m - rank, 1 - u)
    log_cdf = log_chance.exp() @ ((rank + 1) / (m + 1)).log()           # (1000,)
    weight = ((n - 1) * log_cdf).softmax(0)
    return (weight @ u[:, 0]).item()


def count_rewards(settings: AllSettings, text: Text, n: int, policies: int = 1) -> int:
    """Return how many rewards a run computes at most; for one policy, if no stage is finished."""
    prompts = len(text.prompts)
    held_out = len(text.held_prompts)
    tried = 2
    sampled = prompts * settings.samples.m + 2 * held_out * settings.samples.m_eval
    trained = settings.tuning.steps * min(settings.tuning.batch, prompts) * settings.tuning.k
    evaluated = held_out * settings.evaluation.k_eval
    shown = min(8, held_out) * (1 + n + 1)                      # in samples.txt
    return tried + sampled + policies * (trained + evaluated + shown)
