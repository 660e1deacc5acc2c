"""Decoders that save tokens: win rate against what they sample, beside best-of-n for all n."""
from pathlib import Path

import numpy as np

import vbon
from experiments import decoders, theory
from support import report
from support.seeding import seeded_generator
from support.statistics import mean_and_error
from train import World

NS = (1, 2, 3, 4, 6, 8, 10, 12, 16, 24, 32)
SIZE = 16                               # responses to start with; roots of the tree
CHILDREN = 4


def study(world: World, seed: int, path: Path) -> None:
    """Print and plot win rates and costs; a cost of 1 is the mean length of a full response."""
    refs = world.held_out.reward
    response = world.candidates.response
    eot = world.text.encoding.eot_token
    full = decoders.count_tokens(response, eot).double().mean().item()
    wins = vbon.win_rate(world.candidates.reward, refs)
    line = []
    for n in NS:
        if n <= response.shape[1]:
            weight = theory.winner_weights(world.candidates.reward, n)
            line.append((n, *mean_and_error((weight * wins).sum(-1, keepdim=True))))
    thirds = parts(response.shape[2], 3)
    quarters = parts(response.shape[2], 4)
    points = {
        f"Speculative Rejection, {SIZE} cut after {_join(thirds)} tokens":
            reject(world, SIZE, thirds),
        f"Speculative Rejection, {SIZE} cut after {_join(quarters)} tokens":
            reject(world, SIZE, quarters),
        f"TreeBoN, {SIZE} roots, {CHILDREN} children, 3 layers": grow_trees(world, thirds, seed),
    }
    print(f"\nDecoders that save tokens: win rate, and cost in mean lengths ({full:.1f} tokens)\n\n"
          f"{'':54}{'cost':>6}{'win rate':>14}{'best of n at this cost':>24}")
    for name, (cost, win, error) in points.items():
        print(f"  {name:52}{cost / full:6.1f}{win:8.3f} ±{error:.3f}"
              f"{interpolate(line, cost / full):24.3f}")
    with report.figure(path, 1, (6, 4)) as (axes,):
        axes.errorbar([n for n, _, _ in line], [win for _, win, _ in line],
                      [error for _, _, error in line], fmt=".-", lw=1, label="best of n")
        for marker, (name, (cost, win, error)) in zip("sDv", points.items()):
            axes.errorbar(cost / full, win, error, fmt=marker, ms=6, capsize=2, label=name)
        axes.set(xscale="log", xlabel="tokens sampled, in mean lengths of a response",
                 ylabel="win rate over the reference", title="Decoders that save tokens")
        axes.set_xticks(NS, NS)
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=8, loc="lower right")


def reject(world: World, size: int, cuts: list[int]) -> tuple[float, float, float]:
    """Return mean tokens, win rate and its error of Speculative Rejection, on the cached
    candidates in groups of `size`."""
    candidates = world.candidates
    P, M, L = candidates.response.shape
    groups = M // size
    response = candidates.response[:, :groups * size].reshape(P * groups, size, L)
    prompt = candidates.prompt.repeat_interleave(groups, 0)
    device = world.reference.wte.weight.device

    def reward_fn(prompt, response):
        return world.reward(prompt.to(device), response.to(device)).cpu()

    best, tokens = decoders.speculative_rejection(prompt, response, reward_fn, cuts,
                                                  world.text.encoding.eot_token)
    reward = candidates.reward[:, :groups * size].reshape(P * groups, size).gather(1, best[:, None])
    win, error = mean_and_error(vbon.win_rate(reward.view(P, groups), world.held_out.reward))
    return tokens.mean().item(), win, error


def grow_trees(world: World, cuts: list[int], seed: int, trees: int = 16
               ) -> tuple[float, float, float]:
    """Return mean tokens, win rate and its error of TreeBoN, with some trees for each prompt."""
    device = world.reference.wte.weight.device
    prompt = world.held_out.prompt.repeat_interleave(trees, 0).to(device)
    best, tokens = decoders.tree_bon(world.reference, prompt, world.reward, SIZE, CHILDREN, cuts,
                                     world.settings.text.length,
                                     seeded_generator(device, "tree", seed))
    reward = world.reward(prompt, best[:, None]).cpu()
    win, error = mean_and_error(vbon.win_rate(reward.view(-1, trees), world.held_out.reward))
    return tokens.mean().item(), win, error


def parts(length: int, count: int) -> list[int]:
    """Return the lengths at which to cut: equal parts; fewer if there are too few tokens."""
    cuts = {i * length // count for i in range(1, count)}
    return sorted(cuts - {0, length})


def interpolate(line: list[tuple], cost: float) -> float:
    """Return the win rate of best-of-n at a cost between two n; nan outside of the line."""
    ns, wins, _ = zip(*line)
    return float(np.interp(cost, ns, wins, left=np.nan, right=np.nan))


def _join(cuts: list[int]) -> str:
    return ", ".join(str(cut) for cut in cuts)
