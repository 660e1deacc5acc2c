"""sizes.py: does the learning rate's rule hold for models of other sizes?

    python -m experiments.sizes --n 4 --seed 0 1

vBoN on references of three sizes, each with the learning rate 0.54 / √(trained parameters). It has
the stages and flags of train.py; each size has its own folder in --out. Half an hour for each seed.
"""
import argparse
import copy
import math
from pathlib import Path

from torch import nn

import train
from experiments import compare
from experiments.summary import mean_and_spread, with_error
from model import GPT
from support import options, results
from support.inputs import read_inputs
from support.settings import choose_settings

SIZES = ((2, 64, 2), (4, 128, 4), (4, 256, 4))          # layers, width, heads


def main(argv: list[str] | None = None) -> None:
    """Print a row for each size: means over the seeds."""
    parser = options.make_parser(__doc__, several=True)
    args = parser.parse_args(argv)
    n = args.n[0]
    lines = []
    for layers, width, heads in SIZES:
        rows = []
        for seed in args.seed:
            row, trained, lr = run(args, n, seed, layers, width, heads)
            rows.append(row)
        cells = ""
        for name in ("win_rate", "kl_ref", "kl_bon"):
            cells += with_error(mean_and_spread(rows, name)).rjust(15)
        lines.append(f"{f'{layers} x {width}':10}{trained:9,}{lr:10.5f}{cells}")
    print(f"\n{'layers':10}{'trained':>9}{'learning':>10}{'win rate':>15}{'KL to ref':>15}"
          f"{'KL to BoN':>15}\n{'x width':10}{'numbers':>9}{'rate':>10}")
    print("\n".join(lines))


def run(args: argparse.Namespace, n: int, seed: int, layers: int, width: int, heads: int
        ) -> tuple[dict, int, float]:
    """Train and evaluate one size: its line, the number of trained parameters, the learning rate."""
    args = copy.copy(args)
    args.out = str(Path(args.out) / f"{layers}x{width}")
    inputs = read_inputs(args, [n], [])
    settings = choose_settings(train.Settings(), args, n, inputs)
    settings = settings.change(layers=layers, width=width, heads=heads)
    print(f"{layers} layers of width {width}, seed {seed}", flush=True)
    world = train.prepare(args, inputs, settings, n, seed)
    settings = world.settings
    policy = compare.get_policy(Path(args.out), "vbon", None, world, n, settings, seed)
    made_by = results.describe(settings, world.text, inputs, train.STAGES)
    rows, _ = compare.measure_policies(Path(args.out), world, [policy], n, settings, seed, made_by)
    trained = count_trained(world.reference, settings.tuning.rank)
    return rows[0], trained, settings.tuning.lr_scale / math.sqrt(trained)


def count_trained(model: GPT, rank: int) -> int:
    """Return the number of parameters of the adapters: two thin matrices for each linear layer."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return sum(rank * sum(module.weight.shape) for module in linear)


if __name__ == "__main__":
    options.run(main, "sizes")
