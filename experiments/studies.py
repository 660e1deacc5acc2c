"""studies.py: eight questions about vBoN and its neighbours.

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

Run it from the folder of train.py. It uses and fills the same cache. Temperature and gap take their
policies from there, or train them: gap that of train.py, temperature also those of
experiments.compare for kl-rl and bon-sft.
"""
import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

import train
import vbon
from experiments import gap, overoptimisation, savings, summary, temperature, theory
from experiments.compare import Entry, find_entry, get_policy
from support import options, report
from support.files import UnusableInput
from support.inputs import read_inputs
from support.settings import choose_settings
from support.statistics import wins_of_target

STUDIES = ("aims", "scale", "bound", "m", "fault", "savings", "temperature", "gap")

# ------------------------------------------------------------------------------------- the main job

def main(argv: list[str] | None = None) -> None:
    """Print the answers to the questions, for one N and one seed."""
    args = parse_arguments(argv)
    chosen = args.study or STUDIES
    inputs = read_inputs(args)
    settings = choose_settings(train.Settings(), args, args.n, inputs)
    world = None
    if set(chosen) - {"fault", "m"}:                    # these need no text
        world = train.prepare(inputs, settings, Path(args.out, "cache"), args.seed)
    for name in chosen:
        try:
            study(name, args, world, settings)
        except UnusableInput as problem:
            # a question that nobody asked must not stop the others
            if args.study is not None:
                raise
            print(f"\n{name} is left out: {problem}")
    pictures = {"m", "fault", "savings"}.intersection(chosen)
    if pictures:
        print(f"\nPictures in {args.out}/: {', '.join(f'{name}.png' for name in sorted(pictures))}")


def study(name: str, args: argparse.Namespace, world: train.World | None, settings: train.Settings
          ) -> None:
    """Print the answer to one question; plot it, if there is a picture of it."""
    n = args.n
    seed = args.seed
    out = Path(args.out)
    cache = out / "cache"
    if name == "aims":
        study_aims(world, n, seed, cache)
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
            models[method] = get_policy(cache, world, entry, n, settings, seed).model
        temperature.study(world, models, seed, settings.samples.k_eval)
    else:
        policy = get_policy(cache, world, Entry("vbon", "vbon"), n, settings, seed)
        gap.study(policy.evaluated, world.held_out.reward, n)

# ---------------------------------------------------------------------------- aims of all methods

def study_aims(world: train.World, n: int, seed: int, cache: Path) -> None:
    """Print what the aim of each method attains, alone and decoded by best-of-n and worst-of-n."""
    print(f"\nWhat do the methods aim at?\n\n{'':22}{'win rate':>9}{'KL to ref':>11}"
          f"{'KL to BoN':>11}{f'best of {n}':>11}{f'worst of {n}':>11}")
    for method in ("vbon", "bonbon", *theory.WITH_BETA):
        try:
            aim = find_entry(cache, method, world.held_out.reward, n, seed).aim
        except UnusableInput as problem:
            print(f"  left out: {problem}")
            continue
        cells = ""
        for column in ("win_rate", "kl_ref", "kl_bon", "decoded_win_rate", "worst_win_rate"):
            cells += f"{aim[column]:.3f}".rjust(9 if column == "win_rate" else 11) if aim else ""
        print(f"  {summary.title(method, n):20}{cells or 'too few effective samples'}")

# ------------------------------------------------------------------------- the scale of the reward

def study_scale(world: train.World, n: int, beta: float) -> None:
    """Show that increasing transforms of the reward do not change vBoN's target, but KL-RL's."""
    # in floating point, an increasing function may map two numbers to one; float64 avoids this
    ref_logprob = world.candidates.logprob
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
          f"{'largest change of a log target':31}{'vBoN':>8}{'KL-RL':>8}"
          f"{f'optimum of KL-RL, beta={beta:g}: win':>36}{'KL':>8}")
    for name, transform in transforms.items():
        new_reward = transform(reward)
        new_refs = transform(refs)
        check_same_ranks(name, reward, refs, new_reward, new_refs)
        before = vbon.bon_target(ref_logprob, reward, refs, n)
        after = vbon.bon_target(ref_logprob, new_reward, new_refs, n)
        vbon_change = (after - before).abs().max().item()
        # KL-RL's target is known up to a constant for each prompt
        change = (new_reward - reward) / beta
        change = change - change.mean(1, keepdim=True)
        optimum = theory.attained((new_refs / beta).softmax(-1), new_refs)
        cells = f"{'too few effective samples':>44}"
        if optimum["ess"] >= theory.MIN_SIZE:
            cells = f"{optimum['win_rate']:36.3f}{optimum['kl_ref']:8.3f}"
        print(f"  {name:29}{vbon_change:8.3g}{change.abs().max().item():8.3g}{cells}")


