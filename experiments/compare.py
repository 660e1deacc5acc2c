"""compare.py: several N, seeds and methods, beside what theory says of each.

    python -m experiments.compare --n 4 --seed 0 1 2
    python -m experiments.compare --n 2 4 8 --seed 0 1 2 --method vbon kl-rl

Run it from the folder of train.py. It has the stages, the flags, the cache and the result lines of
train.py. For each seed: text, reward, reference samples; then for each N: fine-tuning, evaluation.
"""
import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import train
import vbon
from experiments import decoders, methods, summary, theory
from model import GPT
from support.huggingface import load_model
from support import code, options, report, results
from support.files import UnusableInput, read_json
from support.files import write_whole
from support.inputs import read_inputs
from support.kept import keep, rebuild_model
from support.seeding import seeded_generator
from support.settings import check_settings, choose_settings
from support.statistics import mean_and_error

code.read_source(__file__)

TRAINED = summary.TRAINED
DECODERS = ("pessimism",)               # soft best-of-n comes with kl-rl, whose β it has

# ------------------------------------------------------------------------------------- the main job

def main(argv: list[str] | None = None) -> None:
    """Train and evaluate for all seeds, N and methods; then print tables and plot a picture."""
    began = time.monotonic()
    args = parse_arguments(argv)
    out = Path(args.out)
    inputs = read_inputs(args, args.n, all_folders(args, out))
    settings = {n: choose_settings(train.Settings(), args, n, inputs) for n in args.n}
    for n in args.n:
        check_arguments(args, n, settings[n])
    chosen = {n: choose_methods(args, n, settings[n]) for n in args.n}

    rows = []
    pool = []                                           # held-out reference rewards of all seeds
    samples = ""
    for seed in args.seed:
        # text, reference model, reward and reference samples do not depend on N
        print(f"seed {seed}", flush=True)
        n = max(args.n)
        count = sum(name in TRAINED for names in chosen.values() for name in names)
        world = train.prepare(args, inputs, settings[n], n, seed, count)
        length = world.settings.text.length
        settings = {n: settings[n].change(length=length) for n in args.n}
        pool.append(world.held_out.reward)
        # first all β: if one cannot be found, better now than after an hour
        betas = {n: choose_betas(args, chosen[n], n, world.held_out.reward) for n in args.n}
        for n in args.n:
            policies = get_policies(args, out, world, n, betas[n], settings[n], seed)
            if world.prompt is not None:
                print(sample_text(world, policies, world.prompt, n, settings[n], seed))
                continue
            made_by = results.describe(settings[n], world.text, inputs, train.STAGES)
            untrained = measure_decoding(world, n, betas[n], seed, made_by)
            trained, rewards = measure_policies(out, world, policies, n, settings[n], seed, made_by)
            results.add_results(out, untrained + trained)
            for policy, row in zip(policies, trained):
                beta = policy.beta if args.beta is not None else None
                folder = policy_folder(out, policy.method, n, seed, beta)
                results.export_model(folder, policy.model, world.text.encoding, row)
            rows += untrained
            for row, reward in zip(trained, rewards):
                rows.append(row | distances(row, reward, world.held_out.reward))
            prompts = world.held_out.prompt[:8]
            samples += sample_text(world, policies, prompts, n, settings[n], seed) + "\n"
        if world.prompt is None:
            results.export_model(out / f"reference-seed{seed}", world.reference,
                                 world.text.encoding, untrained[0])
    if args.sample is not None:
        return

    # ---- what all of it says, over the seeds
    write_whole(out / "samples.txt", samples.encode("utf-8"))
    pool = torch.cat(pool)
    groups = summary.over_seeds(rows, args.beta is not None)
    summary.print_table(groups, args.n, pool)
    summary.print_comparison(groups, args.n)
    summary.plot_results(out / "pareto.png", rows, args.n, args.beta is not None, pool)
    print(f"\n{time.monotonic() - began:.0f} s; {out}/ holds the picture pareto.png, responses in "
          f"samples.txt,\nand all models")


def policy_folder(out: Path, method: str, n: int, seed: int, beta: float | None = None) -> Path:
    """Return the folder of a policy: policy-n4-seed0 as in train.py, policy-bound-n4-seed0, ...

    beta: that of --beta, if it was given.
    """
    if method == "vbon":
        return out / f"policy-n{n}-seed{seed}"
    if method == "kl-rl" and beta is not None:
        return out / f"policy-kl-rl-beta{beta:g}-seed{seed}"
    return out / f"policy-{method}-n{n}-seed{seed}"


