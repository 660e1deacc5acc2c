"""Tables and a picture over several N and seeds, for compare.py."""
import math
from pathlib import Path

from torch import Tensor

import vbon
from experiments import methods, theory
from support import report

TRAINED = ("vbon", *methods.METHODS)
NAMES = {"ref": "reference", "bon": "best of {n}", "soft-bon": "soft best of {n}",
         "pessimism": "pessimism", "vbon": "vBoN", "bound": "vBoN bound", "kl-rl": "KL-RL",
         "infalign-ctrl": "InfAlign-CTRL", "wind": "WIND", "max-at-k": "max@{n}",
         "max-at-k-win": "max@{n} of win rate", "infalign": "InfAlign", "bon-sft": "BoN-SFT",
         "bond": "BOND's Jeffreys", "bonbon": "BoNBoN"}

# ----------------------------------------------------------------------------- tables over seeds

Groups = dict[tuple, list[dict]]


def over_seeds(rows: list[dict], beta_given: bool) -> Groups:
    """Group rows that differ only in their seed: (n, method, β) -> rows.

    A β that was not given is found for each seed, and is not part of the key.
    """
    groups = {}
    for row in rows:
        given = beta_given and row["method"] in ("kl-rl", "soft-bon")
        beta = row["beta"] if given else None
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


def title(method: str, n: int | str) -> str:
    """Return the name of a method in tables and samples."""
    return NAMES.get(method, method).format(n=n)


def print_table(groups: Groups, ns: list[int], pool: Tensor) -> None:
    """Print means over the seeds; under each N, what best-of-N attains in theory."""
    print(f"\n{'':20}{'reward':>13}{'win rate':>14}{'KL to ref':>14}{'KL to BoN':>14}"
          f"{'best of N of it':>16}{'positive':>9}{'samples':>8}  beta")
    seeds = max(len(rows) for rows in groups.values())
    for n in ns:
        for (at, method, _), rows in groups.items():
            if at != n:
                continue
            # a row for each method, a column for each metric
            cells = ""
            for name, width in (("reward", 14), ("win_rate", 14), ("kl_ref", 14), ("kl_bon", 14),
                                ("decoded_win_rate", 16)):
                cells += with_error(mean_and_spread(rows, name)).rjust(width)
            positive, _ = mean_and_spread(rows, "positive")
            beta = ""
            if rows[0]["beta"] is not None:
                beta = f"{mean_and_spread(rows, 'beta')[0]:.3g}"
            if len(rows) < seeds:                       # no β could be found for the others
                beta += f"  ({len(rows)} of {seeds} seeds)"
            print(f"{title(method, n):19}{cells}{positive:9.2f}{rows[0]['samples_per_answer']:8}"
                  f"  {beta}".rstrip())
        # with the held-out rewards of all seeds
        kl, win = vbon.bon_attains(pool, n)
        reward = theory.bon_expected_reward(pool, n).mean().item()
        kl = "" if math.isnan(kl) else f"{kl:.3f}"
        print(f"{f'theory, N = {n}':19}{number(reward):>7}{win:14.3f}{kl:>14}{0:14.3f}")
    print("\nKLs in nats per response. ±: the larger of standard deviation over seeds and "
          "standard error.\nBest of N of it: how often the best of N responses of this row beats "
          "the best of N of the\nreference.")


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
    trained = {key: rows for key, rows in groups.items() if key[1] in TRAINED}
    if not trained:
        return
    print(f"\n{'':26}{'aim: win':>9}{'KL to':>7}{'KL to':>7}{'best':>7}"
          f"{'win rate below highest':>25}{'reward below highest':>25}\n"
          f"{'':26}{'rate':>9}{'ref':>7}{'BoN':>7}{'of N':>7}{'by aim':>11}{'by training':>14}"
          f"{'by aim':>11}{'by training':>14}")
    for (n, method, beta), rows in trained.items():
        cells = ""
        columns = (("aim_win_rate", 9), ("aim_kl_ref", 7), ("aim_kl_bon", 7),
                   ("aim_decoded_win_rate", 7), ("aim_below_win_rate", 11), ("left_win_rate", 14),
                   ("aim_below_reward", 11), ("left_reward", 14))
        for name, width in columns:
            found = mean_and_spread(rows, name)
            cell = "" if found is None else f"{found[0]:.3f}"
            cells += cell.rjust(width)
        if beta is not None:
            cells += f"  beta={beta:g}"
        print(f"{title(method, n):19} N={n:<4}{cells}".rstrip())
    print("\nThe highest: the best of all policies with the same KL to the reference. Blank: too "
          "few\neffective samples. By training: what training left undone, and chance.")
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
    """Print rankings: nearest to best-of-N; least below the highest reward and win rate."""
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

