"""Draw the derivation of best-of-N: `python -m experiments.draw_method` writes assets/method.png.

The six responses of `python vbon.py`, in ascending order of reward, cut the interval from 0 to 1
into pieces as long as their probabilities. u^N maps each to its probability under best-of-N.
"""
from pathlib import Path

import torch

from support.report import figure
from vbon import TOY_PROB, TOY_REWARD, bon_logprob, bon_logprob_bound, bon_logprob_ties

N = 4
Y = 4                                       # the response that is marked: reward 2
LOW = TOY_PROB.cumsum(0) - TOY_PROB         # F, where a piece begins
HIGH = TOY_PROB.cumsum(0)                   # F + π_ref, where it ends
START, END = LOW[Y].item(), HIGH[Y].item()
EXACT = bon_logprob(TOY_PROB.log(), LOW.log(), N).exp().tolist()
BOUND = bon_logprob_bound(TOY_PROB.log(), LOW.log(), N).exp().tolist()
COLORS = ["0.92", "0.82", "0.7", "0.55", "tab:red", "0.65"]


def main() -> None:
    """Plot both panels."""
    with figure(Path("assets", "method.png"), 2, (13, 6.6)) as (left, right):
        left.get_gridspec().set_width_ratios([1.5, 1])
        plot_pieces(left)
        plot_bound_and_ties(right)


def plot_pieces(axes) -> None:
    """Plot (2): the pieces below the curve and those beside it."""
    rows = zip(LOW.tolist(), HIGH.tolist(), TOY_PROB.tolist(), EXACT, TOY_REWARD.tolist(), COLORS)
    for low, high, prob, bon_prob, reward, color in rows:
        axes.barh(-0.05, prob, 0.06, low, color=color, edgecolor="white")
        axes.bar(-0.05, bon_prob, 0.06, low ** N, color=color, edgecolor="white")
        axes.plot([high, high, 0], [0, high ** N, high ** N], color=color, lw=1, zorder=0)
        write(axes, (low + high) / 2, -0.13, f".{100 * prob:02.0f}\n{reward:g}")
        middle = (low ** N + high ** N) / 2 if low > 0 else -0.03       # the first is too short
        write(axes, -0.09, middle, f"{bon_prob:.4f}", "right")
    write(axes, -0.02, -0.13, "$π_{ref}$\nreward", "right")
    write(axes, -0.2, 1.05, f"best of {N}", "left")
    axes.plot([START, START, 0], [0, START ** N, START ** N], color="tab:red", lw=1)
    write(axes, 0.01, START ** N + 0.025, f"$F^{N}$", "left", "tab:red")
    write(axes, 0.01, END ** N + 0.025, "$(F + π_{ref}(y))^4$", "left", "tab:red")
    write(axes, START - 0.01, -0.205, r"$F\qquad F + π_{ref}(y)$", "left", "tab:red")
    write(axes, 0.02, 0.88, "Best of 4 returns y if all four samples are in\ny's piece or left of "
          "it, but not all left of it.\nF is what lies left of it: hence <, not ≤, in (1).\n"
          "The pieces meet: their sum is 1.", "left")
    for n, x, y in ((1, 0.3, 0.36), (2, 0.6, 0.43), (4, 0.55, 0.15), (16, 0.94, 0.08)):
        plot_power(axes, n, 0, 1)
        write(axes, x, y, f"N = {n}", color="black" if n == N else "0.4")
    axes.axis("off")


def plot_bound_and_ties(axes) -> None:
    """Plot (3) as a tangent and (4) as a chord, near the marked response."""
    plot_power(axes, N, 0.67, 0.87)
    axes.plot([START, END, END], [START ** N, START ** N, END ** N], color="tab:red")
    axes.plot([START, END], [START ** N, START ** N + BOUND[Y]], color="tab:red", ls="--")
    write(axes, END - 0.004, START ** N + 0.03, f"tangent (3)\n{BOUND[Y]:.4f}", "right", "tab:red")
    write(axes, END + 0.006, START ** N + 0.03, f"curve (2)\n{EXACT[Y]:.4f}", "left", "tab:red")
    write(axes, 0.88, 0.23, "The same curve near y. The bound (3)\n"
          "is its slope at F, times $π_{ref}(y)$.", "right")
    # if y and the response before it tie, both have the piece from `first` to `END`
    first = LOW[Y - 1].item()
    tied = bon_logprob_ties(TOY_PROB.log(), LOW[Y - 1].log().expand(6), HIGH[Y].log().expand(6), N)
    other, own = tied.exp()[Y - 1:Y + 1].tolist()
    axes.plot([first, END], [first ** N, END ** N], color="tab:blue", ls="-.")
    axes.vlines(first, first ** N, END ** N, color="tab:blue", lw=1)
    axes.hlines([first ** N + other, END ** N], first, [START, END], color="tab:blue", lw=1)
    write(axes, 0.67, 0.57, "If the rewards 1 and 2 tied, both would\nshare the piece of the "
          f"chord (4), by width:\n{other:.4f} + {own:.4f} = {other + own:.4f}", "left", "tab:blue")
    axes.axis("off")


def plot_power(axes, n: int, low: float, high: float) -> None:
    """Plot u^n."""
    u = torch.linspace(low, high, 201)
    style = {"color": "black", "lw": 2.5} if n == N else {"color": "0.5", "lw": 1}
    axes.plot(u, u ** n, zorder=1, **style)


def write(axes, x: float, y: float, text: str, ha: str = "center", color: str = "black") -> None:
    """Write a text in the size of all texts."""
    axes.text(x, y, text, ha=ha, va="center", color=color, size=13)


if __name__ == "__main__":
    main()
