"""What the sampling temperature does: reward, win rate and variety of reference and policies."""
import copy

import torch
from torch import Tensor

import vbon
from model import GPT
from support.sampling import compute_rewards, sample_responses
from support.statistics import mean_and_error
from train import World

TEMPERATURES = (0.25, 0.5, 0.75, 1.0, 1.25)


def cooled(model: GPT, temperature: float) -> GPT:
    """Return a copy whose logits are divided by the temperature."""
    model = copy.deepcopy(model)
    model.untie_head()                                  # the embedding stays as it is
    with torch.no_grad():
        model.lm_head.weight /= temperature
    return model


def study(world: World, models: dict[str, GPT], seed: int, k: int) -> None:
    """Print a row for each model and temperature, from k responses to each held-out prompt."""
    prompts = world.held_out.prompt
    lines = []
    for name, model in models.items():
        for temperature in TEMPERATURES:
            label = f"{name} at {temperature:g}"
            sampled = sample_responses(cooled(model, temperature), prompts, k, world.text.length,
                                       label, seed)
            response = sampled["response"]
            device = world.reference.wte.weight.device.type
            reward = compute_rewards(world.reward, prompts, response, label, device)["reward"]
            win, error = mean_and_error(vbon.win_rate(reward, world.held_out.reward))
            lines.append(f"  {name:10}{temperature:12g}{reward.double().mean().item():9.2f}"
                         f"{win:8.3f} ±{error:.3f}"
                         f"{count_pairs(response, world.reference.eot):7.0f}")
    print(f"\nTemperature: {k} responses to each of {len(prompts)} held-out prompts\n\n"
          f"{'':12}{'temperature':>12}{'reward':>9}{'win rate':>15}{'pairs':>7}")
    print("\n".join(lines))


def count_pairs(response: Tensor, eot: int) -> float:  # (P, K, L)
    """Return the number of different pairs of neighbouring tokens in the responses to a prompt."""
    counts = []
    for y in response:
        pairs = torch.stack([y[:, :-1], y[:, 1:]], -1).reshape(-1, 2)
        pairs = pairs[pairs[:, 0] != eot]               # a pair may end with end-of-text
        counts.append(len(pairs.unique(dim=0)))
    return sum(counts) / len(counts)
