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
from support import options, results
from support.files import UnusableInput, write_lines
from support.inputs import read_inputs
from support.kept import keep
from support.settings import choose_settings, flag, flat
from support.statistics import mean_and_error

NAMES = (*methods.METHODS, "pessimism")                 # the last one is a decoder


class Entry(NamedTuple):
    """A method that takes part in the comparison."""
    method: str
    beta: float | None
    aim: dict                           # of theory.aim_of_weights; empty if unknown
    own: OwnMethod | None = None        # if it is a file of the user
    mark: dict = {}                     # what names the code of this file in a result line


def main(argv: list[str] | None = None) -> None:
    """Train and evaluate for all seeds, N and methods; then print tables and plot a picture."""
    began = time.monotonic()
    args = parse_arguments(argv)
    own = [OwnMethod(name) for name in args.method or [] if name.endswith(".py")]
    out = Path(args.out)
    inputs = read_inputs(args)
    settings = {n: choose_settings(train.Settings(), args, n, inputs) for n in args.n}
    results.read_results(out)                           # if they are damaged, say so now
    for n in args.n:
        for name in args.method or []:
            check_method(name, n, settings[n])

    rows = []
    pool = []                                           # held-out reference rewards of all seeds
    for seed in args.seed:
        # text, reward, reference model and reference samples do not depend on N
        print(f"seed {seed}", flush=True)
        world = train.prepare(inputs, settings[args.n[0]], out / "cache", seed)
        pool.append(world.held_out.reward)
        # first all aims: if a β cannot be found, better now than after an hour
        entries = {n: find_entries(args, own, world, n, settings[n], seed) for n in args.n}
        for n in args.n:
            made_by = results.describe(settings[n], world.text, inputs, args.quick)
            lines = measure_decoding(world, entries[n], n, seed)
            for entry in entries[n]:
                if entry.method != "pessimism":         # there is nothing to train
                    tuned, evaluated = get_policy(out / "cache", world, entry, n, settings[n], seed)
                    line = train.policy_row(entry.method, world, evaluated, n, tuned["seconds"])
                    line |= decoded(evaluated["reward"], world, n)
                    line |= {"seed": seed, "beta": entry.beta} | entry.mark
                    leave_policy(out, world, tuned["policy"], evaluated, line | made_by)
                    lines.append((line, entry.aim))
            results.add_results(out, [line | made_by for line, _ in lines])
            rows += [line | beside(line, aim, world.held_out.reward) for line, aim in lines]
        results.export_model(out / f"reference-seed{seed}", world.reference, world.text.encoding,
                             lines[0][0] | made_by)

    # ---- what all of it says, over the seeds
    pool = torch.cat(pool)
    groups = summary.over_seeds(rows)
    summary.print_table(groups, pool)
    summary.print_aims(groups)
    summary.plot_results(out / "pareto.png", groups, pool)
    print(f"\n{time.monotonic() - began:.0f} s; {out}/ holds the picture pareto.png, all responses "
          f"in responses-*.jsonl,\nand all models")


def check_method(method: str, n: int, settings: train.Settings) -> None:
    """Raise UnusableInput if a method cannot be trained for this N."""
    least = {}
    if method in (*methods.FROM_WINNERS, "infalign"):   # from sets of N of the M cached responses
        least["m"] = n
    if method in methods.FROM_SETS:                     # from sets of N of the K own responses
        least["k"] = n
    if method == "pessimism":
        least["m_eval"] = n + 1
    for name, number in least.items():
        if flat(settings)[name] < number:
            raise UnusableInput(f"{method} at n = {n}: want {flag(name)} {number} or more")


def find_entries(args: argparse.Namespace, own: list[OwnMethod], world: train.World, n: int,
                 settings: train.Settings, seed: int) -> list[Entry]:
    """Return what takes part for one N and seed, with β and aims."""
    refs = world.held_out.reward
    entries = []
    for name in args.method or NAMES:
        if name.endswith(".py"):
            continue
        try:
            check_method(name, n, settings)
            entries.append(find_entry(Path(args.out, "cache"), name, refs, n, seed))
        except UnusableInput as problem:
            # a method that nobody asked for must not stop the others
            if args.method is not None:
                raise
            print(f"left out: {problem}")
    for file in own:
        weight = file.weights(refs, n)
        aim = {} if weight is None else theory.aim_of_weights(weight, n, refs)
        entries.append(Entry(file.name, None, aim, file, {"method_file": file.mark}))
    return entries


def find_entry(cache: Path, method: str, refs: Tensor, n: int, seed: int) -> Entry:
    """Return a method with its β and aim; refs: the held-out reference rewards (P', M).

    Raises UnusableInput if there is no β whose aim is as far from the reference as best-of-n.
    """
    aim = keep(cache, f"aim-{method}-n{n}-seed{seed}", theory.find_aim, method, n, refs,
               code=theory.CODE)
    return Entry(method, aim.pop("beta"), aim)


