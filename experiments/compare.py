"""compare.py: several N, seeds and methods, beside what theory says of each.

    python -m experiments.compare --n 4 --seed 0 1 2
    python -m experiments.compare --n 2 4 8 --seed 0 1 2 --method vbon kl-rl
    python -m experiments.compare --method vbon FILE.py     a method of yours: see own_method.py

Run it from the folder of train.py. It has the stages, the flags, the cache and the result lines of
train.py. For each seed: text, reward, reference samples; then for each N: fine-tuning, evaluation.
"""
import argparse
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import train
from experiments import decoders, methods, summary, theory
from experiments.own_method import OwnMethod
from model import GPT
from support import options, report, results
from support.files import UnusableInput, write_lines, write_whole
from support.inputs import read_inputs
from support.kept import keep
from support.settings import choose_settings
from support.statistics import mean_and_error

NAMES = (*methods.METHODS, "pessimism")                 # the last one is a decoder

# ------------------------------------------------------------------------------------- the main job

class Entry(NamedTuple):
    """A method that takes part in the comparison."""
    method: str
    folder: str                         # a part of the names of what is left in --out
    beta: float | None = None
    aim: dict = {}                      # as theory.aim_of_weights; empty if unknown
    own: OwnMethod | None = None        # if it is a file of the user


class Policy(NamedTuple):
    """A trained policy, and what train.evaluate has found."""
    entry: Entry
    model: GPT
    seconds: float
    evaluated: dict


def main(argv: list[str] | None = None) -> None:
    """Train and evaluate for all seeds, N and methods; then print tables and plot a picture."""
    began = time.monotonic()
    args = parse_arguments(argv)
    own = [OwnMethod(name) for name in args.method or [] if name.endswith(".py")]
    out = Path(args.out)
    inputs = read_inputs(args)
    settings = {n: choose_settings(train.Settings(), args, n, inputs) for n in args.n}
    chosen = {n: choose_methods(args, n, settings[n]) for n in args.n}
    results.read_results(out)                           # if they are damaged, say so now

    rows = []
    pool = []                                           # held-out reference rewards of all seeds
    samples = ""
    for seed in args.seed:
        # text, reward, reference model and reference samples do not depend on N
        print(f"seed {seed}", flush=True)
        world = train.prepare(inputs, settings[args.n[0]], out / "cache", seed)
        pool.append(world.held_out.reward)
        # first all aims: if a β cannot be found, better now than after an hour
        entries = {n: find_entries(args, chosen[n], own, world, n, seed) for n in args.n}
        for n in args.n:
            made_by = results.describe(settings[n], world.text, inputs, args.quick)
            lines = measure_decoding(world, entries[n], n, seed)
            policies = []
            for entry in entries[n]:
                if entry.method == "pessimism":         # nothing to train
                    continue
                policy = get_policy(out / "cache", world, entry, n, settings[n], seed)
                policies.append(policy)
                line = policy_line(world, policy, n, seed)
                lines.append((line, entry.aim))
                leave_policy(out, world, policy, line | made_by)
            results.add_results(out, [line | made_by for line, _ in lines])
            results.export_model(out / f"reference-seed{seed}", world.reference,
                                 world.text.encoding, lines[0][0] | made_by)
            samples += sample_text(world, policies, n, seed)
            rows += [line | beside(line, aim, world.held_out.reward) for line, aim in lines]

    # ---- what all of it says, over the seeds
    write_whole(out / "samples.txt", samples.encode("utf-8"))
    pool = torch.cat(pool)
    groups = summary.over_seeds(rows, args.beta is not None)
    summary.print_table(groups, pool)
    summary.print_aims(groups)
    summary.plot_results(out / "pareto.png", groups, pool)
    if args.quick:
        print("\n--quick shows only that the program runs: its models are hardly trained.")
    print(f"\n{time.monotonic() - began:.0f} s; {out}/ holds the picture pareto.png, some responses "
          f"in samples.txt\nand all in responses-*.jsonl, and all models")

# ------------------------------------------------------------------------- the methods and their β

def choose_methods(args: argparse.Namespace, n: int, settings: train.Settings) -> list[str]:
    """Return the methods for one N: those of --method, or all that can be trained for this N.

    Raises UnusableInput for a method of --method that cannot.
    """
    if not args.quick:
        report.note_small_m(settings.samples.m, n)
    chosen = []
    for name in args.method or NAMES:
        if name.endswith(".py"):
            continue
        wanted = misfit(name, n, settings)
        if wanted is None:
            chosen.append(name)
        elif args.method is not None:
            raise UnusableInput(f"--n {n}: {wanted}")
        else:
            print(f"left out for N = {n}: {wanted}")
    return chosen


