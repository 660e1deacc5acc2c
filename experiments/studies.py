"""studies.py: questions that need no fine-tuning, and the cost of an update.

    python -m experiments.studies --n 4                     all of them
    python -m experiments.studies --n 4 --study fault       one of them
    python -m experiments.studies --cost 2 64 2 768         layers, width, heads, tokens of a GPT

    aims          What do the methods aim at, all as far from the reference as best-of-N?
    scale         How does the scale of the reward matter?
    bound         How far is the bound (3) from the exact form (2)?
    m             How does the number M of reference samples matter?
    fault         What if the reward has a fault?
    savings       Which decoders save tokens?
    temperature   What does the sampling temperature do?
    gap           Where does the KL of vBoN to best-of-N come from?

Run it from the folder of train.py. It uses and fills the same cache. Question m also shows the
policies of earlier runs of train.py with other --m, from results.jsonl in --out; temperature and
gap show those that train.py and experiments.compare have left there.
"""
import argparse
import copy
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import train
import vbon
from experiments import gap, overoptimisation, savings, temperature, theory
from experiments.summary import mean_and_spread, title, with_error
from model import GPT, add_adapters
from support import options, report, results
from support.announce import count_weights
from support.files import UnusableInput
from support.inputs import read_inputs
from support.settings import check_settings, choose_settings

STUDIES = ("aims", "scale", "bound", "m", "fault", "savings", "temperature", "gap")
WITH_PICTURES = {"m", "fault", "savings"}

# ------------------------------------------------------------------------------------- the main job

def main(argv: list[str] | None = None) -> None:
    """Print the answers to the questions, for one N and one seed."""
    args = parse_arguments(argv)
    chosen = args.study or STUDIES
    if args.cost is not None:
        print_cost(*args.cost)
        return
    out = Path(args.out)
    if chosen == ["fault"]:
        # a world of its own: nothing to prepare
        overoptimisation.study(out / "fault.png")
        return
    inputs = read_inputs(args, [args.n], [])
    settings = choose_settings(train.Settings(), args, args.n, inputs)
    check_settings(settings, args, args.n)
    rows = results.read_results(out)
    world = train.prepare(args, inputs, settings, args.n, args.seed)
    # the length of this text is known only now
    made_by = results.describe(world.settings, world.text, inputs, train.STAGES)
    for name in chosen:
        try:
            study(name, args, world, rows, made_by)
        except UnusableInput as problem:
            # a question that nobody asked must not stop the others
            if args.study is not None:
                raise
            print(f"\n{name} is left out: {problem}")
    if not WITH_PICTURES.isdisjoint(chosen):
        print(f"\nThe pictures are in {out}/")


def study(name: str, args: argparse.Namespace, world: train.World, rows: list[dict], made_by: dict
          ) -> None:
    """Print the answer to one question; plot it, if there is a picture of it."""
    out = Path(args.out)
    if name == "aims":
        study_aims(world, args.n)
    elif name == "scale":
        study_scale(world, args.n, args.beta)
    elif name == "bound":
        study_bound(world, args.n)
    elif name == "m":
        study_m(out / "m.png", find_other_m(rows, args.n, made_by), args.n)
    elif name == "fault":
        overoptimisation.study(out / "fault.png")
    elif name == "savings":
        savings.study(world, args.seed, out / "savings.png")
    elif name == "temperature":
        temperature.study(world, out, args.n, args.seed, made_by)
    else:
        gap.study(world, out, args.n, args.seed, made_by)

# ---------------------------------------------------------------------------- aims of all methods

def study_aims(world: train.World, n: int) -> None:
    """Print what the aim of each method attains, alone and decoded by best-of-n and worst-of-n."""
    refs = world.held_out.reward
    lines = []
    for method in ("vbon", "bonbon", *theory.WITH_BETA):
        beta = None
        if method in theory.WITH_BETA:
            beta = theory.find_beta(refs, n, method)
        found = theory.aim(method, n, beta, refs)
        if found is None:
            continue
        lines.append(f"  {title(method, n):20}{found['win_rate']:9.3f}{found['kl_ref']:11.3f}"
                     f"{found['kl_bon']:11.3f}{found['decoded_win_rate']:11.3f}"
                     f"{found['worst_win_rate']:11.3f}")
    print(f"\nWhat do the methods aim at?\n\n{'':22}{'win rate':>9}{'KL to ref':>11}"
          f"{'KL to BoN':>11}{f'best of {n}':>11}{f'worst of {n}':>11}")
    print("\n".join(lines))

# ------------------------------------------------------------------------- the scale of the reward

def study_scale(world: train.World, n: int, beta: float | None) -> None:
    """Show that increasing transforms of the reward do not change vBoN's target, but KL-RL's."""
    if beta is None:
        beta = theory.find_beta(world.held_out.reward, n)
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
        optimum = theory.tilt(new_refs / beta, new_refs)
        cells = f"{'too few effective samples':>44}"
        if optimum["ess"] >= theory.MIN_SIZE:
            cells = f"{optimum['win_rate']:36.3f}{optimum['kl_ref']:8.3f}"
        print(f"  {name:29}{vbon_change:8.3g}{change.abs().max().item():8.3g}{cells}")