STYLES = {"bon": ("o", "tab:blue"), "soft-bon": ("o", "tab:cyan"), "pessimism": ("s", "tab:cyan"),
          "vbon": ("D", "tab:red"), "bound": ("^", "tab:orange"), "bond": ("X", "tab:brown"),
          "bon-sft": ("P", "tab:purple"), "bonbon": ("*", "tab:pink"), "kl-rl": ("v", "tab:green"),
          "wind": ("<", "tab:olive"), "max-at-k-win": (">", "tab:gray"),
          "infalign-ctrl": ("h", "black"), "infalign": ("p", "black"),
          "max-at-k": ("d", "tab:gray")}
LINES = (("best-of-n", ".", "tab:blue", "best of 1, 2, 3, ..., in theory"),
         ("win_rate", ":", "black", "highest win rate at a KL"),
         ("reward", "--", "tab:green", "highest reward at a KL: optimum of KL-RL"))


def plot_results(path: Path, rows: list[dict], ns: list[int], beta_given: bool, pool: Tensor
                 ) -> None:
    """Plot all results beside theory: above on two planes, below a strip for each quantity."""
    # Seeds have other texts and classifiers: each has its own zero of the reward.
    own = {row["seed"]: row["reward"] for row in rows if row["method"] == "ref"}
    shifted = [row | {"reward": row["reward"] - own[row["seed"]]} for row in rows]
    groups = over_seeds(shifted, beta_given)
    reach = 1.15 * max(row["kl_ref"] for row in rows) + 0.1
    with report.figure(path, 3, (14, 9), rows=2) as axes:
        plot_planes(axes[:2], groups, reach, pool)
        for n in ns:
            kl, win = vbon.bon_attains(pool, n)
            axes[0].annotate(f"N = {n}", (kl, win), (-10, 8), ha="right",
                             textcoords="offset points", fontsize=9)
        handles, labels = axes[0].get_legend_handles_labels()
        axes[2].legend(handles, labels, loc="center left", frameon=False, fontsize=9)
        axes[2].set_axis_off()
        plot_strips(axes[3:], groups, ns)


def styles(groups: Groups) -> dict[str, tuple[str, str]]:
    """Return marker and color of each method; a method of yours gets one too."""
    own = [method for _, method, _ in groups if method not in STYLES and method != "ref"]
    return STYLES | {method: ("$?$", "tab:pink") for method in own}


def plot_planes(planes: list, groups: Groups, reach: float, pool: Tensor) -> None:
    """Plot win rate and reward against the KL to the reference, up to the KL `reach`."""
    curves = theory.curves(pool)
    for axes, plane in zip(planes, ("win_rate", "reward")):
        zero = pool.double().mean().item() if plane == "reward" else 0.0
        # theory
        for name, line, color, label in LINES:
            near = [point for point in curves[name] if point["kl_ref"] < reach]
            axes.plot([point["kl_ref"] for point in near], [point[plane] - zero for point in near],
                      line, color=color, lw=1, label=label)
        # what was measured; the strips below show the errors
        for method, (marker, color) in styles(groups).items():
            label = title(method, "N")
            for (_, other, _), group in groups.items():
                if other != method:
                    continue
                kl, _ = mean_and_spread(group, "kl_ref")
                height, _ = mean_and_spread(group, plane)
                axes.plot(kl, height, marker=marker, ls="none", color=color, ms=6, alpha=0.8,
                          label=label)
                label = None                            # one entry in the legend for each method
        axes.set(xlabel="KL to the reference, nats per response")
    planes[0].set(ylabel="win rate over the reference", title="What best-of-N aims for")
    planes[1].set(ylabel="reward, above that of the reference", title="What KL-RL aims for")


STRIPS = (("kl_bon", "KL to best-of-N"),
          ("below_win_rate", "win rate below the highest at its KL"),
          ("decoded_win_rate", "win rate if decoded by best-of-N"))


def plot_strips(strips: list, groups: Groups, ns: list[int]) -> None:
    """Plot three quantities of each trained method: measured, and that of its aim, for each N."""
    looks = styles(groups)
    present = {method for _, method, _ in groups}
    shown = [method for method in looks if method in present and method in TRAINED]
    for axes, (name, heading) in zip(strips, STRIPS):
        for (n, method, _), rows in groups.items():
            if method not in shown:
                continue
            # the first method on top; several N a little below each other
            height = -shown.index(method) - 0.6 * ns.index(n) / len(ns)
            _, color = looks[method]
            found = mean_and_spread(rows, name)
            if found is not None:
                mean, error = found
                axes.errorbar(mean, height, xerr=error, fmt="o", color=color, ms=5, capsize=2)
            wanted = mean_and_spread(rows, f"aim_{name}")
            if wanted is not None:
                axes.plot(wanted[0], height, "|", color="black", ms=14, mew=1.5)
        axes.set(title=heading, xlabel="|: the aim of the method    o: trained")
        axes.set_yticks([-i for i in range(len(shown))], [""] * len(shown))
        axes.grid(axis="y", lw=0.3)
    names = [title(method, "N") for method in shown]
    strips[0].set_yticks([-i for i in range(len(shown))], names)
