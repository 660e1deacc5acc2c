"""Tests of the neighbours of vBoN against enumeration, direct optimisation, and closed forms.

    pytest experiments/test_neighbours.py
"""
import itertools

import pytest
import torch

import vbon
from experiments import decoders, methods, savings, theory
from experiments.test_experiments import best_of, tiny_world, world_reward
from support.statistics import bon_attains

torch.set_num_threads(1)

RANDOM = torch.randn(40, generator=torch.Generator().manual_seed(0)).double()
PROB = torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25], dtype=torch.float64)
WORLDS = {"distinct": RANDOM, "ties": (3 * RANDOM).round() / 3}

# ------------------------------------------------------------------- aims, by direct optimisation

def optimum(objective):
    """The weights of 40 responses that maximise an objective of log-probabilities (40,)."""
    logits = torch.zeros(40).double().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=3000, tolerance_grad=1e-13,
                                  tolerance_change=1e-16, history_size=50,
                                  line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = -objective(logits.log_softmax(0))
        value.backward()
        return value

    for _ in range(2):
        optimizer.step(loss)
    return logits.detach().softmax(0)


def wins_of(rewards):
    """The win rate of each of 40 equally probable responses, by comparing all pairs."""
    lower = (rewards[None, :] < rewards[:, None]).double()
    equal = (rewards[None, :] == rewards[:, None]).double()
    return (lower + equal / 2).mean(1), lower.mean(1), (lower + equal).mean(1)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("method, beta", [
    ("kl-rl", 0.9), ("infalign-ctrl", 4000.0), ("max-at-k", 0.7), ("max-at-k-win", 0.1),
    ("infalign", 0.2), ("wind", 0.25)])
def test_an_aim_is_the_direct_optimum(method, beta, world):
    rewards = WORLDS[world]
    n = 4
    found = theory.aim_weights(method, n, beta, rewards[None])[0]
    wins, lower, at_most = wins_of(rewards)
    equilibrium = (rewards[None, :] < rewards[:, None]).double() @ found
    equilibrium += (rewards[None, :] == rewards[:, None]).double() @ found / 2
    gains = {
        "kl-rl": lambda log_p: (log_p.exp() * rewards).sum(),
        "infalign-ctrl": lambda log_p: (log_p.exp() * (10 * wins).exp()).sum(),
        "max-at-k": lambda log_p: best_of(log_p, rewards, n),
        "max-at-k-win": lambda log_p: best_of(log_p, wins, n),
        "infalign": lambda log_p: best_of(log_p, (lower ** n + at_most ** n) / 2, n),
        # an equilibrium is the best answer to itself
        "wind": lambda log_p: (log_p.exp() * equilibrium).sum(),
    }
    # the KL to the reference, up to log 40
    direct = optimum(lambda log_p: gains[method](log_p) - beta * (log_p.exp() * log_p).sum())
    assert (found - direct).abs().max().item() < 1e-6


@pytest.mark.parametrize("world", WORLDS)
def test_the_aim_of_pessimism_is_the_direct_optimum(world):
    """Of E[win rate] - (β/2) · E_ref[(π/π_ref)²]: its gradient is the same wherever π > 0, and not
    larger elsewhere."""
    rewards = WORLDS[world]
    found = theory.aim_weights("pessimism", 4, 0.25, rewards[None])[0]
    gradient = wins_of(rewards)[0] - 0.25 * 40 * found
    assert found.sum().item() == pytest.approx(1)
    assert (gradient[found > 0] - gradient.max()).abs().max().item() < 1e-12
    assert 0 < (found > 0).sum() < 40


@pytest.mark.parametrize("method", theory.WITH_BETA)
def test_the_beta_of_each_aim_goes_as_far_as_best_of_n(method):
    rewards = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    kl, _ = bon_attains(rewards, 3)
    assert theory.find_aim(method, 3, rewards)["kl_ref"] == pytest.approx(kl, rel=0.01)

# ----------------------------------------------------------------------------- decoded by best-of-n

@pytest.mark.parametrize("n", [1, 2, 3])
def test_decoded_win_rate_is_that_of_all_sets(n):
    ours = torch.tensor([[1.0, 3.0, 3.0, 0.0]])
    refs = torch.tensor([[2.0, 3.0, -1.0, 0.5, 3.0]])
    wins = []
    for mine in itertools.combinations(ours[0].tolist(), n):
        for theirs in itertools.combinations(refs[0].tolist(), n):
            wins.append((max(mine) > max(theirs)) + (max(mine) == max(theirs)) / 2)
    found = theory.decoded_win_rate(ours, refs, n)
    assert found.tolist() == pytest.approx([sum(wins) / len(wins)])
    # too few responses on one side
    assert theory.decoded_win_rate(ours, refs, 5) is theory.decoded_win_rate(refs, ours, 5) is None


def test_decoded_win_rate_of_known_weights_is_that_of_all_tuples():
    rewards = torch.tensor([2.0, 1.0, 1.0, 3.0, 0.0])
    wins = 0.0
    for i, j, k, m in itertools.product(range(5), repeat=4):
        mine = max(rewards[i], rewards[j])
        theirs = max(rewards[k], rewards[m])
        wins += (PROB[i] * PROB[j] / 25 * ((mine > theirs) + (mine == theirs) / 2)).item()
    found = theory.decoded_win_rate_of(PROB[None], rewards[None], 2)
    assert found == pytest.approx(wins)

# ------------------------------------------------------------------------ unbiased, over all tuples

VALUES = torch.tensor([2.0, 1.0, 1.0, 3.0, -1.0]).double()         # two of them tie


