"""compare.py: several N, seeds and methods, beside what theory says of each.

    python -m experiments.compare --n 2 4 8 --seed 0 1 2 --method vbon bound kl-rl bon-sft bond

Run it from the folder of train.py. It has the stages, the flags, the cache and the result lines of
train.py. For each seed: text, reward, reference samples; then for each N: fine-tuning, evaluation.
"""
import argparse
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import train
import vbon
from experiments import methods, theory
from model import GPT
from support import code, options, report, results
from support.errors import UnusableInput
from support.files import write_whole
from support.inputs import Inputs, read_inputs
from support.kept import keep, rebuild_model
from support.seeding import seeded_generator
from support.settings import check_settings, choose_settings

code.read_source(__file__)

TRAINED = ("vbon", *methods.METHODS)
NAMES = {"ref": "reference", "bon": "best of {n}", "soft-bon": "soft best of {n}", "vbon": "vBoN",
         "bound": "vBoN bound", "kl-rl": "KL-RL", "bon-sft": "BoN-SFT", "bond": "BOND's Jeffreys"}

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

    rows = []
    pool = []                                           # held-out reference rewards of all seeds
    samples = ""
    for seed in args.seed:
        # text, reference model, reward and reference samples do not depend on N
        print(f"seed {seed}", flush=True)
        n = max(args.n)
        count = len(args.n) * len(args.method)
        world = train.prepare(args, inputs, settings[n], n, seed, count)
        length = world.settings.text.length
        settings = {n: settings[n].change(length=length) for n in args.n}
        pool.append(world.held_out.reward)
        # first all β: if one cannot be found, better now than after an hour
        betas = {n: choose_betas(args, n, world.held_out.reward) for n in args.n}
        for n in args.n:
            policies = get_policies(args, out, world, n, betas[n], settings[n], seed)
            if world.prompt is not None:
                print(sample_text(world, policies, world.prompt, n, settings[n], seed))
                continue
            made_by = results.describe(settings[n], world.text, inputs, train.STAGES)
            decoded = measure_decoding(world, n, betas[n], seed, made_by)
            trained, rewards = measure_policies(out, world, policies, n, settings[n], seed, made_by)
            results.add_results(out, decoded + trained)
            for policy, row in zip(policies, trained):
                folder = policy_folder(args, out, policy.method, n, policy.beta, seed)
                results.export_model(folder, policy.model, world.text.encoding, row)
            rows += decoded
            for row, reward in zip(trained, rewards):
                rows.append(row | distances(row, reward, world.held_out.reward))
            prompts = world.held_out.prompt[:8]
            samples += sample_text(world, policies, prompts, n, settings[n], seed) + "\n"
        if world.prompt is None:
            results.export_model(out / f"reference-seed{seed}", world.reference,
                                 world.text.encoding, decoded[0])
    if args.sample is not None:
        return

    # ---- what all of it says, over the seeds
    write_whole(out / "samples.txt", samples.encode("utf-8"))
    pool = torch.cat(pool)
    groups = over_seeds(rows, args.beta is not None)
    print_table(groups, args.n, pool)
    print_comparison(groups, args.n)
    plot_results(out / "pareto.png", rows, args.n, args.beta is not None, pool)
    print(f"\n{time.monotonic() - began:.0f} s; {out}/ holds the picture pareto.png, responses in "
          f"samples.txt,\nand all models")


def policy_folder(args: argparse.Namespace, out: Path, method: str, n: int, beta: float | None,
                  seed: int) -> Path:
    """Return the folder of a policy: policy-n4-seed0 as in train.py, policy-bound-n4-seed0, ..."""
    if method == "vbon":
        return out / f"policy-n{n}-seed{seed}"
    if method == "kl-rl" and args.beta is not None:
        return out / f"policy-kl-rl-beta{beta:g}-seed{seed}"
    return out / f"policy-{method}-n{n}-seed{seed}"


def all_folders(args: argparse.Namespace, out: Path) -> list[Path]:
    """Return the folders of all models that a run exports."""
    folders = []
    for seed in args.seed:
        folders.append(out / f"reference-seed{seed}")
        for n in args.n:
            for method in args.method:
                for beta in args.beta or [None]:
                    folders.append(policy_folder(args, out, method, n, beta, seed))
    return folders


def choose_betas(args: argparse.Namespace, n: int, held_rewards: Tensor) -> list[float]:
    """Return the values of β for one N: those of --beta, or the one that goes as far as best-of-n."""
    if "kl-rl" not in args.method:
        return []
    if args.beta is not None:
        return args.beta
    return [theory.find_beta(held_rewards, n)]


