"""Decoders that save tokens: win rate against what they sample, beside best-of-n for all n.

    Speculative Rejection    start many, and drop the worse half on the way (arXiv 2410.20290)
    TreeBoN                  keep the better ones, and let them branch (arXiv 2410.16033)

Neither has a distribution that is known. All we have is what they return, and what it costs.
"""
from pathlib import Path

import numpy
import torch
from torch import Tensor

import vbon
from experiments import theory
from experiments.decoders import in_groups
from experiments.methods import take
from model import GPT
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
    full = count_tokens(response, world.reference.eot).double().mean().item()
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
    best, tokens = speculative_rejection(prompt.to(device), response.to(device), world.reward,
                                         cuts, world.reference.eot)
    reward = in_groups(candidates.reward, SIZE).gather(1, best[:, None].cpu())
    win, error = mean_and_error(vbon.win_rate(reward.view(P, groups), world.held_out.reward))
    return tokens.mean().item(), win, error


def grow_trees(world: World, cuts: list[int], seed: int) -> tuple[float, float, float]:
    """Return mean tokens, win rate and its error of TreeBoN."""
    device = world.reference.wte.weight.device
    prompt = world.held_out.prompt.repeat_interleave(TREES, 0).to(device)
    best, tokens = tree_bon(world.reference, prompt, world.reward, SIZE, CHILDREN, cuts,
                            world.text.length, seeded_generator(device, "tree", seed))
    reward = world.reward(prompt, best[:, None]).cpu()
    win, error = mean_and_error(vbon.win_rate(reward.view(-1, TREES), world.held_out.reward))
    return tokens.mean().item(), win, error


def count_tokens(response: Tensor, eot: int) -> Tensor:  # (..., L) -> (...)
    """Return the number of tokens that are sampled for each response, its end-of-text included."""
    return ((response != eot).sum(-1) + 1).clamp(max=response.shape[-1])


def cut_after(response: Tensor, tokens: int, eot: int) -> Tensor:
    """Return the first tokens of the responses (P, K, L), padded with end-of-text."""
    cut = response.clone()
    cut[..., tokens:] = eot
    return cut


def speculative_rejection(prompt: Tensor, response: Tensor, reward_fn, cuts: list[int], eot: int
                          ) -> tuple[Tensor, Tensor]:
    """Start with all N responses (P, N, L); after each number of tokens keep the better half.

    Better: by the reward of the unfinished text. Returns the index of the best one at the end, and
    the number of tokens that were sampled, both (P,).
    """
    P, N, L = response.shape
    alive = torch.arange(N).expand(P, N)
    length = count_tokens(response, eot).cpu()
    sampled = torch.zeros(P).double()
    start = 0
    for cut in [*cuts, L]:
        # what those that are alive add between the last cut and this one
        tokens = length.gather(1, alive).clamp(max=cut) - start
        sampled += tokens.clamp(min=0).sum(1)
        seen = cut_after(take(response, alive), cut, eot)
        reward = reward_fn(prompt, seen).cpu().double()
        keep = max(1, alive.shape[1] // 2) if cut < L else 1
        alive = alive.gather(1, reward.topk(keep).indices)
        start = cut
    return alive[:, 0], sampled


@torch.no_grad()
def tree_bon(model: GPT, prompt: Tensor, reward_fn, roots: int, children: int, cuts: list[int],
             length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Start with some roots; after each number of tokens keep the best 1/children, and branch.

    prompt (P, T). The paper scores unfinished texts by a model of their preference; here it is the
    reward of the unfinished text. Returns the best response (P, L), and the tokens sampled (P,).
    """
    P = len(prompt)
    eot = model.eot
    kept = torch.full((P, roots, 0), eot, device=prompt.device)
    sampled = torch.zeros(P).double()
    branches = 1
    for cut, end in zip([0, *cuts], [*cuts, length]):
        # continue each kept beginning several times, as if it were a part of the prompt
        beginning = kept[..., :cut]
        width = beginning.shape[1]
        full = torch.cat([prompt[:, None].expand(-1, width, -1), beginning], -1)
        more, _ = model.sample(full.reshape(P * width, -1), branches, end - cut, generator)
        more = more.view(P, width, branches, end - cut)
        beginning = beginning[:, :, None].expand(-1, -1, branches, -1)
        # one that has ended stays as it is
        ended = (beginning == eot).any(-1, keepdim=True)
        more = more.masked_fill(ended, eot)
        cost = count_tokens(more, eot).masked_fill(ended[..., 0], 0)
        sampled += cost.sum((1, 2)).cpu()
        grown = torch.cat([beginning, more], -1).flatten(1, 2)     # (P, width·branches, end)
        padded = torch.nn.functional.pad(grown, (0, length - end), value=eot)
        reward = reward_fn(prompt, padded).cpu().double()
        keep = max(1, grown.shape[1] // children) if end < length else 1
        kept = take(padded, reward.topk(keep).indices)
        branches = children
    return kept[:, 0], sampled