def find_policy(out: Path, method: str, n: int, seed: int, made_by: dict) -> GPT | None:
    """Return the policy that an earlier run with the same settings has left in `out`, if any."""
    folder = policy_folder(out, method, n, seed)
    if not (folder / "settings.json").is_file():
        return None
    settings = read_json(folder / "settings.json")
    if any(settings.get(key) != value for key, value in made_by.items()):
        print(f"  {folder} was made with other settings: it is left out")
        return None
    return load_model(folder)


def all_folders(args: argparse.Namespace, out: Path) -> list[Path]:
    """Return the folders of all models that a run exports."""
    folders = []
    for seed in args.seed:
        folders.append(out / f"reference-seed{seed}")
        for n in args.n:
            for method in args.method or TRAINED:
                for beta in args.beta or [None]:
                    folders.append(policy_folder(out, method, n, seed, beta))
    return folders


Betas = dict[str, list]


def choose_methods(args: argparse.Namespace, n: int, settings: train.Settings) -> list[str]:
    """Return the methods for one N: those of --method, or all that can be trained for this N."""
    if args.method is not None:
        return args.method
    fit = []
    for name in (*TRAINED, *DECODERS):
        wanted = misfit(name, n, settings)
        if wanted is None:
            fit.append(name)
        else:
            print(f"left out for N = {n}: {wanted}")
    return fit


def misfit(method: str, n: int, settings: train.Settings) -> str | None:
    """Return why a method cannot be trained for this N, or None if it can."""
    if method in methods.FROM_WINNERS and n > settings.samples.m:
        return f"{method} wants at most {settings.samples.m}, the number of cached responses"
    if method in methods.FROM_SETS and n > settings.tuning.k:
        return f"{method} wants at most {settings.tuning.k}, the number of responses in an update"
    if method == "infalign" and n > settings.samples.m:
        return f"{method} wants at most {settings.samples.m}, the number of reference rewards"
    if method == "pessimism" and n >= settings.samples.m_eval:
        return f"{method} wants less than {settings.samples.m_eval}, the number of candidates"
    return None


def choose_betas(args: argparse.Namespace, names: list[str], n: int, held_rewards: Tensor) -> Betas:
    """Return the values of β for one N, by method: the one whose aim is as far from the reference
    as best-of-n; of kl-rl those of --beta, if given. [None] for methods that have none."""
    betas = {}
    for method in names:
        if method not in theory.WITH_BETA:
            betas[method] = [None]
            continue
        if method == "kl-rl" and args.beta is not None:
            betas[method] = args.beta
            continue
        try:
            betas[method] = [theory.find_beta(held_rewards, n, method)]
        except UnusableInput as problem:
            # a method that nobody asked for must not stop the others
            if args.method is not None:
                raise
            print(f"left out {method}: {problem}")
    return betas


class Policy(NamedTuple):
    """A trained policy."""
    method: str
    beta: float | None
    model: GPT
    seconds: float


def get_policies(args: argparse.Namespace, out: Path, world: train.World, n: int,
                 betas: Betas, settings: train.Settings, seed: int) -> list[Policy]:
    """Fine-tune with each method and β."""
    policies = []
    for name in TRAINED:
        for beta in betas.get(name, []):
            policies.append(get_policy(out, name, beta, world, n, settings, seed))
    return policies


def get_policy(out: Path, name: str, beta: float | None, world: train.World, n: int,
               settings: train.Settings, seed: int) -> Policy:
    """Fine-tune with one method, or take the policy from the cache."""
    aim = f"n{n}"
    code_used = ("vbon",)
    if name == "vbon":
        # the policy of train.py, from its cache if it is there
        method = train.Method(f"vBoN n={n}", ("vbon", n), train.vbon_gradient)
    else:
        code_used = ("experiments.theory", *code_used)
        if name == "kl-rl":
            # its target has no N: a policy of one β serves every N
            aim = f"beta{beta:g}"
            n = 1
        method = methods.choose_method(name, n, beta)
    tuned = keep(out / "cache", f"policy-{name}-{aim}-seed{seed}", train.fine_tune, method, n,
                 world.reference, world.reward, world.samples, settings.tuning, seed,
                 code=code_used, resumable=True)
    model = rebuild_model(tuned, world.reference.wte.weight.device)
    return Policy(name, beta, model, tuned["seconds"])

# ----------------------------------------------------------------------------------- the evaluation

def measure_decoding(world: train.World, n: int, betas: Betas, seed: int, made_by: dict
                     ) -> list[dict]:
    """Return the lines of what is not trained: reference, best-of-n, and other decoders.

    The first two are the lines that train.py writes, and the decoded win rate.
    """
    ours = {"seed": seed, "beta": None} | made_by
    rewards = world.candidates.reward
    # the best of n responses of best-of-n is the best of n² responses
    rows = [train.reference_row(world, n) | decoded(rewards, world, n) | ours,
            train.best_of_n_row(world, n, seed) | decoded(rewards, world, n, n * n) | ours]
    for name, choose in (("kl-rl", soft_best_of_n_row), ("pessimism", pessimism_row)):
        for beta in betas.get(name, []):
            row = choose(world, n, beta, seed)
            rows.append(row | {"seed": seed, "beta": beta} | made_by | mark())
    return rows