def check_same_ranks(name: str, reward: Tensor, refs: Tensor, new_reward: Tensor, new_refs: Tensor
                     ) -> None:
    """Raise UnusableInput if a transform maps two rewards to one, in floating point."""
    old = vbon.count_less_and_equal(reward, refs)
    new = vbon.count_less_and_equal(new_reward, new_refs)
    if not torch.equal(torch.stack(old), torch.stack(new)):
        raise UnusableInput(f"with this reward, {name} changes how responses rank, by rounding")

# ---------------------------------------------------------------------------------- exact and bound

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

# --------------------------------------------------------------------------------- the number M

MS = (16, 32, 64, 128, 256, 512)


def error_of_cdf(m: int, repeats: int = 4000) -> dict[str, float]:
    """Return the error of F from M reference rewards; it is the same for every continuous reward.

    So we take a reward that is its own CDF: uniform on [0, 1]. The result has the root mean square
    error of log F at responses of the reference; the mean and the 95 % quantile of the largest
    error of F at any reward; and the bound on this quantile (DKW inequality).
    """
    generator = torch.Generator().manual_seed(m)
    refs = torch.rand(repeats, m, generator=generator).double()
    reward = torch.rand(repeats, 32, generator=generator).double()
    log_error = vbon.empirical_cdf(reward, refs).log() - reward.log()
    # The estimate is a step function: the error is largest at one of the M steps, or just above.
    steps = refs.sort(-1).values
    at = vbon.empirical_cdf(steps, refs)
    above = at + 1 / (m + 1)
    largest = torch.maximum((at - steps).abs(), (above - steps).abs()).amax(-1)
    return {
        "m": m,
        "rmse_log": log_error.square().mean().sqrt().item(),
        "sup_mean": largest.mean().item(),
        "sup_95": largest.quantile(0.95).item(),
        "dkw": math.sqrt(math.log(2 / 0.05) / (2 * m)),
    }


def study_m(path: Path, n: int) -> None:
    """Print and plot the errors of F for each M, and what a perfect policy would win with it."""
    errors = [error_of_cdf(m) for m in MS]
    print(f"\nHow does M matter?\n\n{'M':>5}{'RMSE of':>10}{'largest error of F':>24}"
          f"{'bound':>8}{'win rate of the':>18}\n"
          f"{'':5}{'log F':>10}{'mean':>14}{'95 %':>10}{'(DKW)':>8}{f'target, N = {n}':>18}")
    for error in errors:
        print(f"{error['m']:5}{error['rmse_log']:10.3f}{error['sup_mean']:14.3f}"
              f"{error['sup_95']:10.3f}{error['dkw']:8.3f}{wins_of_target(n, error['m']):18.4f}")
    with report.figure(path, 2, (9, 3.6)) as (left, right):
        left.loglog(MS, [error["dkw"] for error in errors], "k:", label="bound of the 95 % (DKW)")
        left.loglog(MS, [error["sup_95"] for error in errors], "o-", label="95 % quantile")
        left.loglog(MS, [error["sup_mean"] for error in errors], "s-", label="mean")
        left.set(title="Largest error of F, over all rewards")
        left.legend(frameon=False, fontsize=9)
        right.loglog(MS, [error["rmse_log"] for error in errors], "o-")
        right.set(title="Root mean square error of log F")
        for axes, ticks in ((left, (0.04, 0.1, 0.2, 0.4)), (right, (0.1, 0.2, 0.4))):
            axes.set(xlabel="M, reference samples for each prompt")
            axes.minorticks_off()
            axes.set_xticks(MS, MS)
            axes.set_yticks(ticks, ticks)

# --------------------------------------------------------------------------------- the command line

def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments of the command line. Raises UnusableInput for wrong ones."""
    parser = options.make_parser(__doc__, train.Settings())
    parser.add_argument("--study", nargs="+", choices=STUDIES, metavar="STUDY",
                        help=f"Which questions: {', '.join(STUDIES)}. Default: all of them.")
    args = parser.parse_args(argv)
    if args.sample is not None:
        raise UnusableInput("--sample: it belongs to train.py")
    return args


if __name__ == "__main__":
    options.run(main, "studies")