def check_same_ranks(name: str, reward: Tensor, refs: Tensor, new_reward: Tensor, new_refs: Tensor
                     ) -> None:
    """Raise UnusableInput if a transform maps two rewards to one, in floating point."""
    old_lt, old_le = theory.cdf_interval(reward, refs)
    new_lt, new_le = theory.cdf_interval(new_reward, new_refs)
    if not torch.equal(old_lt, new_lt) or not torch.equal(old_le, new_le):
        raise UnusableInput(f"with this reward, {name} changes how responses rank, by rounding")

# ---------------------------------------------------------------------------------- exact and bound

EDGES = (0, -8, -12, -16, -20, -24, -math.inf)          # of log π_ref(y), in nats


def study_bound(world: train.World, n: int) -> None:
    """Print how far (2) is above its bound (3), by log π_ref(y)."""
    log_cdf = vbon.empirical_cdf(world.candidates.reward, world.held_out.reward).log()
    ref_logprob = world.candidates.logprob.double()
    exact = vbon.bon_logprob(ref_logprob, log_cdf, n)
    gap = exact - vbon.bon_logprob_bound(ref_logprob, log_cdf, n)
    print(f"\nHow far is the bound from the exact form?\n\nlog π_ref(y), nats   responses   "
          f"exact (2) - bound (3) at N = {n}: mean, largest")
    for high, low in zip(EDGES, EDGES[1:]):
        chosen = gap[(ref_logprob <= high) & (ref_logprob > low)]
        if len(chosen) > 0:
            print(f"  {low:6} to {high:4}{len(chosen):15}{chosen.mean().item():22.2g}"
                  f"{chosen.max().item():12.2g}")

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


def find_other_m(rows: list[dict], n: int, made_by: dict) -> dict[int, list[dict]]:
    """Return vBoN's rows of earlier runs that differ only in M and seed: M -> rows."""
    found = {}
    for row in rows:
        # the vocabulary of another seed's text may have a token more or less
        same = all(row.get(name) == value for name, value in made_by.items()
                   if name not in ("m", "vocab"))
        if same and row["method"] == "vbon" and row["n"] == n:
            found.setdefault(row["m"], []).append(row)
    return dict(sorted(found.items()))


def study_m(path: Path, trained: dict[int, list[dict]], n: int) -> None:
    """Print and plot how M matters: errors of F, and policies trained with other M."""
    errors = [error_of_cdf(m) for m in sorted({*MS, *trained})]
    print_study_of_m(errors, trained, n)
    plot_study_of_m(path, errors, trained, n)


def print_study_of_m(errors: list[dict], trained: dict[int, list[dict]], n: int) -> None:
    """Print the errors of F for each M, and the results of policies trained with it."""
    print(f"\nHow does M matter?\n\n{'M':>5}{'RMSE of':>10}{'largest error of F':>24}"
          f"{'bound':>8}{f'vBoN, N = {n}':>19}\n"
          f"{'':5}{'log F':>10}{'mean':>14}{'95 %':>10}{'(DKW)':>8}{'win rate':>16}"
          f"{'KL to BoN':>15}{'seeds':>7}")
    for error in errors:
        m = error["m"]
        line = (f"{m:5}{error['rmse_log']:10.3f}{error['sup_mean']:14.3f}{error['sup_95']:10.3f}"
                f"{error['dkw']:8.3f}")
        if m in trained:
            for name, width in (("win_rate", 16), ("kl_bon", 15)):
                line += with_error(mean_and_spread(trained[m], name)).rjust(width)
            line += f"{len(trained[m]):7}"
        print(line)


def plot_study_of_m(path: Path, errors: list[dict], trained: dict[int, list[dict]], n: int) -> None:
    """Plot the errors of F and log F against M, and the KL to best-of-N of trained policies."""
    with report.figure(path, 3, (12, 3.6)) as axes:
        plot_panels(axes, errors, trained, n)


def plot_panels(panels: list, errors: list[dict], trained: dict[int, list[dict]], n: int) -> None:
    """Plot the three panels."""
    left, middle, right = panels
    ms = [error["m"] for error in errors]
    left.loglog(ms, [error["dkw"] for error in errors], "k:", label="bound of the 95 % (DKW)")
    left.loglog(ms, [error["sup_95"] for error in errors], "o-", label="95 % quantile")
    left.loglog(ms, [error["sup_mean"] for error in errors], "s-", label="mean")
    left.set(title="largest error of F, over all rewards")
    left.legend(frameon=False, fontsize=8)
    middle.loglog(ms, [error["rmse_log"] for error in errors], "o-")
    middle.set(title="root mean square error of log F")
    for axes, ticks in ((left, (0.04, 0.1, 0.2, 0.4)), (middle, (0.1, 0.2, 0.4))):
        axes.set_yticks(ticks, ticks)
    for m, rows in trained.items():
        kl, spread = mean_and_spread(rows, "kl_bon")
        right.errorbar(m, kl, spread, fmt="D", color="tab:red", capsize=2)
    right.set(xscale="log", title=f"KL to best of {n} after training")
    right.set(xlim=(12, 700), ylim=(0, None))
    if not trained:
        right.text(90, 0.5, "no results in --out", ha="center")
    for axes in panels:
        axes.set(xlabel="M, reference samples for each prompt")
        axes.minorticks_off()
        axes.set_xticks(MS, MS)