class Policy(NamedTuple):
    """A trained policy."""
    method: str
    beta: float | None
    model: GPT
    seconds: float


def get_policies(args: argparse.Namespace, out: Path, world: train.World, n: int,
                 betas: list[float], settings: train.Settings, seed: int) -> list[Policy]:
    """Fine-tune with each method and β."""
    policies = []
    for name in TRAINED:
        if name not in args.method:
            continue
        # only KL-RL has a β; the others are trained once for each N
        for beta in betas if name == "kl-rl" else [None]:
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

def measure_decoding(world: train.World, n: int, betas: list[float], seed: int, made_by: dict
                     ) -> list[dict]:
    """Return the lines of what is not trained: reference, best-of-n, soft best-of-n.

    The first two are the lines that train.py writes.
    """
    ours = {"seed": seed, "beta": None} | made_by
    rows = [train.reference_row(world, n) | ours, train.best_of_n_row(world, n, seed) | ours]
    for beta in betas:
        row = soft_best_of_n_row(world, n, beta, seed)
        rows.append(row | {"seed": seed, "beta": beta} | made_by | mark())
    return rows


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
        evaluated = keep(out / "cache", f"evaluation-{name}-n{n}-seed{seed}", train.evaluate,
                         policy.model, world.reference, world.reward, world.held_out.prompt,
                         settings.evaluation, name, seed)
        row = train.policy_row(name, world, evaluated, n, policy.seconds)
        row = row | {"seed": seed, "beta": policy.beta} | made_by
        if name != "vbon":
            row = row | mark()
        rows.append(row)
        rewards.append(evaluated["reward"])
    return rows, rewards


def mark() -> dict[str, str]:
    """Return what names the code of the other methods in their lines."""
    return {"experiments": results.code_mark(("experiments.methods", "experiments.theory",
                                              measure_decoding, measure_policies))}


def soft_best_of_n_row(world: train.World, n: int, beta: float, seed: int) -> dict:
    """Return the row of soft best-of-N, really sampled: n candidates give one response."""
    candidates = world.candidates
    P, M = candidates.reward.shape
    # the same groups of n candidates as for best-of-N
    G = M // n
    groups = candidates.reward[:, :G * n].reshape(P * G, n)
    generator = seeded_generator("cpu", "soft best", n, beta, seed)
    chosen = methods.soft_best_of_n(groups, beta, generator).view(P, G) + n * torch.arange(G)
    reward = candidates.reward.gather(1, chosen)
    ref_logprob = candidates.logprob.gather(1, chosen)
    # the rivals are other samples than those that were chosen from
    own = methods.soft_bon_logprob(ref_logprob, reward, world.held_out.reward, n, beta)
    return train.decoded_row("soft-bon", world, n, chosen, own)


def sample_text(world: train.World, policies: list[Policy], prompts: Tensor, n: int,
                settings: train.Settings, seed: int) -> str:
    """Return each prompt with a response of the reference, of best-of-n and of each policy."""
    models = [("reference", world.reference, 1), (f"best of {n}", world.reference, n)]
    for policy in policies:
        models.append((title(policy.method, n), policy.model, 1))
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
    for name in ("win_rate", "kl_ref", "kl_bon"):
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

# ----------------------------------------------------------------------------- tables over seeds

Groups = dict[tuple, list[dict]]


def over_seeds(rows: list[dict], beta_given: bool) -> Groups:
    """Group rows that differ only in their seed: (n, method, β) -> rows.

    If β was not given, each seed has found its own, and β is not part of the key.
    """
    groups = {}
    for row in rows:
        beta = row["beta"] if beta_given else None
        groups.setdefault((row["n"], row["method"], beta), []).append(row)
    return groups


def mean_and_spread(rows: list[dict], name: str) -> tuple[float, float] | None:
    """Return the mean over seeds, and the larger of two errors; None if a value is unknown.

    One is the standard deviation over the seeds, which for three seeds can be far too small by
    chance. The other is the standard error of a row over its prompts, which ignores training.
    """
    values = [row[name] for row in rows]
    if None in values:
        return None
    mean = sum(values) / len(values)
    spread = sum(row.get(name + "_se", 0.0) for row in rows) / len(rows)
    if len(values) > 1:
        variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
        spread = max(spread, math.sqrt(variance))
    return mean, spread


def title(method: str, n: int) -> str:
    """Return the name of a method in tables and samples."""
    return NAMES[method].format(n=n)


