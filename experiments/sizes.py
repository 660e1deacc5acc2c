"""sizes.py: does the learning rate's rule hold for models of other sizes?

    python -m experiments.sizes --n 4 --seed 0 1

vBoN on references of several sizes, each with the learning rate 0.54 / √(trained parameters). It
has the stages and flags of train.py, and --size; each size has its own folder in --out.
"""
import argparse
import copy
import math
import re
from pathlib import Path

import torch

import train
from experiments import compare
from experiments.summary import mean_and_spread, with_error
from model import GPT, add_adapters
from support import options, results
from support.files import UnusableInput
from support.inputs import Inputs, read_inputs
from support.settings import check_settings, choose_settings

HEAD_WIDTH = 32                                         # an attention head has this width


def main(argv: list[str] | None = None) -> None:
    """Print a row for each size: means over the seeds."""
    parser = options.make_parser(__doc__, several=True)
    parser.add_argument("--size", nargs="+", metavar="LxW", default=["2x64", "2x128", "4x128"],
                        help="The models: layers x width. The width is a multiple of "
                        f"{HEAD_WIDTH}, that of an attention head. Default: 2x64 2x128 4x128.")
    args = parser.parse_args(argv)
    sizes = [parse_size(text) for text in args.size]
    if len(args.n) > 1 or args.init is not None or args.sample is not None:
        raise UnusableInput("sizes: want one --n, and neither --init nor --sample")
    n = args.n[0]
    inputs = read_inputs(args, [n], [])
    settings = choose_settings(train.Settings(), args, n, inputs)
    check_settings(settings, args, n)
    out = Path(args.out)
    lines = []
    for layers, width in sizes:
        args.out = str(out / f"{layers}x{width}")
        size = settings.change(layers=layers, width=width, heads=width // HEAD_WIDTH)
        rows = []
        for seed in args.seed:
            print(f"{layers} layers of width {width}, seed {seed}", flush=True)
            world = train.prepare(args, inputs, size, n, seed)
            rows.append(fine_tune_and_measure(args, inputs, world, n, seed))
        trained = count_trained(world.reference, size.tuning.rank)
        lr = size.tuning.lr_scale / math.sqrt(trained)
        cells = ""
        for name in ("win_rate", "kl_ref", "kl_bon"):
            cells += with_error(mean_and_spread(rows, name)).rjust(15)
        lines.append(f"{f'{layers} x {width}':10}{trained:9,}{lr:10.5f}{cells}")
    print(f"\n{'layers':10}{'trained':>9}{'learning':>10}{'win rate':>15}{'KL to ref':>15}"
          f"{'KL to BoN':>15}\n{'x width':10}{'numbers':>9}{'rate':>10}")
    print("\n".join(lines))


def parse_size(text: str) -> tuple[int, int]:
    """Return layers and width of "4x128". Raises UnusableInput for sizes that no model has."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None or int(found[2]) % HEAD_WIDTH != 0:
        raise UnusableInput(f"--size {text}: want layers x width, such as 4x128; the width is a "
                            f"multiple of {HEAD_WIDTH}")
    return int(found[1]), int(found[2])


def fine_tune_and_measure(args: argparse.Namespace, inputs: Inputs, world: train.World, n: int,
                          seed: int) -> dict:
    """Fine-tune and evaluate as compare.py does; return the line of the policy."""
    out = Path(args.out)
    settings = world.settings
    policy = compare.get_policy(out, "vbon", None, world, n, settings, seed)
    made_by = results.describe(settings, world.text, inputs, train.STAGES)
    rows, _ = compare.measure_policies(out, world, [policy], n, settings, seed, made_by)
    return rows[0]


def count_trained(model: GPT, rank: int) -> int:
    """Return the number of parameters that fine-tuning trains: those of the adapters."""
    trained = add_adapters(copy.deepcopy(model), rank, torch.Generator())
    return sum(p.numel() for p in trained)


if __name__ == "__main__":
    options.run(main, "sizes")
