"""Decoders that save tokens: win rate against what they sample, beside best-of-n for all n."""
from pathlib import Path

import numpy

import vbon
from experiments import decoders, theory
from support import report
from support.files import UnusableInput
from support.sampling import seeded_generator
from support.statistics import mean_and_error
from train import World

NS = (1, 2, 3, 4, 6, 8, 10, 12, 16, 24, 32)
SIZE = 16                               # responses to start with; roots of the tree
CHILDREN = 4
TREES = 16                              # for each prompt


def study(world: World, seed: int, path: Path) -> None:
    """Print and plot win rates and costs; a cost of 1 is the mean length of a full response."""
    refs = world.held_out.reward
    response = world.candidates.response
    if response.shape[1] < SIZE:
        raise UnusableInput(f"--study savings: want at least --m-eval {SIZE}")
    full = decoders.count_tokens(response, world.reference.eot).double().mean().item()
    wins = vbon.win_rate(world.candidates.reward, refs)
    ns = [n for n in NS if n <= response.shape[1]]
    line = []
    for n in ns:
        weight = theory.winner_weights(world.candidates.reward, n)
        line.append(mean_and_error((weight * wins).sum(-1, keepdim=True)))
    L = response.shape[2]
    thirds = sorted({L // 3, 2 * L // 3} - {0})         # where responses are cut
    points = {
        f"Speculative Rejection, {SIZE} cut after {thirds} tokens": reject(world, thirds),
        f"TreeBoN, {SIZE} roots, {CHILDREN} children, 3 layers": grow_trees(world, thirds, seed),
    }
    print(f"\nDecoders that save tokens: win rate, and cost in mean lengths ({full:.1f} tokens)\n\n"
          f"{'':56}{'cost':>6}{'win rate':>14}{'best of n at this cost':>24}")
    for name, (tokens, win, error) in points.items():
        beside = numpy.interp(tokens / full, ns, [win for win, _ in line], numpy.nan, numpy.nan)
        print(f"  {name:54}{tokens / full:6.1f}{win:8.3f} ±{error:.3f}{beside:24.3f}")
    with report.figure(path, 1, (6, 4)) as (axes,):
        axes.errorbar(ns, [win for win, _ in line], [error for _, error in line], fmt=".-", lw=1,
                      label="best of n")
        for marker, (name, (tokens, win, error)) in zip("sD", points.items()):
            axes.errorbar(tokens / full, win, error, fmt=marker, ms=6, capsize=2, label=name)
        axes.set(xscale="log", xlabel="tokens sampled, in mean lengths of a response",
                 ylabel="win rate over the reference", title="Win rate and tokens of decoders")
        axes.set_xticks(ns, ns)
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=9, loc="lower right")


def reject(world: World, cuts: list[int]) -> tuple[float, float, float]:
    """Return mean tokens, win rate and error of Speculative Rejection from SIZE candidates."""
    candidates = world.candidates
    P, M, L = candidates.response.shape
    groups = M // SIZE
    response = candidates.response[:, :groups * SIZE].reshape(P * groups, SIZE, L)
    prompt = candidates.prompt.repeat_interleave(groups, 0)
    device = world.reference.wte.weight.device
    best, tokens = decoders.speculative_rejection(prompt.to(device), response.to(device),
                                                  world.reward, cuts, world.reference.eot)
    reward = decoders.in_groups(candidates.reward, SIZE).gather(1, best[:, None].cpu())
    win, error = mean_and_error(vbon.win_rate(reward.view(P, groups), world.held_out.reward))
    return tokens.mean().item(), win, error


def grow_trees(world: World, cuts: list[int], seed: int) -> tuple[float, float, float]:
    """Return mean tokens, win rate and its error of TreeBoN."""
    device = world.reference.wte.weight.device
    prompt = world.held_out.prompt.repeat_interleave(TREES, 0).to(device)
    best, tokens = decoders.tree_bon(world.reference, prompt, world.reward, SIZE, CHILDREN, cuts,
                                     world.text.length, seeded_generator(device, "tree", seed))
    reward = world.reward(prompt, best[:, None]).cpu()
    win, error = mean_and_error(vbon.win_rate(reward.view(-1, TREES), world.held_out.reward))
    return tokens.mean().item(), win, error