def print_table(groups: Groups, ns: list[int], pool: Tensor) -> None:
    """Print means over the seeds; under each N, what best-of-N attains in theory."""
    print(f"\n{'':17}{'reward':>13}{'win rate':>14}{'KL to ref':>14}{'KL to BoN':>14}"
          f"{'positive':>9}{'samples':>8}  beta")
    for n in ns:
        for (at, method, _), rows in groups.items():
            if at != n:
                continue
            # a row for each method, a column for each metric
            cells = ""
            for name in ("reward", "win_rate", "kl_ref", "kl_bon"):
                cells += with_error(mean_and_spread(rows, name)).rjust(14)
            positive, _ = mean_and_spread(rows, "positive")
            beta = ""
            if rows[0]["beta"] is not None:
                beta = f"{mean_and_spread(rows, 'beta')[0]:.3g}"
            print(f"{title(method, n):16}{cells}{positive:9.2f}{rows[0]['samples_per_answer']:8}"
                  f"  {beta}".rstrip())
        # with the held-out rewards of all seeds
        kl, win = vbon.bon_attains(pool, n)
        reward = theory.bon_expected_reward(pool, n).mean().item()
        kl = "" if math.isnan(kl) else f"{kl:.3f}"
        print(f"{f'theory, N = {n}':16}{number(reward):>7}{win:14.3f}{kl:>14}{0:14.3f}")
    print("\nKLs in nats per response. ±: the larger of standard deviation over seeds and "
          "standard error.")


def with_error(found: tuple[float, float] | None) -> str:
    """Format a number and its ±; empty if it is unknown."""
    if found is None:
        return ""
    mean, spread = found
    return f"{number(mean)} ±{number(spread)}"


def number(x: float) -> str:
    """Format a number with three decimals, or very large and very small ones with three digits."""
    if x != 0 and not 1e-4 <= abs(x) < 1e5:
        return f"{x:.2g}"
    return f"{x:.3f}"


def print_comparison(groups: Groups, ns: list[int]) -> None:
    """Print each method's aim, how far below the highest at its KL it ends, and a ranking."""
    print(f"\n{'':22}{'aim: win':>9}{'KL to':>7}{'KL to':>7}{'win rate below highest':>25}"
          f"{'reward below highest':>25}\n"
          f"{'':22}{'rate':>9}{'ref':>7}{'BoN':>7}{'by aim':>11}{'by training':>14}"
          f"{'by aim':>11}{'by training':>14}")
    trained = {key: rows for key, rows in groups.items() if key[1] in TRAINED}
    for (n, method, beta), rows in trained.items():
        cells = ""
        columns = (("aim_win_rate", 9), ("aim_kl_ref", 7), ("aim_kl_bon", 7),
                   ("aim_below_win_rate", 11), ("left_win_rate", 14), ("aim_below_reward", 11),
                   ("left_reward", 14))
        for name, width in columns:
            found = mean_and_spread(rows, name)
            cell = "" if found is None else f"{found[0]:.3f}"
            cells += cell.rjust(width)
        if beta is not None:
            cells += f"  beta={beta:g}"
        print(f"{title(method, n):15} N={n:<4}{cells}".rstrip())
    print("\nThe highest: the best of all policies with the same KL to the reference. Blank: too few"
          "\neffective samples. By training: what training left undone, and chance.")
    for n in ns:
        rivals = {key: rows for key, rows in trained.items() if key[0] == n}
        if len(rivals) > 1:
            print_verdict(n, rivals)
    print("\nTo be fair: the KL to best-of-N is what vBoN itself minimises, and KL-RL aims "
          "elsewhere. The\nlearning rate and the rank of the adapters were chosen for vBoN. All "
          "take the same number of\nupdates, not the same work. A beta that was not given is "
          "fitted to the evaluation's prompts.")
    if any(key[1] == "bond" for key in trained):
        print("BOND's Jeffreys: its Jeffreys loss with N fixed, without its iteration and moving "
              "anchor.")


def print_verdict(n: int, rivals: Groups) -> None:
    """Print who is nearest to best-of-N, and who has most reward and wins at its own KL."""
    print(f"\nN = {n}, from best to worst; * means: within the errors of the best")
    for name, heading in (("kl_bon", "KL to best-of-N"),
                          ("below_reward", "reward below the highest at its KL"),
                          ("below_win_rate", "win rate below the highest at its KL")):
        known = []
        for (_, method, beta), rows in rivals.items():
            found = mean_and_spread(rows, name)
            if found is not None:
                label = title(method, n) if beta is None else f"{title(method, n)} beta={beta:g}"
                known.append((*found, label))
        # by mean, the smallest first
        known.sort()
        if not known:
            continue
        print(f"  {heading}")
        best, error, _ = known[0]
        for mean, spread, label in known:
            mark = "*" if mean - best <= math.hypot(spread, error) else " "
            print(f"    {with_error((mean, spread)):>14} {mark} {label}")