# ---------------------------------------------------------------------------- the cost of an update

def print_cost(layers: int, width: int, heads: int, tokens: int) -> None:
    """Time one update of 64 x 8 responses of 24 tokens on the CPU, and print the memory.

    The GPT has random weights. The smallest of three times counts: other programs only add to it.
    """
    found = cost(layers, width, heads, tokens)
    print(f"{found['weights'] / 1e6:.2f} M weights: {found['seconds']:.2f} s an update, "
          f"{found['flops'] / found['seconds'] / 1e9:.0f} GFLOP/s, "
          f"{found['memory'] / 1e9:.2f} GB at most")


def cost(layers: int, width: int, heads: int, tokens: int, updates: int = 3) -> dict[str, float]:
    """Return weights, seconds and flops (operations) of an update, and the peak memory in bytes.

    Each token of a response is sampled, scored by reference and policy, and goes backward through
    the policy: 2 + 2 + 2 + 4 operations for each weight.
    """
    import resource                                     # here, since Windows does not have it
    update, weights, flops = prepare_update(layers, width, heads, tokens, torch.device("cpu"))
    seconds = []
    for _ in range(updates):
        began = time.monotonic()
        update()
        seconds.append(time.monotonic() - began)
    return {
        "weights": weights,
        "seconds": min(seconds),
        "flops": flops,
        "memory": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,     # as Linux counts
    }


def prepare_update(layers: int, width: int, heads: int, tokens: int, device: torch.device
                   ) -> tuple[Callable[[], None], int, int]:
    """Return an update of the main job to call, with a GPT of random weights; the number of its
    weights; and the operations of an update, if all responses have their full length."""
    s = train.Settings()
    generator = torch.Generator().manual_seed(0)
    reference = GPT(tokens, s.text.prompt_tokens + s.text.length, layers, heads, width,
                    generator=generator)
    reference.untie_head()
    policy = copy.deepcopy(reference)
    trained = add_adapters(policy, s.tuning.rank, generator)
    policy.to(device)
    reference.to(device)
    optimizer = torch.optim.Adam(trained, lr=1e-5, fused=True)
    prompt = torch.randint(tokens - 1, (s.tuning.batch, s.text.prompt_tokens), generator=generator)
    ref_rewards = torch.randn(s.tuning.batch, s.samples.m, generator=generator)
    # late in training: n has its full size
    batch = train.Batch(s.tuning.steps, prompt.to(device), None, ref_rewards)
    sampling = torch.Generator(device).manual_seed(0)

    def update() -> None:
        """Run one update."""
        optimizer.zero_grad()
        train.vbon_gradient(policy, reference, any_reward, batch, 4, s.tuning, sampling)
        optimizer.step()

    weights = count_weights(reference)
    return update, weights, 10 * weights * s.tuning.batch * s.tuning.k * s.tuning.length


def any_reward(prompt: Tensor, response: Tensor) -> Tensor:  # (P, T), (P, K, L) -> (P, K)
    """Return a reward that costs nothing: the mean of the token ids modulo 7."""
    return (response % 7).double().mean(-1)

# --------------------------------------------------------------------------------- the command line

def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments of the command line. Raises UnusableInput for wrong ones."""
    parser = options.make_parser(__doc__)
    parser.add_argument("--study", nargs="+", choices=STUDIES, metavar="STUDY",
                        help=f"Which questions: {', '.join(STUDIES)}. Default: "
                        "all of them.")
    parser.add_argument("--beta", type=float, help="The beta of KL-RL in the study of the scale. "
                        "Default: the one whose optimum is as far from the reference as best-of-N.")
    parser.add_argument("--cost", type=int, nargs=4, metavar=("LAYERS", "WIDTH", "HEADS", "VOCAB"),
                        help="Instead of the questions, time an update of a GPT of this size on "
                        "the CPU, and print how much memory it takes.")
    args = parser.parse_args(argv)
    if args.beta is not None and not 1e-6 <= args.beta <= 1e6:
        raise UnusableInput(f"--beta {args.beta:g}: want a number from 1e-6 to 1e6")
    if args.sample is not None:
        raise UnusableInput("--sample: these studies train no policy")
    if args.cost is not None:
        check_cost(*args.cost)
    return args


def check_cost(layers: int, width: int, heads: int, tokens: int) -> None:
    """Raise UnusableInput for sizes that no GPT has."""
    if min(layers, width, heads) < 1 or tokens < 2:
        raise UnusableInput("--cost: want four numbers above 0, and at least 2 tokens")
    if width % heads != 0:
        raise UnusableInput(f"--cost: want a width that is a multiple of {heads} heads")


if __name__ == "__main__":
    options.run(main, "studies")
