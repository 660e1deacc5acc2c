"""What a run will take, and what it cannot reach: the lines before the work begins."""
import argparse
import math
import time

import torch

from model import GPT
from support.inputs import Inputs
from support.own_reward import RewardFile
from support.report import CONSTANT_REWARD, share_of_ties
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


def operations(settings: AllSettings, model: GPT, text: Text, policies: int = 1) -> float:
    """Return the floating-point operations of a run, if no stage is finished yet.

    A weight takes 2 operations for each token in a forward pass, and 4 in a backward pass. In an
    update, a token is sampled, scored by reference and policy, and goes backward: 10 operations.
    """
    s = settings
    sampled, trained, evaluated = count_responses(settings, text)
    reviews = s.reference.lm_steps * s.reference.lm_batch
    tokens = s.text.prompt_tokens + text.length
    of_policies = policies * (10 * trained + 8 * evaluated)
    return count_weights(model) * tokens * (6 * reviews + 2 * sampled + of_policies)


def count_weights(model: GPT) -> int:
    """Return the number of weights that each token is multiplied with."""
    weights = 0
    for name, p in model.named_parameters():
        # looking up an embedding is not a multiplication
        if name not in ("wte.weight", "wpe.weight"):
            weights += p.numel()
    if model.config["tied"]:
        weights += model.wte.weight.numel()             # it is the head, too
    return weights


def count_responses(settings: AllSettings, text: Text) -> tuple[int, int, int]:
    """Return the numbers of responses: of the reference, of a policy in training, in evaluation."""
    prompts = len(text.prompts)
    held_out = len(text.held_prompts)
    sampled = prompts * settings.samples.m + 2 * held_out * settings.samples.m_eval
    trained = settings.tuning.steps * min(settings.tuning.batch, prompts) * settings.tuning.k
    return sampled, trained, held_out * settings.evaluation.k_eval


def describe_cost(count: float, device: torch.device) -> str:
    """Return what this many operations take: a line, with an estimate of the time."""
    # small models take some three times as long as their matrix products alone
    minutes = 3 * count / matmul_speed(device, 1024, 5) / 60
    duration = f"some {minutes:,.0f} minutes" if minutes > 1.5 else "about a minute"
    return f"cost: {count / 1e12:.3g} TFLOP at most, {duration} here"


def matmul_speed(device: torch.device, size: int, repeats: int) -> float:
    """Return the operations per second of a square matrix product, the best of several."""
    x = torch.randn(size, size, device=device, generator=torch.Generator(device).manual_seed(0))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        (x @ x).sum().item()                            # .item() waits for a GPU
        seconds.append(time.perf_counter() - began)
    return 2 * size ** 3 / min(seconds)


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
    sampled, trained, evaluated = count_responses(settings, text)
    tried = 8
    shown = min(8, len(text.held_prompts)) * (1 + n + 1)        # in samples.txt
    return tried + sampled + policies * (trained + evaluated + shown)


def describe_text(text: Text, inputs: Inputs, settings: AllSettings, nats: float) -> str:
    """Return a line about the text and the reference model, and one if many texts are cut."""
    count = len(text.tokens) + len(text.unseen_tokens)
    kind = "built-in " if inputs.reviews is None else ""
    line = (f"text: {count} {kind}reviews; the reference model has a perplexity of "
            f"{math.exp(nats):.1f}")
    if text.cut > 0.1:
        line += (f"\n{text.cut:.0%} of them are longer than {settings.text.prompt_tokens} + "
                 f"{text.length} tokens, and are cut; with --length {text.enough}, 10% would be")
    return line


def describe_samples(world, n: int) -> str:
    """Return how many reference samples there are, and whether their rewards are all the same."""
    held_out = world.held_out.reward
    line = (f"reference samples: {world.samples.reward.numel()} to train with, for "
            f"{len(world.samples.prompt)} prompts; {held_out.numel()} to\n  evaluate with, and "
            f"{world.candidates.reward.numel()} for best of {n}, for {len(held_out)} held-out "
            f"prompts")
    if share_of_ties(held_out) == 1:
        line += "\n" + CONSTANT_REWARD
    return line


def announce_rewards(file: RewardFile, count: int, seconds: float) -> str:
    """Return how many rewards a file will be asked for, and how long that takes; a line."""
    line = f"reward: {file} will judge up to {count:,} responses"
    minutes = count * seconds / 60
    if minutes >= 1:
        line += f": about {minutes:,.0f} minutes, at {1000 * seconds:.3g} ms each"
    return line
