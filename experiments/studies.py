"""studies.py: nine questions about vBoN and its neighbours.

    python -m experiments.studies --n 4                     all of them
    python -m experiments.studies --n 4 --study fault       one of them

    aims          What do the methods aim at, all as far from the reference as best-of-N?
    scale         How does the scale of the reward matter?
    bound         How far is the bound (3) from the exact form (2)?
    m             How does the number M of reference samples matter?
    fault         What if the reward has a fault?
    savings       Which decoders save tokens?
    temperature   What does the sampling temperature do?
    gap           Where does the KL of vBoN to best-of-N come from?
    sizes         Does the learning rate's rule hold for larger models?

Run it from the folder of train.py. It uses and fills the same cache. The last three take their
policies from there, or train them, and sizes also references; it is not among "all of them".
"""
import copy
import math
from pathlib import Path

import torch
from torch import Tensor

import train
import vbon
from experiments import gap, overoptimisation, savings, summary, temperature, theory
from experiments.compare import Entry, find_entry, get_policy
from model import add_adapters
from support import options, report
from support.files import UnusableInput
from support.inputs import Inputs, read_inputs
from support.settings import change, choose_settings

STUDIES = ("aims", "scale", "bound", "m", "fault", "savings", "temperature", "gap", "sizes")


def main(argv: list[str] | None = None) -> None:
    """Print the answers to the questions, for one N and one seed."""
    parser = options.make_parser(__doc__, train.Settings())
    parser.add_argument("--study", nargs="+", choices=STUDIES, metavar="STUDY",
                        help=f"which questions: {', '.join(STUDIES)} (default: all but the last)")
    args = parser.parse_args(argv)
    if args.sample is not None:
        raise UnusableInput("--sample: it belongs to train.py")
    inputs = read_inputs(args)
    settings = choose_settings(train.Settings(), args, args.n, inputs)
    chosen = args.study or STUDIES[:-1]
    world = None
    if set(chosen) - {"fault", "m", "sizes"}:       # these do not need it
        world = train.prepare(inputs, settings, Path(args.out, "cache"), args.seed)
    for name in chosen:
        try:
            if name == "sizes":
                study_sizes(inputs, settings, args.n, args.seed, Path(args.out, "cache"))
            else:
                study(name, args.n, args.seed, Path(args.out), world, settings)
        except UnusableInput as problem:
            # a question that nobody asked must not stop the others
            if args.study is not None:
                raise
            print(f"\n{name} is left out: {problem}")


def study(name: str, n: int, seed: int, out: Path, world: train.World | None,
          settings: train.Settings) -> None:
    """Print the answer to one question; plot it, if there is a picture of it."""
    cache = out / "cache"
    if name == "aims":
        study_aims(world.held_out.reward, n, seed, cache)
    elif name == "scale":
        study_scale(world, n, find_entry(cache, "kl-rl", world.held_out.reward, n, seed).beta)
    elif name == "bound":
        study_bound(world, n)
    elif name == "m":
        study_m(out / "m.png", n)
    elif name == "fault":
        overoptimisation.study(out / "fault.png")
    elif name == "savings":
        savings.study(world, seed, out / "savings.png")
    elif name == "temperature":
        models = {"reference": world.reference}
        for method in ("vbon", "kl-rl", "bon-sft"):
            entry = find_entry(cache, method, world.held_out.reward, n, seed)
            tuned, _ = get_policy(cache, world, entry, n, settings, seed)
            models[method] = tuned["policy"]
        temperature.study(world, models, seed, settings.samples.k_eval)
    else:
        _, evaluated = get_policy(cache, world, Entry("vbon", None, {}, "vbon"), n, settings, seed)
        gap.study(evaluated, world.held_out.reward, n)


def study_aims(refs: Tensor, n: int, seed: int, cache: Path) -> None:
    """Print what the aim of each method attains, alone and decoded by best-of-n."""
    groups = {}
    print("\nWhat do the methods aim at?")
    for method in ("vbon", *theory.WITH_BETA):
        try:
            aim = find_entry(cache, method, refs, n, seed).aim
            groups[n, method] = [{f"aim_{name}": x for name, x in aim.items()}]
        except UnusableInput as problem:
            print(f"  left out: {problem}")
    summary.print_aims(groups)


def study_scale(world: train.World, n: int, beta: float) -> None:
    """Show that increasing transforms of the reward do not change vBoN's target, but KL-RL's."""
    ref_logprob = world.candidates.logprob
    # in float32, an increasing function may map two numbers to one
    reward = world.candidates.reward.double()
    refs = world.held_out.reward.double()
    top = refs.quantile(0.97).item()
    transforms = {
        "the logit r": lambda r: r,
        "its probability, sigmoid(r)": torch.sigmoid,
        "r³": lambda r: r ** 3,
        "the top 3 % raised by 20": lambda r: r + 20 * (r > top),
    }
    print(f"\nHow does the scale of the reward matter?\n\n"
          f"{'largest change of a log target':31}{'vBoN':>8}{f'KL-RL, beta={beta:g}':>20}")
    for name, transform in transforms.items():
        before = vbon.bon_target(ref_logprob, reward, refs, n)
        after = vbon.bon_target(ref_logprob, transform(reward), transform(refs), n)
        vbon_change = (after - before).abs().max().item()
        # KL-RL's target is known up to a constant for each prompt
        change = (transform(reward) - reward) / beta
        change = (change - change.mean(1, keepdim=True)).abs().max().item()
        print(f"  {name:29}{vbon_change:8.3g}{change:20.3g}")