def get_policy(cache: Path, world: train.World, entry: Entry, n: int, settings: train.Settings,
               seed: int) -> tuple[dict, dict]:
    """Return what train.fine_tune and train.evaluate return, from the cache if it is there.

    The policy is on the device of the reference.
    """
    name = entry.method
    aim = f"n{n}"
    train_n = n
    if name == "kl-rl":
        # its target has no N: a policy of one β serves every N
        aim = f"beta{entry.beta:g}"
        train_n = 1
    choose = methods.choose_method if entry.own is None else entry.own.choose_method
    method = choose(name, train_n, entry.beta)
    # vBoN is the policy of train.py, from its cache if it is there
    code = train.TUNING if name == "vbon" else methods.CODE
    tuned = keep(cache, f"policy-{name}-{aim}-seed{seed}", train.fine_tune, method, train_n,
                 world.reference, world.reward, world.samples, settings.tuning, seed, code=code,
                 resumable=True)
    tuned["policy"].to(world.reference.wte.weight.device)
    evaluated = keep(cache, f"evaluation-{name}-n{n}-seed{seed}", train.evaluate, tuned["policy"],
                     world.reference, world.reward, world.held_out.prompt, settings.samples.k_eval,
                     world.text.length, f"evaluation of {name}", seed, code=train.TUNING)
    return tuned, evaluated


def measure_decoding(world: train.World, entries: list[Entry], n: int, seed: int
                     ) -> list[tuple[dict, dict]]:
    """Return lines and aims of what is not trained: reference, best-of-n, and other decoders.

    The first two are the lines that train.py writes, and the decoded win rate.
    """
    rewards = world.candidates.reward
    # the best of n responses of best-of-n is the best of n² responses
    row = train.reference_row(world, n) | decoded(rewards, world, n)
    found = [(row | {"beta": None}, {})]
    row = train.best_of_n_row(world, n, seed) | decoded(rewards, world, n, n * n)
    found.append((row | {"beta": None}, {}))
    for entry in entries:
        if entry.method == "kl-rl":                     # soft best-of-n has its β
            row, chosen = decoders.soft_best_of_n_row(world, n, entry.beta, seed)
            found.append((row | decoded(chosen, world, n) | {"beta": entry.beta}, {}))
        elif entry.method == "pessimism":
            row, chosen = decoders.pessimism_row(world, n, entry.beta, seed)
            found.append((row | decoded(chosen, world, n) | {"beta": entry.beta}, entry.aim))
    return [(row | {"seed": seed}, aim) for row, aim in found]


def decoded(reward: Tensor, world: train.World, n: int, own_n: int | None = None
            ) -> dict[str, float | None]:
    """Return win rate and standard error of the best of own_n (default: n) of these responses
    (P', K) over best-of-n of the reference; None if there are fewer responses."""
    wins = theory.decoded_win_rate(reward, world.held_out.reward, n, own_n)
    if wins is None:
        return {"decoded_win_rate": None, "decoded_win_rate_se": None}
    mean, error = mean_and_error(wins[:, None])
    return {"decoded_win_rate": mean, "decoded_win_rate_se": error}


def beside(line: dict, aim: dict, refs: Tensor) -> dict[str, float | None]:
    """Return how far a line is below the highest win rate at its KL (None: unknown), and the aim of
    its method, as aim_win_rate, aim_kl_ref, ..."""
    highest = theory.highest_win_rate(line["kl_ref"], refs)
    below = None if highest is None else highest - line["win_rate"]
    named = {f"aim_{name}": value for name, value in aim.items()}
    return named | {"below_win_rate": below, "below_win_rate_se": line["win_rate_se"]}


def leave_policy(out: Path, world: train.World, model: GPT, evaluated: dict, line: dict) -> None:
    """Write a policy as a folder, such as policy-bound-n4-seed0, and all its responses.

    vBoN's have the names that train.py gives them.
    """
    method = "" if line["method"] == "vbon" else f"{line['method']}-"
    name = f"policy-{method}n{line['n']}-seed{line['seed']}"
    encoding = world.text.encoding
    results.export_model(out / name, model, encoding, line)
    records = results.response_records(line["method"], "evaluation", world.held_out.prompt,
                                       evaluated, encoding)
    write_lines(out / f"responses-{name}.jsonl", records)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments of the command line. Raises UnusableInput for wrong ones."""
    parser = options.make_parser(__doc__, train.Settings(), several=True)
    parser.add_argument("--method", nargs="+", metavar="METHOD",
                        help=f"what to compare: {', '.join(NAMES)} (a decoder), or a file of "
                        "yours, see experiments/own_method.py (default: all that fit this N)")
    args = parser.parse_args(argv)
    args.n = list(dict.fromkeys(args.n))                # each once
    args.seed = list(dict.fromkeys(args.seed))
    taken = {"ref", "bon", "soft-bon", *NAMES}
    for name in args.method or []:
        if name.endswith(".py"):
            if Path(name).stem in taken:
                raise UnusableInput(f"--method {name}: its name is taken; rename the file")
            taken.add(Path(name).stem)
        elif name not in NAMES:
            raise UnusableInput(f"--method {name}: want {', '.join(NAMES)}, or a file NAME.py")
    return args


if __name__ == "__main__":
    options.run(main, "compare")
