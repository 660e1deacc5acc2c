"""compare.py: several N, seeds and methods, beside what theory says of each.

    python -m experiments.compare --n 4 --seed 0 1 2
    python -m experiments.compare --n 2 4 8 --method vbon kl-rl --beta 0.5 2
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
from support import options, results
from support.files import UnusableInput, write_whole
from support.inputs import read_inputs
from support.kept import keep
from support.settings import choose_settings, flag, flat
from support.statistics import mean_and_error
from support.tokenizer import decode

NAMES = (*methods.METHODS, "pessimism")                 # the last one is a decoder


class Entry(NamedTuple):
    """A method that takes part in the comparison."""
    method: str
    beta: float | None
    aim: dict                           # of theory.find_aim
    label: str                          # in names of files: with the β of --beta
    own: OwnMethod | None = None        # if it is a file of the user


class Answers(NamedTuple):
    """The responses of a method to the held-out prompts, and its row of the table."""
    entry: Entry
    row: dict
    response: Tensor                    # (P', K, L)
    reward: Tensor                      # (P', K)


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
    samples = "The number before a response is its reward.\n"
    for seed in args.seed:
        # text, reward, reference model and reference samples do not depend on N
        print(f"seed {seed}", flush=True)
        world = train.prepare(inputs, settings[args.n[0]], out / "cache", seed)
        pool.append(world.held_out.reward)
        # first all aims: if a β cannot be found, better now than after an hour
        entries = {n: find_entries(args, own, world, n, settings[n], seed) for n in args.n}
        for n in args.n:
            made_by = results.describe(settings[n], world.text, inputs, args.quick)
            made_by["seed"] = seed
            found = run_decoders(world, entries[n], n, seed)
            for entry in entries[n]:
                if entry.method != "pessimism":         # there is nothing to train
                    found.append(run_policy(out, world, entry, n, settings[n], made_by))
            lines = [complete_row(answers, world, n) | made_by for answers in found]
            results.add_results(out, lines)
            rows += [line | beside(answers, pool[-1]) for line, answers in zip(lines, found)]
            samples += sample_text(found, world, n, seed)
        results.export_model(out / f"reference-seed{seed}", world.reference, world.text.encoding,
                             lines[0])
        results.write_reference(out, world, seed)

    # ---- what all of it says, over the seeds
    pool = torch.cat(pool)
    groups = summary.over_seeds(rows)
    summary.print_table(groups, pool)
    summary.print_aims(groups)
    summary.plot_results(out / "pareto.png", groups, pool)
    write_whole(out / "samples.txt", samples.encode("utf-8"))
    print(f"\n{time.monotonic() - began:.0f} s; {out}/ holds the picture pareto.png, some "
          f"responses in samples.txt,\nand all models")


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
    cache = Path(args.out, "cache")
    entries = []
    for name in args.method or NAMES:
        if name.endswith(".py"):
            continue
        betas = args.beta if name == "kl-rl" else [None]
        try:
            check_method(name, n, settings)
            for beta in betas:
                entries.append(find_entry(cache, name, world.held_out.reward, n, seed, beta))
        except UnusableInput as problem:
            # a method that nobody asked for must not stop the others
            if args.method is not None:
                raise
            print(f"left out: {problem}")
    for file in own:
        entries.append(Entry(file.name, None, file.find_aim(world, n), file.name, file))
    return entries


def find_entry(cache: Path, method: str, refs: Tensor, n: int, seed: int, beta: float | None = None
               ) -> Entry:
    """Return a method with its β and aim; refs: the held-out reference rewards (P', M).

    Raises UnusableInput if there is no β whose aim is as far from the reference as best-of-n.
    """
    aim = keep(cache, f"aim-{method}-n{n}-seed{seed}", theory.find_aim, method, n, refs, beta,
               code=theory.CODE)
    label = method if beta is None else f"{method}-beta{beta:g}"
    return Entry(method, aim.pop("beta"), aim, label)


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


def run_policy(out: Path, world: train.World, entry: Entry, n: int, settings: train.Settings,
               made_by: dict) -> Answers:
    """Train a policy, evaluate it, and write it as a folder, such as policy-bound-n4-seed0."""
    seed = made_by["seed"]
    tuned, evaluated = get_policy(out / "cache", world, entry, n, settings, seed)
    row = train.policy_row(entry.method, world, evaluated, n, tuned["seconds"])
    answers = Answers(entry, row, evaluated["response"], evaluated["reward"])
    # vBoN's has the name that train.py gives it
    label = "" if entry.label == "vbon" else f"{entry.label}-"
    folder = out / f"policy-{label}n{n}-seed{seed}"
    line = complete_row(answers, world, n) | made_by
    results.export_model(folder, tuned["policy"], world.text.encoding, line)
    results.write_policy(out, folder.name, entry.method, world, evaluated)
    return answers


def run_decoders(world: train.World, entries: list[Entry], n: int, seed: int) -> list[Answers]:
    """Return what is not trained: reference, best-of-n, and other decoders.

    The first two have the rows that train.py writes.
    """
    c = world.candidates
    everyone = torch.arange(c.reward.shape[1]).expand_as(c.reward)
    best = train.choose_best(c, n, seed)
    found = [(Entry("ref", None, {}, "ref"), train.reference_row(world, n), everyone),
             (Entry("bon", None, {}, "bon"), train.best_of_n_row(world, n, seed), best)]
    for entry in entries:
        if entry.method == "kl-rl":                     # soft best-of-n has its β
            row, chosen = decoders.soft_best_of_n_row(world, n, entry.beta, seed)
            label = entry.label.replace("kl-rl", "soft-bon")
            found.append((entry._replace(label=label, aim={}), row, chosen))
        elif entry.method == "pessimism":
            row, chosen = decoders.pessimism_row(world, n, entry.beta, seed)
            found.append((entry, row, chosen))
    return [Answers(entry, row, methods.take(c.response, chosen), c.reward.gather(1, chosen))
            for entry, row, chosen in found]


def complete_row(answers: Answers, world: train.World, n: int) -> dict:
    """Return the row with β, and win rate and error of the best of n of these responses over
    best-of-n of the reference; None if there are fewer responses."""
    row = answers.row | {"beta": answers.entry.beta, "decoded_win_rate": None,
                         "decoded_win_rate_se": None}
    wins = theory.decoded_win_rate(answers.reward, world.held_out.reward, n)
    if wins is not None:
        row["decoded_win_rate"], row["decoded_win_rate_se"] = mean_and_error(wins[:, None])
    if answers.entry.own is not None:
        row["method_file"] = answers.entry.own.mark     # what names the code of this file
    return row


def beside(answers: Answers, refs: Tensor) -> dict[str, float | str | None]:
    """Return the label, how far a row is below the highest win rate at its KL (None: unknown), and
    the aim of its method, as aim_win_rate, aim_kl_ref, ..."""
    row = answers.row
    highest = theory.highest_win_rate(row["kl_ref"], refs)
    below = None if highest is None else highest - row["win_rate"]
    aim = {f"aim_{name}": value for name, value in answers.entry.aim.items()}
    return aim | {"label": answers.entry.label, "below_win_rate": below,
                  "below_win_rate_se": row["win_rate_se"]}


def sample_text(found: list[Answers], world: train.World, n: int, seed: int) -> str:
    """Return four held-out prompts, with a response of each method and its reward."""
    encoding = world.text.encoding
    text = f"\nN = {n}, seed {seed}\n"
    for i, prompt in enumerate(world.held_out.prompt[:4].tolist()):
        text += f"{results.one_line(decode(encoding, prompt))} ...\n"
        for answers in found:
            name = summary.title(answers.entry.label, n)
            response = decode(encoding, answers.response[i, 0].tolist())
            text += f"  {name:<20}{answers.reward[i, 0]:+6.2f}  "
            text += f"...{results.one_line(response)}\n"
    return text


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments of the command line. Raises UnusableInput for wrong ones."""
    parser = options.make_parser(__doc__, train.Settings(), several=True)
    parser.add_argument("--method", nargs="+", metavar="METHOD",
                        help=f"what to compare: {', '.join(NAMES)} (a decoder), or a file of "
                        "yours, see experiments/own_method.py (default: all that fit this N)")
    parser.add_argument("--beta", nargs="+", type=float, default=[None], metavar="B",
                        help="the β of kl-rl, one or several (default: as far from the reference "
                        "as best-of-N)")
    args = parser.parse_args(argv)
    for name in ("n", "seed", "beta"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))       # each once
    for beta in args.beta:
        if beta is not None and not 1e-6 <= beta <= 1e6:
            raise UnusableInput(f"--beta {beta:g}: want 1e-6 to 1e6")
    if args.beta != [None] and args.method is not None and "kl-rl" not in args.method:
        raise UnusableInput("--beta: it belongs to kl-rl, which --method leaves out")
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
