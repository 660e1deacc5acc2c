"""What happens if the reward has a fault: a small world where all is known, nothing is sampled.

1,000 equally probable responses have a quality. Their reward is the quality, except for 1 % that
are bad and have a high reward. The larger n, the surer best-of-n, and vBoN, return one of these.
"""
import math
from pathlib import Path

import torch
from torch import Tensor

from experiments import decoders, theory
from support import report

NS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
BETA = 0.5                              # of InferenceTimePessimism


def faulty_world(size: int = 1000) -> tuple[Tensor, Tensor]:  # -> (size,), (size,)
    """Return quality and reward: qualities are N(0, 1), and every hundredth response is bad."""
    quality = torch.special.ndtri((torch.arange(size).double() + 0.5) / size)
    reward = quality.clone()
    bad = torch.arange(50, size, 100)
    # their rewards are above those of 97.7 % of the others, half of them above all
    reward[bad] = torch.linspace(2.0, 4.5, len(bad)).double()
    quality[bad] = -3.0
    return quality, reward


def qualities() -> dict[str, list[float]]:
    """Return the expected quality for each n of NS, by decoder."""
    quality, reward = faulty_world()
    found = {"best of n, vBoN": [], "pessimism": []}
    chance = decoders.pessimism_chance(reward[None], reward[None], BETA)
    uniform = torch.full_like(chance, -math.log(len(reward)))
    for n in NS:
        laws = (theory.bon_weights(n, reward[None])[0],
                decoders.pessimism_logprob(uniform, chance, chance, n)[0].exp())
        for values, law in zip(found.values(), laws):
            values.append((law * quality).sum().item())
    return found


def study(path: Path) -> None:
    """Print the qualities and plot them."""
    found = qualities()
    print("\nA reward with a fault: 1 % of the responses are bad and have a high reward\n")
    print(f"{'true quality, n =':18}" + "".join(f"{n:>7}" for n in NS))
    with report.figure(path, 1, (5.5, 3.6)) as (axes,):
        for (name, values), marker in zip(found.items(), "os"):
            print(f"  {name:16}" + "".join(f"{x:7.2f}" for x in values))
            axes.plot(NS, values, f"{marker}-", ms=5, label=name)
        axes.set(xscale="log", xlabel="n", ylabel="true quality",
                 title="True quality, if the reward has a fault")
        axes.set_xticks(NS, NS)
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=9)