EDGES = (0, -8, -12, -16, -20, -math.inf)               # of log π_ref(y), in nats


def study_bound(world: train.World, n: int) -> None:
    """Print how far (2) is above its bound (3), by log π_ref(y)."""
    log_cdf = vbon.empirical_cdf(world.candidates.reward, world.held_out.reward).log()
    ref_logprob = world.candidates.logprob.double()
    exact = vbon.bon_logprob(ref_logprob, log_cdf, n)
    difference = exact - vbon.bon_logprob_bound(ref_logprob, log_cdf, n)
    print(f"\nHow far is the bound from the exact form?\n\nlog π_ref(y), nats   responses   "
          f"exact (2) - bound (3) at N = {n}: mean, largest")
    for high, low in zip(EDGES, EDGES[1:]):
        chosen = difference[(ref_logprob <= high) & (ref_logprob > low)]
        if len(chosen) > 0:
            print(f"  {low:6} to {high:4}{len(chosen):15}{chosen.mean().item():22.1e}"
                  f"{chosen.max().item():12.1e}")


MS = (16, 32, 64, 128, 256, 512)


def error_of_cdf(m: int, n: int, repeats: int = 2000) -> tuple[float, float, float]:
    """Return the error of F from M reference rewards; it is the same for every continuous reward.

    So we take a reward that is its own CDF: uniform on [0, 1]. Returns the root mean square error
    of log F at responses of the reference; the 95 % quantile of the largest error of F at any
    reward; and the win rate of the target (7): a policy learns from the mean of log F.
    """
    generator = torch.Generator().manual_seed(m)
    refs = torch.rand(repeats, m, generator=generator).double()
    reward = torch.rand(repeats, 32, generator=generator).double()
    log_error = vbon.empirical_cdf(reward, refs).log() - reward.log()
    rmse = log_error.square().mean().sqrt().item()
    grid = (torch.arange(100) + 0.5).double() / 100
    log_cdf = vbon.empirical_cdf(grid.expand(repeats, 100), refs).log().mean(0)
    wins = ((n - 1) * log_cdf).softmax(0) @ grid
    # The estimate is a step function: the error is largest at one of the M steps, or just above.
    steps = refs.sort(-1).values
    at = vbon.empirical_cdf(steps, refs)
    above = at + 1 / (m + 1)
    largest = torch.maximum((at - steps).abs(), (above - steps).abs()).amax(-1)
    return rmse, largest.quantile(0.95).item(), wins.item()


def study_m(path: Path, n: int) -> None:
    """Print and plot the errors of F for each M; print what a perfect policy would win with it."""
    errors = [error_of_cdf(m, n) for m in MS]
    # the Dvoretzky-Kiefer-Wolfowitz inequality bounds the 95 % quantile
    bounds = [math.sqrt(math.log(2 / 0.05) / (2 * m)) for m in MS]
    print(f"\nHow does M matter?\n\n{'M':>5}{'RMSE of':>10}{'largest error':>16}"
          f"{'bound':>8}{'win rate of the':>18}\n"
          f"{'':5}{'log F':>10}{'of F, 95 %':>16}{'(DKW)':>8}{f'target, N = {n}':>18}")
    for m, (rmse, largest, wins), bound in zip(MS, errors, bounds):
        print(f"{m:5}{rmse:10.3f}{largest:16.3f}{bound:8.3f}{wins:18.3f}")
    rmses, quantiles, _ = zip(*errors)
    with report.figure(path, 1, (5, 3.6)) as (axes,):
        axes.loglog(MS, bounds, "k:", label="its bound (DKW)")
        axes.loglog(MS, quantiles, "o-", label="largest error of F, 95 % quantile")
        axes.loglog(MS, rmses, "s-", label="root mean square error of log F")
        axes.set(xlabel="M, reference samples for each prompt", title="Errors of F")
        axes.minorticks_off()
        axes.set_xticks(MS, MS)
        axes.set_yticks((0.05, 0.1, 0.2, 0.4), (0.05, 0.1, 0.2, 0.4))
        axes.legend(frameon=False, fontsize=9)


SIZES = ((2, 64), (2, 128), (4, 128))                   # layers, width


def study_sizes(inputs: Inputs, settings: train.Settings, n: int, seed: int, cache: Path) -> None:
    """Train vBoN on references of several sizes, with the learning rate 0.54 / √(parameters)."""
    if inputs.pretrained is not None:
        raise UnusableInput("want no --init")
    columns = {"win_rate": 15, "kl_ref": 15, "kl_bon": 15}
    lines = []
    for layers, width in SIZES:
        size = change(settings, layers=layers, width=width, heads=width // 32)
        world = train.prepare(inputs, size, cache, seed)
        tuned, evaluated = get_policy(cache, world, Entry("vbon", None, {}, "vbon"), n, size, seed)
        row = train.policy_row("vbon", world, evaluated, n, tuned["seconds"])
        # fine-tuning trains the parameters of the adapters
        trained = add_adapters(copy.deepcopy(world.reference), size.tuning.rank, torch.Generator())
        count = sum(p.numel() for p in trained)
        lr = size.tuning.lr_scale / math.sqrt(count)
        name = f"{layers} x {width}"
        lines.append(f"{name:16}{count:9,}{lr:10.5f}" + summary.cells([row], columns))
    print(f"\n{'layers x width':16}{'trained':>9}{'rate':>10}{'win rate':>15}{'KL to ref':>15}"
          f"{'KL to BoN':>15}")
    print("\n".join(lines))


if __name__ == "__main__":
    options.run(main, "studies")
