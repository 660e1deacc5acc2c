"""Tables and a picture over several N and seeds, for compare.py."""
import math
from pathlib import Path

from torch import Tensor

from experiments import theory
from support import report
from support.statistics import bon_attains

NAMES = {"ref": "reference", "bon": "best of {n}", "soft-bon": "soft best of {n}",
         "pessimism": "pessimism", "vbon": "vBoN", "bound": "vBoN bound", "kl-rl": "KL-RL",
         "infalign-ctrl": "InfAlign-CTRL", "wind": "WIND", "max-at-k": "max@{n}",
         "max-at-k-win": "max@{n} of win rate", "infalign": "InfAlign", "bon-sft": "BoN-SFT",
         "bond": "BOND's Jeffreys", "bonbon": "BoNBoN"}

Groups = dict[tuple[int, str], list[dict]]               # (n, label) -> rows, one a seed


def over_seeds(rows: list[dict]) -> Groups:
    """Group rows that differ only in their seed, by N and label."""
    groups = {}
    for row in rows:
        groups.setdefault((row["n"], row["label"]), []).append(row)
    return groups


def mean_and_spread(rows: list[dict], name: str) -> tuple[float, float] | None:
    """Return the mean over seeds, and the larger of two errors; None if a value is unknown.

    One is the standard deviation over the seeds, which for three seeds can be far too small by
    chance. The other is the standard error of a row over its prompts, which ignores training.
    """
    values = [row.get(name) for row in rows]
    if None in values:
        return None
    mean = sum(values) / len(values)
    spread = sum(row.get(name + "_se", 0.0) for row in rows) / len(rows)
    if len(values) > 1:
        variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
        spread = max(spread, math.sqrt(variance))
    return mean, spread


def title(label: str, n: int | str) -> str:
    """Return the name of a method in tables and pictures."""
    return NAMES.get(label, label).format(n=n)


def cells(rows: list[dict], columns: dict[str, int]) -> str:
    """Return the means and errors of these columns, each with its width."""
    line = ""
    for name, width in columns.items():
        found = mean_and_spread(rows, name)
        line += ("" if found is None else f"{found[0]:.3f} ±{found[1]:.3f}").rjust(width)
    return line


def print_table(groups: Groups, pool: Tensor) -> None:
    """Print means over the seeds; under each N, what best-of-N attains in theory (pool: the
    held-out reference rewards of all seeds)."""
    columns = {"reward": 14, "win_rate": 14, "kl_ref": 14, "kl_bon": 14, "below_win_rate": 15,
               "decoded_win_rate": 16}
    print(f"\n{'':20}{'reward':>13} {'win rate':>14}{'KL to ref':>14}{'KL to BoN':>14}"
          f"{'below highest':>15}{'best of N of it':>16}{'samples':>8}  beta")
    seeds = max(len(rows) for rows in groups.values())
    for n in sorted({n for n, _ in groups}):
        for (at, label), rows in groups.items():
            if at != n:
                continue
            line = f"{title(label, n):20}" + cells(rows, columns)
            line += f"{mean_and_spread(rows, 'samples_per_answer')[0]:8.3g}"
            if rows[0]["beta"] is not None:
                line += f"  {mean_and_spread(rows, 'beta')[0]:.3g}"
            if len(rows) < seeds:                       # no β could be found for the others
                line += f"  ({len(rows)} of {seeds} seeds)"
            print(line)
        kl, win = bon_attains(pool, n)
        reward = theory.bon_expected_reward(pool, n).mean().item()
        kl = "" if math.isnan(kl) else f"{kl:.3f}"
        print(f"{f'theory, N = {n}':20}{reward:7.3f}{win:15.3f}{kl:>14}{0:14.3f}")
    print("\nKLs in nats per response. ±: the larger of standard deviation over seeds and "
          "standard error.\nBelow highest: how far the win rate is below that of the best policy "
          "with this KL to the\nreference. Best of N of it: how often the best of N responses of "
          "this row beats the best of N\nof the reference. All methods take the same number of "
          "updates, not the same work.")


def print_aims(groups: Groups) -> None:
    """Print what each method aims at: aim_win_rate, aim_kl_ref, ... of its rows."""
    columns = {"win_rate": 11, "kl_ref": 11, "kl_bon": 11, "below_win_rate": 15,
               "decoded_win_rate": 16}
    print(f"\n{'the aim of':20}{'win rate':>11}{'KL to ref':>11}{'KL to BoN':>11}"
          f"{'below highest':>15}{'best of N of it':>16}")
    for (n, label), rows in groups.items():
        if mean_and_spread(rows, "aim_win_rate") is None:
            continue                                    # too few effective samples
        line = f"{title(label, n):20}"
        for name, width in columns.items():
            line += f"{mean_and_spread(rows, f'aim_{name}')[0]:{width}.3f}"
        print(f"{line}  N = {n}")


STRIPS = (("kl_bon", "KL to best-of-N", "nats per response"),
          ("below_win_rate", "Win rate below the highest at its KL", "win rate"),
          ("decoded_win_rate", "Win rate if decoded by best-of-N", "win rate"))
