"""What the sampling temperature does: reward, win rate and variety of reference and policies."""
import copy
from pathlib import Path

import torch
from torch import Tensor

import vbon
from experiments.compare import find_policy
from model import GPT
from support.sampling import compute_rewards, sample_responses
from support.statistics import mean_and_error
from train import World

TEMPERATURES = (0.25, 0.5, 0.75, 1.0, 1.25)
POLICIES = ("vbon", "kl-rl", "bon-sft")


def cooled(model: GPT, temperature: float) -> GPT:
    """Return a copy whose logits are divided by the temperature."""
    model = copy.deepcopy(model)
    model.untie_head()                                  # the embedding stays as it is
    with torch.no_grad():
        model.lm_head.weight /= temperature
    return model


def study(world: World, out: Path, n: int, seed: int, made_by: dict, k: int = 64) -> None:
    """Print a table: a row for each model and temperature."""
    models = {"reference": world.reference}
    for method in POLICIES:
        policy = find_policy(out, method, n, seed, made_by)
        if policy is not None:
            models[method] = policy
    lines = []
    for name, model in models.items():
        for temperature in TEMPERATURES:
            reward, response = sample_at(temperature, world, model, k, f"{name} at {temperature:g}",
                                         seed)
            win, error = mean_and_error(vbon.win_rate(reward, world.held_out.reward))
            lines.append(f"  {name:10}{temperature:12g}{reward.double().mean().item():9.2f}"
                         f"{win:8.3f} ±{error:.3f}{share_distinct(response):11.1%}"
                         f"{count_pairs(response, world.reference.eot):7.0f}")
    prompts = len(world.held_out.prompt)
    print(f"\nTemperature: {k} responses to each of {prompts} held-out prompts\n\n"
          f"{'':12}{'temperature':>12}{'reward':>9}{'win rate':>15}{'distinct':>11}"
          f"{'pairs':>7}")
    print("\n".join(lines))
    if len(models) == 1:
        print("  No policies in --out; run experiments.compare first.")


def sample_at(temperature: float, world: World, model: GPT, k: int, name: str, seed: int
              ) -> tuple[Tensor, Tensor]:
    """Return rewards (P, K) and responses (P, K, L) at a temperature, on the held-out prompts."""
    device = world.reference.wte.weight.device
    model = cooled(model.to(device), temperature)
    sampled = sample_responses(model, world.held_out.prompt, k, world.settings.text.length, name,
                               seed)
    judged = compute_rewards(world.reward, world.held_out.prompt, sampled["response"], name,
                             device.type)
    return judged["reward"], sampled["response"]


def share_distinct(response: Tensor) -> float:  # (P, K, L)
    """Return the number of different responses to a prompt, as a share of K."""
    shares = [len(y.unique(dim=0)) / len(y) for y in response]
    return sum(shares) / len(shares)


def count_pairs(response: Tensor, eot: int) -> float:  # (P, K, L)
    """Return the number of different pairs of neighbouring tokens in the responses to a prompt."""
    counts = []
    for y in response:
        pairs = y.unfold(1, 2, 1).reshape(-1, 2)
        pairs = pairs[pairs[:, 0] != eot]               # a pair may end with end-of-text
        counts.append(len(pairs.unique(dim=0)))
    return sum(counts) / len(counts)