@pytest.mark.parametrize("K, k", [(3, 1), (3, 2), (3, 3), (4, 2), (4, 3), (4, 4)])
def test_weights_of_max_at_k_are_unbiased(K, k):
    """The expected gradient over all tuples of K responses is that of E[best value of k]."""
    logits = PROB.log().requires_grad_()
    exact, = torch.autograd.grad(best_of(logits.log_softmax(0), VALUES, k), logits)
    tuples = torch.tensor(list(itertools.product(range(5), repeat=K)))
    weights = methods.max_at_k_weights(VALUES[tuples], k)
    logprob = logits.log_softmax(0)[tuples]
    chance = logprob.detach().sum(-1).exp()
    found, = torch.autograd.grad((chance * (weights * logprob).sum(-1)).sum(), logits)
    assert (found - exact).abs().max() < 1e-14


@pytest.mark.parametrize("K", [2, 3, 4])
def test_the_update_of_wind_is_unbiased(K):
    """The expected gradient of its loss is that of -E[wins over the fixed policy]/β + KL."""
    beta = 0.4
    logits = torch.tensor([0.3, -0.2, 0.1, 0.5, 0.0]).double().requires_grad_()
    ref = PROB.log()
    log_p = logits.log_softmax(0)
    p = log_p.exp()
    beats = (VALUES[None, :] < VALUES[:, None]).double()
    beats += (VALUES[None, :] == VALUES[:, None]).double() / 2
    objective = (p * (log_p - ref)).sum() - (p * (beats @ p.detach())).sum() / beta
    exact, = torch.autograd.grad(objective, logits)
    total = torch.zeros(5).double()
    for indices in itertools.product(range(5), repeat=K):
        y = torch.tensor(indices)[None]
        logprob = logits.log_softmax(0)[y]
        rollout = vbon.Rollout(y[..., None], VALUES[y], ref[y])
        target = methods.wind_target(rollout, None, 4, beta)
        gradient, = torch.autograd.grad(vbon.reverse_kl_loss(logprob, target), logits)
        total += logprob.detach().sum().exp() * gradient
    assert (total - exact).abs().max() < 1e-12

# ---------------------------------------------------------------------------------------- decoders

@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_law_of_pessimism_is_that_of_all_tuples(n):
    """All tuples of n + 1 responses, and all ways to accept some of them."""
    beta = 0.8
    chance = decoders.pessimism_chance(VALUES[None], VALUES[None], beta)[0]
    truth = torch.zeros(5).double()
    for indices in itertools.product(range(5), repeat=n + 1):
        left = PROB[0] * 0 + PROB[list(indices)].prod()
        for i in indices[:-1]:
            truth[i] += left * chance[i]
            left = left * (1 - chance[i])
        truth[indices[-1]] += left
    assert 0 < chance.min() + 1e-9 and chance.max() == 1
    # the mean chance over the reference: here each response as often as it is probable
    often = (PROB * 20).round().long()
    ref_chance = chance.repeat_interleave(often)[None]
    found = decoders.pessimism_logprob(PROB.log()[None], chance[None], ref_chance, n)
    assert torch.allclose(found[0].exp(), truth, atol=1e-12)


def test_pessimism_takes_the_first_that_is_accepted():
    chance = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 1.0]]).double()
    assert decoders.pessimism_choice(chance, torch.Generator()).tolist() == [1, 2, 0]
    often = torch.tensor([[0.25, 0.0]]).double().repeat(20_000, 1)
    found = decoders.pessimism_choice(often, torch.Generator().manual_seed(0))
    assert found.double().mean().item() == pytest.approx(0.75, abs=0.015)

# ------------------------------------------------------------------------ decoders that save tokens

EOT = 3


def test_speculative_rejection_by_hand():
    """Reward: the number of zeros. After one token the two with a zero stay, after two the one with
    two zeros, and it is the answer; the best full text was dropped."""
    response = torch.tensor([[[0, 1, 1, EOT], [1, 0, 0, 0], [0, 0, 1, 1], [2, EOT, EOT, EOT]]])

    def reward(prompt, y):
        return (y == 0).sum(-1).double()

    best, tokens = savings.speculative_rejection(None, response, reward, [1, 2], EOT)
    assert best.tolist() == [2]
    # 4 first tokens; one more of two responses; two more of the last one
    assert tokens.tolist() == [4 + 2 + 2]
    best, tokens = savings.speculative_rejection(None, response, reward, [], EOT)
    assert best.tolist() == [1]
    assert tokens.tolist() == [4 + 4 + 4 + 2]


def test_a_tree_is_the_law_of_its_definition():
    """Two roots, the better first token is kept and continued twice: by enumeration."""
    reference, prompt, strings = tiny_world()
    with torch.no_grad():
        chance = reference.logprob(prompt, strings)[0].double().exp()
    reward = world_reward(prompt, strings)[0]
    first = strings[0][:, 0]
    cut = savings.cut_after(strings, 1, EOT)
    of_first = world_reward(prompt, cut)[0]             # the reward of the first token alone
    truth = torch.zeros(40).double()
    for a, b in itertools.product(range(4), repeat=2):
        pa = chance[first == a].sum()
        pb = chance[first == b].sum()
        kept = a if of_first[first == a][0] >= of_first[first == b][0] else b
        rest = torch.where(first == kept, chance, 0.0)
        rest = rest / rest.sum()
        lower = (reward[None, :] < reward[:, None]).double() @ rest
        truth += pa * pb * ((lower + rest) ** 2 - lower ** 2)
    best, tokens = savings.tree_bon(reference, prompt.repeat(20_000, 1), world_reward, 2, 2, [1],
                                     3, torch.Generator().manual_seed(0))
    same = (best[:, None, :] == strings[0][None]).all(-1).double().mean(0)
    assert (same - truth).abs().max() < 0.015
    # a text that has ended costs nothing more
    assert tokens.min() == 2 and tokens.max() == 6