def decoded(reward: Tensor, world: train.World, n: int, own_n: int | None = None
            ) -> dict[str, float | None]:
    """Return how often the best of own_n (default: n) of these responses (P', K) beats best-of-n of
    the reference: win rate and its standard error. None if there are fewer responses."""
    wins = theory.decoded_win_rate(reward, world.held_out.reward, n, own_n)
    if wins is None:
        return {"decoded_win_rate": None, "decoded_win_rate_se": None}
    mean, error = mean_and_error(wins[:, None])
    return {"decoded_win_rate": mean, "decoded_win_rate_se": error}


def measure_policies(out: Path, world: train.World, policies: list[Policy], n: int,
                     settings: train.Settings, seed: int, made_by: dict
                     ) -> tuple[list[dict], list[Tensor]]:
    """Evaluate the policies: return their lines, and the rewards (P', K) of each.

    vBoN's line is the one that train.py writes.
    """
    rows = []
    rewards = []
    for policy in policies:
        name = policy.method
        evaluated = evaluate_policy(out, name, policy.model, world, n, settings, seed)
        row = train.policy_row(name, world, evaluated, n, policy.seconds)
        row = row | decoded(evaluated["reward"], world, n)
        row = row | {"seed": seed, "beta": policy.beta} | made_by
        if name != "vbon":
            row = row | mark()
        rows.append(row)
        rewards.append(evaluated["reward"])
    return rows, rewards


def evaluate_policy(out: Path, name: str, model: GPT, world: train.World, n: int,
                    settings: train.Settings, seed: int) -> dict:
    """Return what train.evaluate does, from the cache if it is there."""
    return keep(out / "cache", f"evaluation-{name}-n{n}-seed{seed}", train.evaluate, model,
                world.reference, world.reward, world.held_out.prompt, settings.evaluation,
                name, seed)


def mark() -> dict[str, str]:
    """Return what names the code of the other methods in their lines."""
    return {"experiments": results.code_mark(("experiments.decoders", "experiments.methods",
                                              "experiments.theory", measure_decoding,
                                              measure_policies))}


def soft_best_of_n_row(world: train.World, n: int, beta: float, seed: int) -> dict:
    """Return the row of soft best-of-N, really sampled: n candidates give one response."""
    candidates = world.candidates
    generator = seeded_generator("cpu", "soft best", n, beta, seed)
    # the same groups of n candidates as for best-of-N
    chosen = choose_in_groups(candidates.reward, n,
                              lambda groups: decoders.soft_best_of_n(groups, beta, generator))
    reward = candidates.reward.gather(1, chosen)
    ref_logprob = candidates.logprob.gather(1, chosen)
    # the rivals are other samples than those that were chosen from
    own = decoders.soft_bon_logprob(ref_logprob, reward, world.held_out.reward, n, beta)
    row = train.decoded_row("soft-bon", world, n, chosen, own)
    return row | decoded(reward, world, n)


def pessimism_row(world: train.World, n: int, beta: float, seed: int) -> dict:
    """Return the row of InferenceTimePessimism on the win rate, really sampled: the first of n
    candidates that is accepted, else one more."""
    candidates = world.candidates
    refs = world.held_out.reward
    size = n + 1
    ref_wins = vbon.win_rate(refs, refs)
    ref_chance = decoders.pessimism_chance(ref_wins, ref_wins, beta)
    chance = decoders.pessimism_chance(vbon.win_rate(candidates.reward, refs), ref_wins, beta)
    generator = seeded_generator("cpu", "pessimism", n, beta, seed)
    chosen = choose_in_groups(chance, size,
                              lambda groups: decoders.pessimism_choice(groups, generator))
    own = decoders.pessimism_logprob(candidates.logprob.gather(1, chosen),
                                     chance.gather(1, chosen), ref_chance, n)
    row = train.decoded_row("pessimism", world, n, chosen, own)
    # on average; the first that is accepted ends it
    row["samples_per_answer"] = round((chosen % size + 1).double().mean().item(), 1)
    return row | decoded(candidates.reward.gather(1, chosen), world, n)


def choose_in_groups(values: Tensor, size: int, choose: Callable) -> Tensor:  # (P, M) -> (P, G)
    """Return the index, among all M, of the one that is chosen in each group of `size` of them.

    choose takes groups (P·G, size) and returns indices (P·G,).
    """
    P, M = values.shape
    G = M // size
    groups = values[:, :G * size].reshape(P * G, size)
    return choose(groups).view(P, G) + size * torch.arange(G)