def misfit(method: str, n: int, settings: train.Settings) -> str | None:
    """Return why a method cannot be trained for this N, and what to do, or None if it can."""
    sizes = settings.samples
    if method in (*methods.FROM_WINNERS, "infalign") and n > sizes.m:
        return f"{method} needs n different reference samples; give --m {n} or more"
    if method in methods.FROM_SETS and n > settings.tuning.k:
        return f"{method} needs n responses to a prompt in an update; give --k {n} or more"
    if method == "pessimism" and n >= sizes.m_eval:
        return f"{method} needs more than n candidates; give --m-eval {n + 1} or more"
    return None


def find_entries(args: argparse.Namespace, names: list[str], own: list[OwnMethod],
                 world: train.World, n: int, seed: int) -> list[Entry]:
    """Return what takes part for one N and seed, with β and aims."""
    refs = world.held_out.reward
    entries = []
    for name in names:
        betas = [None]
        if name == "kl-rl" and args.beta is not None:
            betas = args.beta
        for beta in betas:
            try:
                entries.append(find_entry(Path(args.out, "cache"), name, refs, n, seed, beta))
            except UnusableInput as problem:
                # a method that nobody asked for must not stop the others
                if args.method is not None:
                    raise
                print(f"left out: {problem}")
    for file in own:
        weight = file.weights(refs, n)
        aim = {} if weight is None else theory.aim_of_weights(weight, n, refs)
        entries.append(Entry(file.name, file.name, None, aim, file))
    return entries


def find_entry(cache: Path, method: str, refs: Tensor, n: int, seed: int,
               beta: float | None = None) -> Entry:
    """Return a method with its aim; refs: the held-out reference rewards (P', M).

    A β that is not given is the one whose aim is as far from the reference as best-of-n. Raises
    UnusableInput if there is none.
    """
    aim = keep(cache, f"aim-{method}-n{n}-seed{seed}", theory.find_aim, method, n, refs, beta,
               code=theory.CODE)
    folder = method if beta is None else f"{method}-beta{beta:g}"
    return Entry(method, folder, aim.pop("beta"), aim)

# ------------------------------------------------------------------------ fine-tuning, evaluation

def get_policy(cache: Path, world: train.World, entry: Entry, n: int, settings: train.Settings,
               seed: int) -> Policy:
    """Fine-tune with one method and evaluate, or take both from the cache."""
    name = entry.method
    aim = f"n{n}"
    code = methods.CODE
    if entry.own is not None:
        method = entry.own.method(n)
    elif name == "vbon":
        # the policy of train.py, from its cache if it is there
        method = methods.choose_method(name, n, None)
        code = train.TUNING
    elif name == "kl-rl":
        # its target has no N: a policy of one β serves every N
        method = methods.choose_method(name, 1, entry.beta)
        aim = f"beta{entry.beta:g}"
    else:
        method = methods.choose_method(name, n, entry.beta)
    tuned = keep(cache, f"policy-{name}-{aim}-seed{seed}", train.fine_tune, method,
                 1 if name == "kl-rl" else n, world.reference, world.reward, world.samples,
                 settings.tuning, seed, code=code, resumable=True)
    model = tuned["policy"].to(world.reference.wte.weight.device)
    evaluated = keep(cache, f"evaluation-{name}-n{n}-seed{seed}", train.evaluate, model,
                     world.reference, world.reward, world.held_out.prompt, settings.samples.k_eval,
                     world.text.length, name, seed, code=train.TUNING)
    return Policy(entry, model, tuned["seconds"], evaluated)


def policy_line(world: train.World, policy: Policy, n: int, seed: int) -> dict:
    """Return the line of a policy; vBoN's is the one that train.py writes."""
    entry = policy.entry
    row = train.policy_row(entry.method, world, policy.evaluated, n, policy.seconds)
    row |= decoded(policy.evaluated["reward"], world, n) | {"seed": seed, "beta": entry.beta}
    if entry.own is not None:
        row["method_file"] = entry.own.mark
    return row


def measure_decoding(world: train.World, entries: list[Entry], n: int, seed: int
                     ) -> list[tuple[dict, dict]]:
    """Return lines and aims of what is not trained: reference, best-of-n, and other decoders.

    The first two are the lines that train.py writes, and the decoded win rate.
    """
    rewards = world.candidates.reward
    # the best of n responses of best-of-n is the best of n² responses
    found = [(train.reference_row(world, n) | decoded(rewards, world, n), None, {}),
             (train.best_of_n_row(world, n, seed) | decoded(rewards, world, n, n * n), None, {})]
    for entry in entries:
        if entry.method == "kl-rl":
            row, chosen = decoders.soft_best_of_n_row(world, n, entry.beta, seed)
            found.append((row | decoded(chosen, world, n), entry.beta, {}))
        elif entry.method == "pessimism":
            row, chosen = decoders.pessimism_row(world, n, entry.beta, seed)
            found.append((row | decoded(chosen, world, n), entry.beta, entry.aim))
    return [(row | {"seed": seed, "beta": beta}, aim) for row, beta, aim in found]