MARKERS = "osD^v"                                       # of the first N, the second, ...
# those of best-of-N and KL-RL are hollow in the plane, since others may lie on them
SYMBOLS = {"ref": ("s", "black", 7), "bon": ("o", "tab:blue", 15), "vbon": ("D", "tab:red", 7),
           "kl-rl": ("v", "tab:green", 12)}
OWN = ("tab:orange", "tab:purple", "tab:brown", "tab:cyan")     # methods that are not in NAMES


def plot_results(path: Path, groups: Groups, pool: Tensor) -> None:
    """Plot strips, with a line for each method, and the plane of win rate and KL; pool as above."""
    lines = in_order(groups)
    with report.figure(path, 2, (13, 4 + 0.56 * len(lines)), rows=2) as axes:
        for strip, quantity in zip(axes, STRIPS):
            plot_strip(strip, groups, lines, quantity)
        plot_plane(axes[3], groups, pool)
        # what the marks mean: above the nearest methods, the right of the first strip is empty
        axes[0].plot([], [], "|", color="black", ms=12, mew=2, label="the aim")
        for n, marker in zip(sorted({n for n, _ in groups}), MARKERS):
            axes[0].plot([], [], marker, color="0.4", ms=6, label=f"measured, N = {n}")
        axes[0].legend(loc="upper right", fontsize=10)


def in_order(groups: Groups) -> list[str]:
    """Return the methods, the nearest to best-of-N first (at the largest N)."""
    distance = {}
    for n, label in sorted(groups):
        if label != "ref":
            distance[label], _ = mean_and_spread(groups[n, label], "kl_bon")
    return sorted(distance, key=distance.get)


def choose_color(label: str, lines: list[str]) -> str:
    """Return the color of a method: one of the plane's, grey, or a free one for one of yours."""
    if label in SYMBOLS:
        return SYMBOLS[label][1]
    if label in NAMES:
        return "0.4"
    own = [line for line in lines if line not in NAMES]
    return OWN[own.index(label) % len(OWN)]


def plot_strip(axes, groups: Groups, lines: list[str], quantity: tuple[str, str, str]) -> None:
    """Plot one quantity of each method, measured and aimed at, for each N."""
    column, heading, unit = quantity
    ns = sorted({n for n, _ in groups})
    for (n, label), rows in groups.items():
        measured = mean_and_spread(rows, column)
        if label == "ref" or measured is None:
            continue
        # several N a little below each other
        i = ns.index(n)
        height = lines.index(label) + 0.7 * (i + 0.5) / len(ns) - 0.35
        color = choose_color(label, lines)
        axes.errorbar(measured[0], height, xerr=measured[1], fmt=MARKERS[i % len(MARKERS)],
                      color=color, ms=6, capsize=3, lw=1.5)
        aim = mean_and_spread(rows, f"aim_{column}")
        if aim is not None:
            axes.plot(aim[0], height, "|", color="black", ms=24 / len(ns) ** 0.5, mew=2)
    axes.set_title(heading, fontsize=13)
    axes.set_xlabel(unit, fontsize=11)
    axes.locator_params(axis="x", nbins=6)
    axes.set_ylim(len(lines) - 0.4, -0.6)               # the first method on top
    axes.set_yticks(range(len(lines)), [title(label, "N") for label in lines], fontsize=11)
    axes.grid(axis="y", lw=0.4)


def plot_plane(axes, groups: Groups, pool: Tensor) -> None:
    """Plot win rate against KL: the curves of theory, best-of-N, vBoN and KL-RL."""
    for name, (marker, color, size) in SYMBOLS.items():
        found = [rows for rows in groups.values() if rows[0]["method"] == name]
        kls = [mean_and_spread(rows, "kl_ref")[0] for rows in found]
        wins = [mean_and_spread(rows, "win_rate")[0] for rows in found]
        fill = "none" if name in ("bon", "kl-rl") else color
        axes.plot(kls, wins, marker, color=color, ms=size, mfc=fill, mew=1.5,
                  label=title(name, "N"))
    kls, wins = zip(*[bon_attains(pool, n) for n in range(1, 33)])
    axes.plot(kls, wins, ".", color="tab:blue", label="best of 1, 2, 3, ..., in theory")
    tilts = [theory.aim_weights("highest", 1, 10 / 1.1 ** i, pool) for i in range(60)]
    highest = [theory.attained(weight, pool) for weight in tilts]
    axes.plot([point["kl_ref"] for point in highest], [point["win_rate"] for point in highest],
              color="black", lw=1, label="highest win rate at a KL")
    # the curves go on
    reach = 1.3 * max(mean_and_spread(rows, "kl_ref")[0] for rows in groups.values())
    axes.set_xlim(-0.05 * reach, reach)
    axes.set_title("Win rate and KL to the reference", fontsize=13)
    axes.set_xlabel("KL to the reference, nats per response", fontsize=11)
    axes.set_ylabel("win rate over the reference", fontsize=11)
    axes.legend(frameon=False, loc="lower right", fontsize=10)
