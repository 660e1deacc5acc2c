"""What a person reads and looks at: progress lines, the table, the picture."""
import contextlib
import io
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from support.files import write_whole
from support.statistics import bon_attains, share_of_ties

_last_line = {"at": 0.0}                                # when the last progress line was printed


def show_progress(label: str, done: int, total: int, began: float, stats: dict | None = None
                  ) -> None:
    """Print a progress line with an estimate of the time: in a terminal one that changes, in a file
    the first one, one for each quarter of the work, and at least one in 30 seconds."""
    now = time.monotonic()
    live = sys.stdout.isatty()
    due = done == 1 or done * 4 // total > (done - 1) * 4 // total
    if not live and not due and now - max(began, _last_line["at"]) < 30:
        return
    _last_line["at"] = now
    line = f"  {label} {done}/{total}"
    for name, value in (stats or {}).items():
        line += f"  {name} {value:.2f}"
    line += f"  {now - began:.0f} of {(now - began) / done * total:.0f} s"
    end = "\r" if live and done < total else "\n"
    print(f"{line:79.79}" if live else line, end=end, flush=True)


def title(method: str, n: int) -> str:
    """Return the name of a method in tables and pictures."""
    names = {"ref": "reference", "bon": f"best of {n}", "vbon": "vBoN"}
    return names.get(method, method)


def print_table(rows: list[dict], ref_rewards: Tensor, length: int) -> None:
    """Print the rows, and what best-of-N attains in theory with the held-out ref_rewards (P, M).

    length: the largest number of tokens of a response.
    """
    print(f"\n{'':14}{'reward':>7}{'win rate':>13}{'KL to ref':>14}{'KL to BoN':>14}"
          f"{'positive':>9}{'samples':>8}")
    for row in rows:
        line = f"{title(row['method'], row['n']):13}{row['reward']:#8.3g}"
        for name, width in (("win_rate", 13), ("kl_ref", 14), ("kl_bon", 14)):
            cell = f"{row[name]:.3f} ±{row[name + '_se']:.3f}"
            line += cell.rjust(width)
        print(line + f"{row['positive']:9.2f}{row['samples_per_answer']:8}")
    n = rows[0]["n"]
    kl, win = bon_attains(ref_rewards, n)
    kl = "too few" if math.isnan(kl) else f"{kl:.3f}"
    print(f"{f'theory, n = {n}':21}{win:6.3f}{kl:>14}{0:14.3f}")
    if kl == "too few":
        print(f"\ntoo few: in theory, best of {n} keeps a handful of the {ref_rewards.shape[1]} "
              f"samples of a prompt.")
    ties = share_of_ties(ref_rewards)
    if ties == 1:
        print("\nAll rewards of a prompt are the same: there is nothing to learn.")
        return
    if ties > 0.01:
        print(f"\nIn {ties:.0%} of all pairs of reference responses, both have the same reward.")
    print(f"\nKLs in nats per response; ± is the standard error over {len(ref_rewards)} prompts. "
          f"vBoN succeeded if\nits row is near the row of best-of-N, and its KL to BoN near 0, "
          f"with 1 sample a response.")
    if max(row["cut"] for row in rows) > 0.01:
        cells = [f"{title(row['method'], row['n'])} {row['cut']:.0%}" for row in rows]
        print(f"Responses that do not end within {length} tokens, but are cut: {', '.join(cells)}.")


def plot_run(path: Path, rows: list[dict], rewards: list[Tensor], ref_rewards: Tensor,
             history: list[dict]) -> None:
    """Plot rewards on held-out prompts as histograms (left) and the training path (right).

    rows and rewards: of the reference, of best-of-n and of the policy. ref_rewards (P, M): those
    of the theory. history: one dictionary an update, with "kl_ref" and "win_rate".
    """
    with figure(path, 2, (11, 4.2)) as (left, right):
        plot_rewards(left, rows, rewards)
        plot_path(right, rows, ref_rewards, history)


def plot_rewards(axes, rows: list[dict], rewards: list[Tensor]) -> None:
    """Plot histograms of rewards, and their means."""
    n = rows[1]["n"]
    # line styles tell them apart without colors, too
    looks = (("reference, 1 sample", "0.6", "-"), (f"best of {n}, {n} samples", "tab:blue", "-"),
             ("vBoN, 1 sample", "tab:red", "--"))
    span = (rewards[0].min().item() - 0.1, rewards[0].max().item() + 0.1)
    for row, reward, (label, color, line) in zip(rows, rewards, looks):
        axes.hist(reward.flatten().tolist(), bins=49, range=span, density=True, histtype="step",
                  lw=2, color=color, ls=line, label=label)
        axes.axvline(row["reward"], color=color, ls=line, lw=1)
    axes.set(xlabel="reward of a response (vertical lines: means)", ylabel="density",
             title="Rewards on held-out prompts")
    axes.legend(frameon=False, loc="upper left")


def plot_path(axes, rows: list[dict], ref_rewards: Tensor, history: list[dict]) -> None:
    """Plot KL and win rate of the policy during training, along the curve of best-of-n."""
    best = rows[1]
    policy = rows[2]
    n = best["n"]
    # best-of-n for every n, from the reference samples alone
    curve = [bon_attains(ref_rewards, i) for i in range(1, 3 * n + 1)]
    axes.plot([kl for kl, _ in curve], [win for _, win in curve], ".-", color="tab:blue", lw=1,
              label="best of 1, 2, 3, ..., in theory")
    for i in (n, 2 * n):
        axes.annotate(f"{i}", curve[i - 1], (-4, 8), textcoords="offset points", ha="right",
                      color="tab:blue")
    # single updates are noisy: the path is plotted as means of a dozen groups of them
    kl = group_means([step["kl_ref"] for step in history])
    win = group_means([step["win_rate"] for step in history])
    axes.plot(kl, win, ".-", color="tab:red", lw=1, alpha=0.5, label="vBoN during training")
    axes.plot(policy["kl_ref"], policy["win_rate"], "D", color="tab:red", ms=7,
              label="vBoN, trained")
    axes.plot(best["kl_ref"], best["win_rate"], "o", color="tab:blue", ms=10, mfc="none", mew=2,
              label=f"best of {n}")
    axes.set(xlabel="KL to the reference, nats per response", ylabel="win rate over the reference",
             title="The policy's path during training",
             xlim=(-0.03, 2 * best["kl_ref"] + 0.1))
    axes.legend(frameon=False, loc="lower right")


def group_means(values: list[float], groups: int = 12) -> list[float]:
    """Return the means of consecutive groups of values, in order, and the first value before."""
    size = max(1, len(values) // groups)
    means = [values[0]]
    for start in range(0, len(values), size):
        group = values[start:start + size]
        means.append(sum(group) / len(group))
    return means


@contextlib.contextmanager
def figure(path: Path, columns: int, size: tuple[float, float], rows: int = 1) -> Iterator[list]:
    """Make a figure with axes, row by row, and write it as PNG at the end of the `with` block.

    matplotlib's settings are its own defaults here, and afterwards those of the caller again.
    """
    # here, so that --help need not wait for it
    import matplotlib
    from matplotlib.figure import Figure
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        whole = Figure(figsize=size, layout="constrained")
        axes = whole.subplots(rows, columns, squeeze=False).flatten()
        yield axes
        for one in axes:
            one.spines[["top", "right"]].set_visible(False)
        picture = io.BytesIO()
        whole.savefig(picture, format="png", dpi=120)
    write_whole(path, picture.getvalue())