def decoded(reward: Tensor, world: train.World, n: int, own_n: int | None = None
            ) -> dict[str, float | None]:
    """Return how often the best of own_n (default: n) of these responses (P', K) beats best-of-n of
    the reference: win rate and its standard error. None if there are fewer responses."""
    wins = theory.decoded_win_rate(reward, world.held_out.reward, n, own_n)
    if wins is None:
        return {"decoded_win_rate": None, "decoded_win_rate_se": None}
    mean, error = mean_and_error(wins[:, None])
    return {"decoded_win_rate": mean, "decoded_win_rate_se": error}


def beside(line: dict, aim: dict, refs: Tensor) -> dict[str, float | None]:
    """Return how far a line is below the highest win rate at its KL (None: too few samples), and
    the aim of its method, as aim_win_rate, aim_kl_ref, ..."""
    highest = theory.highest_win_rate(line["kl_ref"], refs)
    below = None if highest is None else highest - line["win_rate"]
    named = {f"aim_{name}": value for name, value in aim.items()}
    return named | {"below_win_rate": below, "below_win_rate_se": line["win_rate_se"]}

# --------------------------------------------------------------------------------- what is left

def leave_policy(out: Path, world: train.World, policy: Policy, line: dict) -> None:
    """Write a policy as a folder, such as policy-bound-n4-seed0, and all its responses.

    vBoN's have the names that train.py gives them.
    """
    name = f"n{line['n']}-seed{line['seed']}"
    if policy.entry.method != "vbon":
        name = f"{policy.entry.folder}-{name}"
    encoding = world.text.encoding
    results.export_model(out / f"policy-{name}", policy.model, encoding, line)
    records = results.response_records(policy.entry.method, "evaluation", world.held_out.prompt,
                                       policy.evaluated, encoding)
    write_lines(out / f"responses-policy-{name}.jsonl", records)


def sample_text(world: train.World, policies: list[Policy], n: int, seed: int) -> str:
    """Return some prompts with a response of the reference, of best-of-n and of each policy."""
    models = [("reference", world.reference, 1), (f"best of {n}", world.reference, n)]
    for policy in policies:
        models.append((summary.title(policy.entry.method, n), policy.model, 1))
    prompts = world.held_out.prompt[:8].to(world.reference.wte.weight.device)
    text = results.sample_text(world.text.encoding, prompts, world.reward, models,
                               world.text.length, seed)
    return f"N = {n}, seed {seed}\n\n{text}\n"

# --------------------------------------------------------------------------------- the command line

def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments of the command line. Raises UnusableInput for wrong ones."""
    parser = options.make_parser(__doc__, train.Settings(), several=True)
    parser.add_argument("--method", nargs="+", metavar="METHOD",
                        help=f"What to compare: {', '.join(NAMES)}, or a file of yours (see "
                        "experiments/own_method.py). Pessimism is a decoder. Default: all that fit "
                        "this N.")
    parser.add_argument("--beta", type=float, nargs="+", help="The beta of kl-rl, one or several. "
                        "A smaller one goes further away from the reference. Default: for each N "
                        "the beta whose optimum is as far away as best-of-N.")
    args = parser.parse_args(argv)
    for name in ("n", "seed", "method", "beta"):        # each once
        if getattr(args, name) is not None:
            setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    taken = {"ref", "bon", "soft-bon", *NAMES}
    for name in args.method or []:
        if name.endswith(".py"):
            if Path(name).stem in taken:
                raise UnusableInput(f"--method {name}: its name is taken; rename the file")
            taken.add(Path(name).stem)
        elif name not in NAMES:
            raise UnusableInput(f"--method {name}: want {', '.join(NAMES)}, or a file NAME.py")
    for beta in args.beta or []:
        if args.method is not None and "kl-rl" not in args.method:
            raise UnusableInput("--beta: it belongs to kl-rl; add this to --method")
        if not 1e-6 <= beta <= 1e6:
            raise UnusableInput(f"--beta {beta:g}: want a number from 1e-6 to 1e6")
    return args


if __name__ == "__main__":
    options.run(main, "compare")