# -------------------------------------------------------------------------------------- the picture

STYLES = {"bon": ("o", "tab:blue"), "soft-bon": ("o", "tab:cyan"), "vbon": ("D", "tab:red"),
          "bound": ("^", "tab:orange"), "kl-rl": ("v", "tab:green"), "bon-sft": ("P", "tab:purple"),
          "bond": ("X", "tab:brown")}
LINES = (("best-of-n", ".", "tab:blue", "best of 1, 2, 3, ..., in theory"),
         ("win_rate", ":", "black", "highest win rate at a KL"),
         ("reward", "--", "tab:green", "highest reward at a KL: optimum of KL-RL"))


def plot_results(path: Path, rows: list[dict], ns: list[int], beta_given: bool, pool: Tensor
                 ) -> None:
    """Plot win rate and reward against the KL to the reference: theory (lines), results (points)."""
    # Seeds have other texts and classifiers: each has its own zero of the reward.
    own = {row["seed"]: row["reward"] for row in rows if row["method"] == "ref"}
    shifted = [row | {"reward": row["reward"] - own[row["seed"]]} for row in rows]
    groups = over_seeds(shifted, beta_given)
    reach = 1.15 * max(row["kl_ref"] for row in rows) + 0.1
    with report.figure(path, 2, (11, 4.6)) as planes:
        plot_planes(planes, groups, reach, pool)
        for n in ns:
            kl, win = vbon.bon_attains(pool, n)
            planes[0].annotate(f"N = {n}", (kl, win), (-10, 8), ha="right",
                               textcoords="offset points", fontsize=9)


def plot_planes(planes: list, groups: Groups, reach: float, pool: Tensor) -> None:
    """Plot the two planes, up to the KL `reach`."""
    curves = theory.curves(pool)
    for axes, plane in zip(planes, ("win_rate", "reward")):
        zero = pool.double().mean().item() if plane == "reward" else 0.0
        # theory
        for name, line, color, label in LINES:
            near = [point for point in curves[name] if point["kl_ref"] < reach]
            axes.plot([point["kl_ref"] for point in near], [point[plane] - zero for point in near],
                      line, color=color, lw=1, label=label)
        # what was measured, with the errors of both coordinates
        for method, (marker, color) in STYLES.items():
            label = NAMES[method].format(n="N")
            for (_, other, _), group in groups.items():
                if other != method:
                    continue
                kl, kl_error = mean_and_spread(group, "kl_ref")
                height, error = mean_and_spread(group, plane)
                axes.errorbar(kl, height, error, kl_error, fmt=marker, color=color, ms=6,
                              mfc="none", capsize=2, lw=1, label=label)
                label = None                            # one entry in the legend for each method
        axes.set(xlabel="KL to the reference, nats per response")
    planes[0].set(ylabel="win rate over the reference", title="What best-of-N aims for")
    planes[1].set(ylabel="reward, above that of the reference", title="What KL-RL aims for")
    planes[1].legend(loc="lower right", frameon=False, fontsize=8)

# --------------------------------------------------------------------------------- the command line

def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments of the command line. Raises UnusableInput for wrong ones."""
    parser = options.make_parser(__doc__, several=True)
    parser.add_argument("--method", nargs="+", choices=TRAINED, default=list(TRAINED),
                        metavar="METHOD", help=f"What to train: {', '.join(TRAINED)}. "
                        "Default: all of them.")
    parser.add_argument("--beta", type=float, nargs="+", help="The beta of kl-rl, one or several. "
                        "A smaller one goes further away from the reference. Default: for each N "
                        "the beta whose optimum is as far away as best-of-N.")
    args = parser.parse_args(argv)
    args.n = list(dict.fromkeys(args.n))                # each once
    args.seed = list(dict.fromkeys(args.seed))
    if args.beta is not None:
        args.beta = list(dict.fromkeys(args.beta))
    return args


def check_arguments(args: argparse.Namespace, n: int, settings: train.Settings) -> None:
    """Raise UnusableInput for values that do not fit text, model or methods."""
    check_settings(settings, args, n)
    for method in methods.FROM_WINNERS:
        if method in args.method and n > settings.samples.m:
            raise UnusableInput(f"--n {n}: {method} wants at most {settings.samples.m}, the number of "
                                f"cached responses; raise --m")
    if args.beta is None:
        return
    if "kl-rl" not in args.method:
        raise UnusableInput("--beta: only kl-rl has a beta; add it to --method")
    for beta in args.beta:
        if not 1e-6 <= beta <= 1e6:
            raise UnusableInput(f"--beta {beta:g}: want a number from 1e-6 to 1e6")


if __name__ == "__main__":
    options.run(main, "compare")
