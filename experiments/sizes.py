"""sizes.py: does the learning rate's rule hold for models of other sizes?

    python -m experiments.sizes --n 4 --seed 0 1

vBoN on references of several sizes, each with the learning rate 0.54 / √(trained parameters). It
has the stages, flags and cache of train.py, and --size.
"""
import copy
import math
from pathlib import Path

import torch

import train
from experiments import compare, summary
from model import add_adapters
from support import options
from support.files import UnusableInput
from support.inputs import read_inputs
from support.settings import change, choose_settings

HEAD_WIDTH = 32                                         # an attention head has this width
COLUMNS = {"win_rate": 15, "kl_ref": 15, "kl_bon": 15}


def main(argv: list[str] | None = None) -> None:
    """Print a row for each size: means over the seeds."""
    parser = options.make_parser(__doc__, train.Settings(), several=True)
    parser.add_argument("--size", nargs="+", metavar="LxW", default=["2x64", "2x128", "4x128"],
                        help="The models: layers x width. The width is a multiple of "
                        f"{HEAD_WIDTH}, that of an attention head. Default: 2x64 2x128 4x128.")
    args = parser.parse_args(argv)
    sizes = {text: parse_size(text) for text in args.size}
    if len(args.n) > 1 or args.init is not None:
        raise UnusableInput("want one --n, and no --init")
    n = args.n[0]
    inputs = read_inputs(args)
    settings = choose_settings(train.Settings(), args, n, inputs)
    cache = Path(args.out, "cache")
    lines = []
    for text, (layers, width) in sizes.items():
        size = change(settings, layers=layers, width=width, heads=width // HEAD_WIDTH)
        rows = []
        for seed in args.seed:
            print(f"{text}, seed {seed}", flush=True)
            world = train.prepare(inputs, size, cache, seed)
            entry = compare.Entry("vbon", None, {})
            tuned, evaluated = compare.get_policy(cache, world, entry, n, size, seed)
            rows.append(train.policy_row("vbon", world, evaluated, n, tuned["seconds"]))
        # fine-tuning trains the parameters of the adapters
        trained = add_adapters(copy.deepcopy(world.reference), size.tuning.rank, torch.Generator())
        count = sum(p.numel() for p in trained)
        lr = size.tuning.lr_scale / math.sqrt(count)
        lines.append(f"{text:10}{count:9,}{lr:10.5f}" + summary.cells(rows, COLUMNS))
    print(f"\n{'layers':10}{'trained':>9}{'learning':>10}{'win rate':>15}{'KL to ref':>15}"
          f"{'KL to BoN':>15}\n{'x width':10}{'numbers':>9}{'rate':>10}")
    print("\n".join(lines))


def parse_size(text: str) -> tuple[int, int]:
    """Return layers and width of "4x128". Raises UnusableInput for sizes that no model has."""
    try:
        layers, width = map(int, text.split("x"))
    except ValueError:
        layers = width = 0
    if layers < 1 or width < 1 or width % HEAD_WIDTH != 0:
        raise UnusableInput(f"--size {text}: want layers x width, such as 4x128; the width is a "
                            f"multiple of {HEAD_WIDTH}")
    return layers, width


if __name__ == "__main__":
    options.run(main, "sizes")