def sample_text(world: train.World, policies: list[Policy], prompts: Tensor, n: int,
                settings: train.Settings, seed: int) -> str:
    """Return each prompt with a response of the reference, of best-of-n and of each policy."""
    models = [("reference", world.reference, 1), (f"best of {n}", world.reference, n)]
    for policy in policies:
        models.append((summary.title(policy.method, n), policy.model, 1))
    prompts = prompts.to(world.reference.wte.weight.device)
    text = report.sample_text(world.text.encoding, prompts, world.reward, models,
                              settings.text.length, seed)
    return f"N = {n}, seed {seed}\n\n{text}"


def distances(row: dict, reward: Tensor, held_rewards: Tensor) -> dict[str, float | None]:
    """Return how far a row, and the aim of its method, are below the highest at their KL.

    reward (P', K) are the rewards of its responses, held_rewards (P', M) those of the reference.
    For win_rate and reward: `below_*` of the row; `aim_below_*` of the aim; their difference
    `left_*`, which training left undone. Also the aim itself: aim_win_rate, aim_kl_ref, aim_kl_bon.
    None where too few effective samples are left.
    """
    aim = None
    if row["method"] in theory.KNOWN:
        aim = theory.aim(row["method"], row["n"], row["beta"], held_rewards)
    found = {}
    for plane in ("win_rate", "reward"):
        below = below_highest(plane, row, held_rewards)
        aim_below = below_highest(plane, aim, held_rewards)
        known = below is not None and aim_below is not None
        found[f"below_{plane}"] = below
        found[f"aim_below_{plane}"] = aim_below
        found[f"left_{plane}"] = below - aim_below if known else None
    found["below_win_rate_se"] = row["win_rate_se"]
    if found["below_reward"] is not None:
        found["below_reward_se"] = error_of_distance(row, reward, held_rewards)
    for name in ("win_rate", "kl_ref", "kl_bon", "decoded_win_rate"):
        found[f"aim_{name}"] = None if aim is None else aim[name]
    return found


def error_of_distance(row: dict, reward: Tensor, held_rewards: Tensor) -> float:
    """Return the standard error of `below_reward`, over prompts.

    Some prompts have high rewards with any policy. So the difference to the highest is taken for
    each prompt separately: it varies far less than the rewards.
    """
    weight = theory.highest_weights("reward", row["kl_ref"], held_rewards)
    highest = (weight * held_rewards.double()).sum(-1, keepdim=True)        # (P', 1)
    per_prompt = (highest - reward.double()).mean(1)
    return (per_prompt.std() / math.sqrt(len(per_prompt))).item()


def below_highest(plane: str, point: dict | None, held_rewards: Tensor) -> float | None:
    """Return how far a point is below the highest win rate or reward at its KL, or None."""
    if point is None:
        return None
    highest = theory.highest(plane, point["kl_ref"], held_rewards)
    if highest is None:
        return None
    return highest - point[plane]

# --------------------------------------------------------------------------------- the command line

def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments of the command line. Raises UnusableInput for wrong ones."""
    parser = options.make_parser(__doc__, several=True)
    names = (*TRAINED, *DECODERS)
    parser.add_argument("--method", nargs="+", choices=names, metavar="METHOD",
                        help=f"What to compare: {', '.join(names)}. The last one is a decoder. "
                        "Default: all that fit this N.")
    parser.add_argument("--beta", type=float, nargs="+", help="The beta of kl-rl, one or several. "
                        "A smaller one goes further away from the reference. Default: for each N "
                        "the beta whose optimum is as far away as best-of-N.")
    args = parser.parse_args(argv)
    args.n = list(dict.fromkeys(args.n))                # each once
    args.seed = list(dict.fromkeys(args.seed))
    if args.method is not None:
        args.method = list(dict.fromkeys(args.method))
    if args.beta is not None:
        args.beta = list(dict.fromkeys(args.beta))
    return args


def check_arguments(args: argparse.Namespace, n: int, settings: train.Settings) -> None:
    """Raise UnusableInput for values that do not fit text, model or methods."""
    check_settings(settings, args, n)
    for method in args.method or []:
        wanted = misfit(method, n, settings)
        if wanted is not None:
            raise UnusableInput(f"--n {n}: {wanted}")
    if args.beta is None:
        return
    if args.method is not None and "kl-rl" not in args.method:
        raise UnusableInput("--beta: it belongs to kl-rl; add this to --method")
    if min(args.n) <= 8 < max(args.n):
        raise UnusableInput("--beta: N above 8 takes more updates; give them a call of their own")
    for beta in args.beta:
        if not 1e-6 <= beta <= 1e6:
            raise UnusableInput(f"--beta {beta:g}: want a number from 1e-6 to 1e6")


if __name__ == "__main__":
    options.run(main, "compare")
