"""Tests of the experiments against oracles: enumeration, closed forms, and train.py itself.

    pytest experiments
"""
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
import vbon
from experiments import compare, decoders, gap, methods, sizes, studies, summary, theory
from model import GPT
from support.huggingface import load_model
from support import kept, results
from support.files import UnusableInput

ROOT = Path(__file__).parent.parent
TIED = torch.tensor([[2.0, -1.0, 2.0, 3.0, -1.0, -1.0], [1.0, 2.0, 3.0, 4.0, 5.0, 60.0]]).double()

torch.set_num_threads(1)                                # tensors are small: more only cost time

# ---------------------------------------------------------------- best-of-n of a continuous reward

def test_the_interval_by_hand():
    """Reward 2 against 1, 2, 2, 3 gives 1/5 and 4/5."""
    ref_rewards = torch.tensor([[1.0, 2.0, 2.0, 3.0]])
    reward = torch.tensor([[2.0, 2.5, 0.0, 9.0]])
    cdf_lt, cdf_le = theory.cdf_interval(reward, ref_rewards)
    assert torch.equal(cdf_lt, torch.tensor([[1, 3, 0, 4]]).double() / 5)
    assert torch.equal(cdf_le, torch.tensor([[4, 4, 1, 5]]).double() / 5)


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_the_weight_by_the_interval_has_a_mean_of_exactly_one(n):
    """Each of M + 1 rewards takes its turn as y, with the others as reference."""
    pool = torch.tensor([0.3, 1.0, 1.0, 2.0, -1.0, 1.0, 5.0])
    others = torch.stack([torch.cat([pool[:i], pool[i + 1:]]) for i in range(len(pool))])
    cdf_lt, cdf_le = theory.cdf_interval(pool[:, None], others)
    log_weight = vbon.bon_logprob_ties(torch.zeros(7, 1), cdf_lt.log(), cdf_le.log(), n)
    assert log_weight.exp().mean().item() == pytest.approx(1, abs=1e-12)


def test_the_closed_form_for_a_continuous_reward():
    kl, win = theory.bon_theory(4)
    assert kl == pytest.approx(math.log(4) - 3 / 4)
    assert win == 4 / 5
    assert theory.bon_theory(1) == (0, 0.5)


# ------------------------------------------------------------------------------ winners among M

def best_of_all_subsets(rewards, n):
    """How often each response is the best of n different ones; ties share."""
    chance = torch.zeros(len(rewards)).double()
    for subset in itertools.combinations(range(len(rewards)), n):
        best = max(rewards[i] for i in subset)
        winners = [i for i in subset if rewards[i] == best]
        for i in winners:
            chance[i] += 1 / len(winners)
    return chance / math.comb(len(rewards), n)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_winner_weights_are_those_of_all_subsets(n):
    weights = theory.winner_weights(TIED, n)
    for i in range(2):
        expected = best_of_all_subsets(TIED[i].tolist(), n)
        # responses that tie may differ in how often they share: only their sum is told
        for reward in TIED[i].unique():
            tied = TIED[i] == reward
            assert weights[i][tied].sum().item() == pytest.approx(expected[tied].sum().item())
        assert torch.allclose(weights[i], expected)


def test_winner_weights_are_stable_for_many_responses():
    rewards = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(0))
    weights = theory.winner_weights(rewards, 64)
    assert weights.sum().item() == pytest.approx(1, abs=1e-9)
    assert weights.max().item() == pytest.approx(64 / 20_000, rel=1e-6)


def test_winners_are_distributed_as_the_best_of_fresh_responses():
    """The mean over many sets of M rewards: 4/5, where sampling with replacement gives .795."""
    rewards = torch.rand(40_000, 16, generator=torch.Generator().manual_seed(0)).double()
    mean = (theory.winner_weights(rewards, 4) * rewards).sum(-1).mean().item()
    assert mean == pytest.approx(0.8, abs=0.003)


def test_drawn_winners_follow_their_weights():
    response = torch.arange(6).view(1, 6, 1)
    generator = torch.Generator().manual_seed(1)
    batch = train.Batch(0, None, response, TIED[:1])
    sampled = methods.sample_winners(batch, 2, 40_000, generator)
    frequency = sampled.flatten().bincount(minlength=6) / 40_000
    assert torch.allclose(frequency.double(), theory.winner_weights(TIED[:1], 2)[0], atol=0.01)


@pytest.mark.parametrize("function", [theory.winner_weights, theory.bon_expected_reward])
@pytest.mark.parametrize("n", [0, 7, 2.0, True])
def test_an_n_outside_of_1_to_m_is_refused(function, n):
    with pytest.raises(ValueError, match="from 1 to M = 6"):
        function(TIED, n)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_expected_reward_of_best_of_n_is_the_mean_over_all_subsets(n):
    expected = []
    for row in TIED.tolist():
        best = [max(subset) for subset in itertools.combinations(row, n)]
        expected.append(sum(best) / len(best))
    assert theory.bon_expected_reward(TIED, n).tolist() == pytest.approx(expected)

# -------------------------------------------------------------------------------- what tilts attain

def uniform_rewards(m=4096):
    """Rewards that are their own CDF, evenly spread."""
    return ((torch.arange(m) + 0.5) / m).double()[None]


def closed_form(t):
    """Win rate and KL of the tilt of a continuous reward by exp(t·F)."""
    win = 1 / (1 - math.exp(-t)) - 1 / t
    kl = t * win - math.log(math.expm1(t) / t)
    return win, kl


@pytest.mark.parametrize("t", [0.5, 3.0, 20.0])
def test_tilt_by_the_win_rate_is_the_closed_form(t):
    rewards = uniform_rewards()
    win, kl = closed_form(t)
    found = theory.tilt(t * rewards, rewards)
    assert found["win_rate"] == pytest.approx(win, abs=1e-4)
    assert found["kl_ref"] == pytest.approx(kl, abs=1e-4)


@pytest.mark.parametrize("t", [0.01, 1.234, 7.77, 31.0])
def test_highest_win_rate_is_the_closed_form(t):
    win, kl = closed_form(t)
    assert theory.highest("win_rate", kl, uniform_rewards()) == pytest.approx(win, abs=1e-4)


def test_highest_reward_of_a_bell_is_the_closed_form():
    """Rewards N(0, 1) under the reference: the tilt with KL d²/2 has mean d."""
    rewards = torch.special.ndtri(uniform_rewards(100_000))
    assert theory.highest("reward", 0.32, rewards) == pytest.approx(0.8, abs=1e-3)


def test_highest_is_unknown_where_few_samples_are_left():
    rewards = uniform_rewards(512)
    assert theory.highest("win_rate", 2.5, rewards) is not None
    assert theory.highest("win_rate", 4.5, rewards) is None
    assert theory.highest("reward", 100.0, rewards) is None


def test_highest_stays_where_the_best_responses_tie():
    """A quarter of the responses is right: no policy wins more than 7/8, at any KL."""
    rewards = torch.tensor([[1.0] * 64 + [0.0] * 192])
    assert theory.highest("win_rate", 5.0, rewards) == pytest.approx(0.875)
    assert theory.highest("reward", math.log(4), rewards) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("n", [1, 2, 4, 32])
def test_best_of_n_attains_what_vbon_says(n):
    rewards = torch.randn(4, 512, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    found = theory.best_of_n(n, rewards)
    assert (found["kl_ref"], found["win_rate"]) == pytest.approx(vbon.bon_attains(rewards, n))


def test_no_curve_is_above_the_highest():
    rewards = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    for curve in theory.curves(rewards).values():
        assert len(curve) > 10
        for point in curve[1::5]:
            for plane in ("win_rate", "reward"):
                highest = theory.highest(plane, point["kl_ref"], rewards)
                # the reward of best-of-n is the unbiased one, not that of a policy on M responses
                assert highest is None or highest >= point[plane] - 0.02


def test_beta_goes_as_far_as_best_of_n():
    """Rewards N(0, 1): the optimum for β has a KL of 1 / (2 β²)."""
    rewards = torch.special.ndtri(uniform_rewards(100_000))
    for n in (2, 4):
        kl, _ = theory.bon_theory(n)
        assert theory.find_beta(rewards, n) == pytest.approx(math.sqrt(0.5 / kl), rel=0.01)


@pytest.mark.parametrize("scale", [1e20, 1e-20, 1e80])
def test_rewards_of_any_size_have_the_same_aims(scale):
    rewards = torch.randn(8, 512, generator=torch.Generator().manual_seed(0)).double()
    beta = theory.find_beta(rewards, 4)
    assert theory.find_beta(scale * rewards, 4) == pytest.approx(scale * beta, rel=1e-3)
    for plane, unit in (("win_rate", 1), ("reward", scale)):
        high = theory.highest(plane, 0.6, rewards)
        assert theory.highest(plane, 0.6, scale * rewards) == pytest.approx(unit * high)
    curves = theory.curves(scale * rewards)
    for name, curve in theory.curves(rewards).items():
        assert [point["kl_ref"] for point in curves[name]] == pytest.approx(
            [point["kl_ref"] for point in curve])


def test_very_large_and_small_numbers_stay_narrow_in_a_table():
    assert [summary.number(x) for x in (0.0, 1.5, -4.7e20, 3e-7)] == [
        "0.000", "1.500", "-4.7e+20", "3e-07"]


def test_the_aim_of_an_unknown_method_is_unknown():
    with pytest.raises(ValueError, match="the aim of ppo is unknown"):
        theory.aim("ppo", 4, None, uniform_rewards())


def test_a_beta_that_cannot_be_found_is_refused():
    few = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UnusableInput, match="give --beta"):
        theory.find_beta(few, 16)
    with pytest.raises(UnusableInput, match="give --beta"):
        theory.find_beta(torch.ones(2, 64), 4)


@pytest.mark.parametrize("method", ["vbon", "bound", "kl-rl", "bon-sft", "bond"])
def test_aims_go_as_far_as_best_of_n(method):
    rewards = torch.randn(16, 4096, generator=torch.Generator().manual_seed(0))
    beta = theory.find_beta(rewards, 4) if method == "kl-rl" else None
    assert theory.aim(method, 4, beta, rewards)["kl_ref"] == pytest.approx(0.636, abs=0.01)



def test_how_far_an_aim_is_from_best_of_n():
    """For a reward that is uniform on [0, 1], best of 4 has the density 4 u³, and KL-RL's optimum
    exp(u/β), normalised. The KL between them is an integral."""
    rewards = uniform_rewards()
    assert theory.aim("vbon", 4, None, rewards)["kl_bon"] == pytest.approx(0, abs=1e-12)
    assert theory.aim("bound", 4, None, rewards)["kl_bon"] == pytest.approx(0, abs=1e-3)
    u = (torch.arange(10 ** 6) + 0.5).double() / 10 ** 6
    density = (u / 0.2).exp() / (u / 0.2).exp().mean()
    integral = (density * (density / (4 * u ** 3)).log()).mean().item()
    assert theory.aim("kl-rl", 4, 0.2, rewards)["kl_bon"] == pytest.approx(integral, abs=2e-3)

# ------------------------------------------------------------------------------- soft best-of-n

@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_soft_best_of_n_is_brute_force(n):
    """Six equally likely responses; all (n-1)-tuples of them are the rivals."""
    reward = TIED[:1]
    truth = torch.zeros(6).double()
    for indices in itertools.product(range(6), repeat=n):
        y = torch.tensor(indices)
        chance = (reward[0, y] / 0.7).softmax(0)
        truth.index_add_(0, y, chance / 6 ** n)
    rivals = list(itertools.product(reward[0].tolist(), repeat=max(1, n - 1)))
    rivals = torch.tensor(rivals).double().view(1, -1)
    ref_logprob = torch.full((1, 6), 1 / 6).log()
    found = decoders.soft_bon_logprob(ref_logprob, reward, rivals, n, 0.7)
    assert torch.allclose(found[0].exp(), truth, atol=1e-6)


def test_soft_best_of_n_draws_by_its_weights():
    reward = TIED[:1].repeat(20_000, 1)
    sampled = decoders.soft_best_of_n(reward, 0.7, torch.Generator().manual_seed(0))
    frequency = sampled.bincount(minlength=6) / 20_000
    assert torch.allclose(frequency.double(), (TIED[0] / 0.7).softmax(0), atol=0.015)

# ------------------------------------------------------------ training, on a world of 40 responses

def tiny_world():
    """A GPT over 3 letters and end-of-text (id 3), a prompt, all its 40 responses (1, 40, 3)."""
    model = GPT(4, 4, n_layer=1, n_head=2, n_embd=16, generator=torch.Generator().manual_seed(3))
    for p in model.parameters():
        p.data *= 2                                     # away from uniform
    strings = set()
    for string in itertools.product(range(4), repeat=3):
        if 3 in string:
            string = string[:string.index(3)] + (3,) * (3 - string.index(3))
        strings.add(string)
    return model, torch.tensor([[1]]), torch.tensor(sorted(strings))[None]


def world_reward(prompt, response):
    """A reward of these 40 responses, each another one: its place in a shuffled list."""
    _, _, strings = tiny_world()
    code = torch.tensor([16, 4, 1])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(4)).double()
    table = torch.zeros(64).double()
    table[(strings[0] * code).sum(-1)] = order
    return table[(response * code).sum(-1)]


def exact_targets(n, beta):
    """For each method, its target (1, 40) as log-probabilities: no samples, no estimate of F."""
    reference, prompt, strings = tiny_world()
    with torch.no_grad():
        ref_logprob = reference.logprob(prompt, strings).double()
    reward = world_reward(prompt, strings)
    lower = reward[0][None, :] < reward[0][:, None]     # (40, 40)
    log_cdf = (lower * ref_logprob[0].exp()).sum(1).log()[None]
    log_bon = vbon.bon_logprob(ref_logprob, log_cdf, n)
    # the worst response has F = 0: its probability is 0, here e^-100
    bound = (ref_logprob + (n - 1) * log_cdf).log_softmax(-1).clamp(min=-100)
    kl_rl = (ref_logprob + reward / beta).log_softmax(-1)
    return {"bound": bound, "kl-rl": kl_rl, "bon-sft": log_bon, "bond": log_bon}


@pytest.mark.parametrize("method, lr, steps", [
    ("bound", 0.008, 200), ("kl-rl", 0.007, 150), ("bon-sft", 0.008, 200), ("bond", 0.005, 300)])
def test_training_reaches_the_exact_target(method, lr, steps):
    n = 4
    beta = 12.0
    reference, prompt, strings = tiny_world()
    policy, _, _ = tiny_world()
    generator = torch.Generator().manual_seed(6)
    cached, _ = reference.sample(prompt, 10_000, 3, generator)
    ref_rewards = world_reward(prompt, cached)
    settings = train.TuningSettings(k=512, steps=steps, length=3)
    gradient = methods.choose_method(method, n, beta).gradient
    goal = exact_targets(n, beta)[method]
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    before = exact_kl(policy, goal, forward=method == "bon-sft")
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        batch = train.Batch(step, prompt, cached, ref_rewards)
        optimizer.zero_grad()
        gradient(policy, reference, world_reward, batch, n, settings, generator)
        optimizer.step()
    after = exact_kl(policy, goal, forward=method == "bon-sft")
    assert after < 0.02 < 0.1 < before


def exact_kl(policy, goal, forward):
    """KL(π_θ || goal), or KL(goal || π_θ), summed over all responses."""
    _, prompt, strings = tiny_world()
    with torch.no_grad():
        logprob = policy.logprob(prompt, strings).double()
    if forward:
        return (goal.exp() * (goal - logprob)).sum().item()
    return (logprob.exp() * (logprob - goal)).sum().item()


BETAS = {"kl-rl": 12.0, "infalign-ctrl": 3000.0, "wind": 0.3, "max-at-k": 12.0,
         "max-at-k-win": 0.3, "infalign": 0.3}


def expected_best(p, values, k):
    """E[the best value of k], for responses with the probabilities p."""
    found = 0.0
    before = torch.zeros(()).double()
    for value in values.unique():
        at_most = p[values <= value].sum()
        found = found + value * (at_most ** k - before ** k)
        before = at_most
    return found


def pairs(log_q, n):
    """The probability (40, 40) that i is the best and j the worst of n responses of the reference:
    rewards differ, so all n are between them, and both occur."""
    _, prompt, strings = tiny_world()
    reward = world_reward(prompt, strings)[0]
    q = log_q.exp()
    higher = (reward[:, None] > reward[None, :]).double()
    inside = (higher * q) @ higher                      # (40, 40): the mass between i and j
    best = q[:, None]
    worst = q[None, :]
    chance = ((inside + best + worst) ** n - (inside + best) ** n - (inside + worst) ** n
              + inside ** n)
    return higher * chance + (q ** n).diag()


def bonbon_loss(log_p, log_q, n):
    """BoNBoN's loss, as a sum over all pairs."""
    chance = pairs(log_q, n)
    assert chance.sum().item() == pytest.approx(1)
    h = log_p - log_q
    squares = (h[:, None] - h[None, :] - 2 * (1 + 1 / 2)) ** 2         # c for n = 3
    assert n == 3
    return -0.005 * (chance.sum(1) * log_p).sum() + 0.995 * (chance * squares).sum()


def margin_of_pairs(h, log_q, n):
    return (pairs(log_q, n) * (h[:, None] - h[None, :])).sum().item()


@pytest.mark.parametrize("part", [2, 3])
@pytest.mark.parametrize("method", methods.METHODS)
def test_an_update_follows_the_exact_gradient_and_reports_the_exact_means(method, part,
                                                                          monkeypatch):
    """The same prompt three times, in one part, or in two that are not of the same size; a policy
    that is not the reference."""
    n = 3
    reference, prompt, strings = tiny_world()
    policy, _, _ = tiny_world()
    for p in policy.parameters():
        p.data *= 1.3
    # BoNBoN chooses sets of n among the cached responses, which takes long with many of them
    count = 2_000 if method == "bonbon" else 20_000
    cached, _ = reference.sample(prompt, count, 3, torch.Generator().manual_seed(0))
    ref_rewards = world_reward(prompt, cached)
    batch = train.Batch(9, prompt.repeat(3, 1), cached.repeat(3, 1, 1), ref_rewards.repeat(3, 1))
    settings = train.TuningSettings(k=6_000, steps=10, length=3)
    generator = torch.Generator().manual_seed(1)
    monkeypatch.setattr(methods, "prompts_at_a_time", lambda *_: part)
    gradient = methods.choose_method(method, n, BETAS.get(method)).gradient
    found = gradient(policy, reference, world_reward, batch, n, settings, generator)
    found_gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])

    # the same by sums over all 40 responses
    log_p = policy.logprob(prompt, strings)[0].double()
    log_q = reference.logprob(prompt, strings)[0].detach().double()
    reward = world_reward(prompt, strings)
    refs = batch.ref_rewards[:1]
    wins = vbon.win_rate(reward, refs)[0]
    log_bon = vbon.bon_target(log_q[None], reward, refs, n)[0]
    bound = vbon.bon_logprob_bound(log_q[None], vbon.empirical_cdf(reward, refs).log(), n)[0]
    weights = log_bon.exp() / log_bon.exp().sum()       # of the winners
    reverse = (log_p.exp() * (log_p - log_bon)).sum()
    forward = -(weights * log_p).sum()
    kl = (log_p.exp() * (log_p - log_q)).sum()
    p = log_p.exp()
    best = {name: expected_best(p, theory.method_values(name, n, reward, refs)[0], n)
            for name in methods.FROM_SETS}
    beats = (reward[0][None, :] < reward[0][:, None]).double() @ p.detach() + p.detach() / 2
    calibrated = (10 * wins).exp()
    beta = BETAS.get(method)
    loss = {"bound": (p * (log_p - bound)).sum(),
            "kl-rl": kl - (p * reward[0]).sum() / 12,
            "infalign-ctrl": kl - (p * calibrated).sum() / BETAS["infalign-ctrl"],
            "wind": kl - (p * beats).sum() / BETAS["wind"],
            "bon-sft": forward,
            "bond": forward + reverse}.get(method)
    if method in methods.FROM_SETS:
        loss = kl - best[method] / beta
    if method == "bonbon":
        loss = bonbon_loss(log_p, log_q, n)
    gradient = torch.autograd.grad(loss, list(policy.parameters()))
    gradient = torch.cat([x.flatten() for x in gradient])
    assert (found_gradient - gradient).norm() < 0.1 * gradient.norm()
    exact = {"win_rate": (log_p.exp() * wins).sum().item(),
             "kl_ref": kl.item(),
             "nll": forward.item(),
             "margin": margin_of_pairs(log_p - log_q, log_q, n)}
    watched = {"bon-sft": {"nll"}, "bond": {"nll", "win_rate", "kl_ref"}, "bonbon": {"margin"}}
    assert set(found) == watched.get(method, {"win_rate", "kl_ref"})
    for name, value in found.items():
        assert value == pytest.approx(exact[name], abs=0.03), name


def three_prompts():
    """The reference of the tiny world with a head of its own, three prompts, 8 samples to each."""
    reference, _, _ = tiny_world()
    reference.untie_head()
    prompts = torch.tensor([[0], [1], [2]])
    cached, logprob = reference.sample(prompts, 8, 3, torch.Generator().manual_seed(0))
    return reference, train.Samples(prompts, cached, logprob, world_reward(prompts, cached), 0.0)


@pytest.mark.parametrize("name", ["vbon", *methods.METHODS])
def test_a_stopped_training_continues_as_if_nothing_had_happened(name, tmp_path):
    reference, samples = three_prompts()
    settings = train.TuningSettings(steps=6, batch=2, k=4, length=3)
    method = train.Method("vBoN n=2", ("vbon", 2), train.vbon_gradient)
    if name != "vbon":
        method = methods.choose_method(name, 2, 2.0)
    steps = []

    def four_updates(*given):
        if len(steps) == 4:
            raise KeyboardInterrupt
        steps.append(given)
        return method.gradient(*given)

    def train_on(path, method):
        return train.fine_tune(path, method, 2, reference, world_reward, samples, settings, 0)

    whole = train_on(tmp_path / "whole", method)
    with pytest.raises(KeyboardInterrupt):
        train_on(tmp_path / "stopped", method._replace(gradient=four_updates))
    saved = kept.load(tmp_path / "stopped")
    assert saved["step"] == 4
    kept.save(tmp_path / "stopped", saved | {"seconds": 1000.0})
    again = train_on(tmp_path / "stopped", method)
    assert again["history"] == whole["history"]
    for key, x in whole["weights"].items():
        assert torch.equal(again["weights"][key], x), key
    assert 0 <= whole["seconds"] < 100
    assert 1000 <= again["seconds"] < 1100


def test_half_of_the_responses_of_bond_are_winners(monkeypatch):
    reference, prompt, _ = tiny_world()
    policy, _, _ = tiny_world()
    cached, _ = reference.sample(prompt, 8, 3, torch.Generator().manual_seed(0))
    scored = []
    logprob = policy.logprob
    monkeypatch.setattr(policy, "logprob",
                        lambda x, y: scored.append(y.shape[1]) or logprob(x, y))
    batch = train.Batch(0, prompt, cached, world_reward(prompt, cached))
    settings = train.TuningSettings(k=5, length=3)
    methods.bond_gradient(policy, reference, world_reward, batch, 2, settings,
                          torch.Generator().manual_seed(0))
    assert scored == [2, 3]                             # winners, then its own


def test_the_loop_gives_each_update_its_rate_and_its_batch(tmp_path, monkeypatch):
    reference, samples = three_prompts()
    settings = train.TuningSettings(steps=8, batch=2, k=4, length=3, lr_scale=2.0)
    rates = []
    batches = []
    step = torch.optim.Adam.step

    def watched(optimizer, *given):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *given)

    def gradient(policy, reference, reward_fn, batch, n, settings, generator):
        batches.append(batch)
        return train.vbon_gradient(policy, reference, reward_fn, batch, n, settings, generator)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    method = train.Method("", ("vbon", 2), gradient)
    train.fine_tune(tmp_path / "a", method, 2, reference, world_reward, samples, settings, 0)
    # an adapter of rank 4 has as many parameters as four rows and columns of its linear layer
    parameters = sum(4 * sum(module.weight.shape) for module in reference.modules()
                     if isinstance(module, torch.nn.Linear))
    rate = 2.0 / math.sqrt(parameters)
    assert rates == pytest.approx([rate * train.decay(step, 8) for step in range(8)])
    assert [batch.step for batch in batches] == list(range(8))
    assert len({tuple(batch.prompt[:, 0].tolist()) for batch in batches}) > 2
    for batch in batches:
        assert len(batch.prompt) == 2
        # each prompt comes with its own samples and rewards
        for prompt, response, reward in zip(batch.prompt, batch.ref_response, batch.ref_rewards):
            assert torch.equal(response, samples.response[prompt.item()])
            assert torch.equal(reward, samples.reward[prompt.item()])


def test_parts_of_a_batch_change_nothing(monkeypatch):
    """Gradients of parts add up. With n = M, every winner is the best of all: nothing is random."""
    reference, _, _ = tiny_world()
    prompt = torch.tensor([[1], [2], [0]])
    cached, _ = reference.sample(prompt, 8, 3, torch.Generator().manual_seed(0))
    batch = train.Batch(0, prompt, cached, torch.arange(24).view(3, 8).double())
    gradients = []
    for part in (1, 3):
        monkeypatch.setattr(methods, "prompts_at_a_time", lambda *_: part)
        policy, _, _ = tiny_world()
        methods.bon_sft_gradient(policy, reference, None, batch, 8, train.TuningSettings(k=2),
                                 torch.Generator().manual_seed(0))
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)

# ----------------------------------------------------------------------------- tables over seeds

def test_spread_is_the_larger_of_two_errors():
    rows = [{"x": 1.0, "x_se": 0.5}, {"x": 1.2, "x_se": 0.7}]
    assert summary.mean_and_spread(rows, "x") == pytest.approx((1.1, 0.6))
    rows = [{"x": 1.0, "x_se": 0.5}, {"x": 5.0, "x_se": 0.7}]
    assert summary.mean_and_spread(rows, "x") == pytest.approx((3.0, math.sqrt(8)))


def test_one_unknown_value_leaves_the_mean_unknown():
    assert summary.mean_and_spread([{"x": 1.0}, {"x": None}], "x") is None


def test_a_perfect_policy_leaves_nothing_to_training():
    rewards = uniform_rewards().repeat(2, 1)            # two prompts
    row = theory.best_of_n(4, rewards) | {"method": "vbon", "n": 4, "beta": None,
                                          "win_rate_se": 0.0}
    found = compare.distances(row, rewards[:, :8], rewards)
    assert found["left_win_rate"] == found["left_reward"] == 0
    assert found["aim_win_rate"] == pytest.approx(0.8, abs=1e-3)
    # best of 4 wins .800, the highest at its KL is .804
    assert found["aim_below_win_rate"] == pytest.approx(0.004, abs=1e-3)


def test_error_of_a_distance_leaves_out_how_prompts_differ():
    """The reward of every response to the second prompt is higher by 100."""
    held = uniform_rewards().repeat(2, 1) + torch.tensor([[0.0], [100.0]])
    reward = held[:, -8:]
    error = compare.error_of_distance({"kl_ref": 0.5}, reward, held)
    assert reward.mean(1).std().item() / 2 ** 0.5 == pytest.approx(50)
    assert error < 1e-6


def test_a_method_of_ones_own_has_a_name_and_a_marker_but_no_aim():
    row = {"method": "mine", "n": 4, "beta": None, "kl_ref": 0.5, "win_rate": 0.75, "reward": 0.7,
           "win_rate_se": 0.01}
    assert summary.title("mine", 4) == "mine"
    assert summary.styles({(4, "mine", None): [row]})["mine"] != summary.STYLES["vbon"]
    rewards = uniform_rewards().repeat(2, 1)
    found = compare.distances(row, rewards[:, :8], rewards)
    assert found["aim_win_rate"] is None and found["below_win_rate"] > 0


def test_seeds_are_grouped_unless_their_beta_was_given():
    rows = [{"n": 2, "method": "kl-rl", "beta": beta, "seed": seed}
            for seed, beta in enumerate([1.0, 1.1])]
    assert [len(group) for group in summary.over_seeds(rows, False).values()] == [2]
    assert [len(group) for group in summary.over_seeds(rows, True).values()] == [1, 1]
    # --beta is that of kl-rl: of other methods, each seed still finds its own
    wind = [row | {"method": "wind"} for row in rows]
    assert [len(group) for group in summary.over_seeds(wind, True).values()] == [2]

# ---------------------------------------------------------------------------- whole, tiny runs

ARGUMENTS = "--quick --n 2 --out"


def read_lines(folder):
    """The lines of results.jsonl without what they took."""
    rows = []
    for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert 0 <= row.pop("seconds") < 600
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A folder in which train.py has run, and its lines."""
    folder = tmp_path_factory.mktemp("first")
    train.main([*ARGUMENTS.split(), str(folder)])
    return folder, read_lines(folder)


@pytest.fixture(scope="module")
def compared(first):
    """The same folder after a comparison with two seeds and all methods, and its lines."""
    folder, _ = first
    compare.main([*ARGUMENTS.split(), str(folder), "--seed", "0", "1"])
    return folder, read_lines(folder)


def test_comparison_writes_the_lines_of_train(first, compared):
    _, before = first
    _, after = compared
    assert [row["method"] for row in before] == ["ref", "bon", "vbon"]
    for row, new in zip(before, after):
        decoded = {"decoded_win_rate", "decoded_win_rate_se"}
        assert new.keys() - row.keys() == decoded
        assert {name: x for name, x in new.items() if name not in decoded} == row


def test_train_writes_the_lines_of_a_comparison(first, tmp_path):
    """The other order, the comparison as a program of its own: status 0."""
    done = subprocess.run(
        [sys.executable, "-m", "experiments.compare", *ARGUMENTS.split(), str(tmp_path),
         "--method", "vbon"], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0
    lines = read_lines(tmp_path)
    train.main([*ARGUMENTS.split(), str(tmp_path)])
    # what the comparison alone has measured stays
    assert read_lines(tmp_path) == lines
    for row in lines:
        assert 0 <= row.pop("decoded_win_rate") <= 1
        assert row.pop("decoded_win_rate_se") > 0
    assert lines == first[1]


def test_comparison_has_a_finite_line_for_each_method_and_seed(compared):
    folder, rows = compared
    found = [(row["seed"], row["method"]) for row in rows]
    wanted = ["ref", "bon", "vbon", "soft-bon", "pessimism", *methods.METHODS]
    assert sorted(found) == sorted((seed, method) for seed in (0, 1) for method in wanted)
    for row in rows:
        for name in set(results.ALWAYS) - {"seconds"}:
            assert math.isfinite(row[name])
        assert (row["beta"] is None) == (row["method"] not in (*theory.WITH_BETA, "soft-bon"))
    assert (folder / "pareto.png").stat().st_size > 10_000
    assert "BoN-SFT" in (folder / "samples.txt").read_text(encoding="utf-8")


def test_comparison_leaves_each_model_as_a_folder(compared):
    folder, rows = compared
    left = {path.name for path in folder.iterdir() if path.is_dir()} - {"cache"}
    wanted = {"reference-seed0", "reference-seed1", "policy-n2-seed0", "policy-n2-seed1"}
    for method in methods.METHODS:
        wanted |= {f"policy-{method}-n2-seed0", f"policy-{method}-n2-seed1"}
    assert left == wanted
    # each has the weights of its own stage, and says which line of the results is its own
    for row in rows:
        if row["method"] in ("ref", "bon", "soft-bon", "pessimism", "vbon"):
            continue
        name = f"policy-{row['method']}-n2-seed{row['seed']}"
        settings = json.loads((folder / name / "settings.json").read_text(encoding="utf-8"))
        assert settings.pop("weights")
        assert settings == {key: row[key] for key in row if key not in results.METRICS}
        stage = f"policy-{row['method']}-*-seed{row['seed']}-*.pt"
        stored = [kept.load(path)["weights"] for path in (folder / "cache").glob(stage)]
        head = load_model(folder / name).lm_head.weight
        assert any(torch.equal(head, weights["lm_head.weight"]) for weights in stored)


def test_comparison_refuses_to_write_over_the_model_it_starts_from(compared):
    folder, _ = compared
    for name in ("reference-seed0", "policy-bond-n2-seed0"):
        with pytest.raises(UnusableInput, match="would overwrite it"):
            compare.main([*ARGUMENTS.split(), str(folder), "--init", str(folder / name)])


def test_a_given_beta_is_trained_once_for_all_n(compared, capsys):
    folder, before = compared
    compare.main(["--quick", "--out", str(folder), "--n", "2", "3", "--method", "kl-rl",
                  "--beta", "0.25"])
    rows = [row for row in read_lines(folder) if row["beta"] == 0.25]
    assert [(row["method"], row["n"]) for row in rows] == [
        ("soft-bon", 2), ("kl-rl", 2), ("soft-bon", 3), ("kl-rl", 3)]
    assert rows[1]["reward"] == rows[3]["reward"]
    assert len(list((folder / "cache").glob("policy-kl-rl-beta0.25-*.pt"))) == 1
    assert (folder / "policy-kl-rl-beta0.25-seed0" / "config.json").exists()


def test_own_words_are_answered_by_all_methods(compared, capsys):
    folder, _ = compared
    compare.main([*ARGUMENTS.split(), str(folder), "--sample", "i watched this"])
    answers = capsys.readouterr().out
    for name in ("reference", "best of 2", "vBoN", "vBoN bound", "KL-RL", "BoN-SFT"):
        assert answers.count(f"  {name:<12}") == 3


def test_studies_say_that_only_ranks_matter_to_vbon(compared, capsys):
    folder, _ = compared
    studies.main([*ARGUMENTS.split(), str(folder)])
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if "largest change of a log target" in line)
    changes = [line[31:].split()[:2] for line in lines[start + 1:start + 5]]
    assert [vbon_change for vbon_change, _ in changes] == ["0"] * 4
    assert all(float(kl_rl_change) > 0 for _, kl_rl_change in changes[1:])
    # the run of train.py with M = 16 is shown
    assert any(line.split()[:1] == ["16"] and "±" in line for line in lines)
    # what the methods aim at
    assert any(line.startswith("  WIND  ") and len(line.split()) == 6 for line in lines)
    # where the KL comes from: the parts of vBoN's responses add up to all of them
    start = next(i for i, line in enumerate(lines) if "of the KL" in line)
    end = next(i for i, line in enumerate(lines) if "F explains" in line)
    shares = [float(line.split()[3].rstrip("%")) for line in lines[start + 1:end]]
    assert sum(shares) == pytest.approx(100, abs=1)
    # reference and three policies at five temperatures
    assert sum(line.split()[:1] in (["reference"], ["vbon"], ["kl-rl"], ["bon-sft"])
               and "%" in line for line in lines) == 20
    for name in ("m.png", "fault.png", "savings.png"):
        assert (folder / name).stat().st_size > 10_000


def test_policies_of_other_settings_are_left_out(compared, capsys):
    folder, _ = compared
    studies.main([*ARGUMENTS.split(), str(folder), "--study", "temperature", "--m", "8"])
    printed = capsys.readouterr().out
    assert printed.count("was made with other settings: it is left out") == 3
    assert "No policies in --out" in printed
    studies.main([*ARGUMENTS.split(), str(folder), "--study", "gap", "--m", "8"])
    assert "No vBoN policy in --out" in capsys.readouterr().out


def test_a_study_that_is_impossible_stops_no_other(compared, capsys):
    """With N = 1 there is no KL to go to."""
    folder, _ = compared
    studies.main(["--quick", "--n", "1", "--out", str(folder)])
    printed = capsys.readouterr().out
    assert "aims is left out" in printed and "scale is left out" in printed
    assert "TreeBoN" in printed
    with pytest.raises(UnusableInput, match="leave out kl-rl|give --beta"):
        studies.main(["--quick", "--n", "1", "--out", str(folder), "--study", "scale"])


def test_sizes_print_a_row_for_each_size(tmp_path, capsys):
    sizes.main(["--quick", "--n", "2", "--seed", "0", "1", "--size", "1x32", "2x64",
                "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert [line[:6] for line in lines] == ["1 x 32", "2 x 64"]
    for line, width, layers in zip(lines, (32, 64), (1, 2)):
        # in each block, linear layers to 3, 1, 4 and from 4 times the width; and the head
        trained = 4 * (layers * (4 + 2 + 5 + 5) * width + width + 400)
        cells = line[10:].split()
        assert cells[0].replace(",", "") == str(trained)
        assert float(cells[1]) == pytest.approx(0.54 / trained ** 0.5, rel=1e-2)


@pytest.mark.parametrize("given", ["--size 2x60", "--size 0x64", "--size 2x0", "--size 2",
                                   "--size x", "--size 2x64x2", "--n 2 4"])
def test_sizes_refuse_what_is_no_model(given, tmp_path):
    with pytest.raises(UnusableInput, match=given.split()[0]):
        sizes.main([*given.split(), "--out", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_one_study_alone_prepares_nothing(tmp_path, capsys):
    studies.main(["--study", "fault", "--out", str(tmp_path / "new")])
    assert "pessimism" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["fault.png"]


def test_the_gap_is_split_by_rank():
    """Rewards 1 to 8, among 400 reference rewards that are spread evenly."""
    reward = torch.arange(1.0, 9.0).expand(2, 8)
    refs = torch.arange(0.5, 8.5, 0.02).expand(2, 400)
    ref_logprob = torch.full((2, 8), -20.0).double()
    log_bon = vbon.bon_target(ref_logprob, reward, refs, 4)
    # right: no part of the KL, and nothing to explain
    rows, explained = gap.gap_by_rank(log_bon, ref_logprob, reward, refs, 4)
    assert [row["kl"] for row in rows] == pytest.approx([0] * len(rows))
    assert explained == pytest.approx(0)
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    # too probable by a nat above F = .8, by half a nat below
    wrong = torch.where(vbon.empirical_cdf(reward, refs) > 0.8, 1.0, 0.5)
    rows, explained = gap.gap_by_rank(log_bon + wrong, ref_logprob, reward, refs, 4)
    assert explained == pytest.approx(1)
    for row in rows:
        size = 1.0 if row["low"] >= 0.8 else 0.5
        assert row["policy"] - row["bon"] == pytest.approx(size)
        assert row["kl"] == pytest.approx(row["share"] * (size - 1 + math.exp(-size)))
    # noise that has nothing to do with F
    noise = torch.tensor([1.0, -1.0]).double()[:, None]
    _, explained = gap.gap_by_rank(log_bon + noise, ref_logprob, reward, refs, 4)
    assert explained == pytest.approx(0, abs=1e-12)


def test_the_gap_counts_each_rank_once():
    """Nine reference rewards: F is .1, .2, ..., 1, and an upper edge belongs to its range."""
    refs = torch.arange(1.0, 10.0)[None]
    reward = torch.arange(0.5, 10.0)[None]
    logprob = torch.linspace(-20, -18, 10)[None]
    rows, _ = gap.gap_by_rank(logprob, logprob - 1, reward, refs, 2)
    found = [(row["low"], row["high"], round(10 * row["share"])) for row in rows]
    assert found == [(0, 0.1, 1), (0.1, 0.2, 1), (0.2, 0.4, 2), (0.4, 0.6, 2), (0.6, 0.8, 2),
                     (0.8, 0.9, 1), (0.95, 1, 1)]
    assert all(row["policy"] == pytest.approx(1) for row in rows)


@pytest.mark.parametrize("m", [16, 256])
def test_errors_of_the_cdf_are_within_their_bound(m):
    found = studies.error_of_cdf(m, 2000)
    assert 0.9 * found["dkw"] < found["sup_95"] <= found["dkw"]
    assert found["rmse_log"] == pytest.approx({16: 0.49, 256: 0.16}[m], abs=0.02)


def test_cost_counts_the_weights_of_all_linear_maps():
    found = studies.cost(1, 8, 2, 50, updates=1)
    # each block has 12 · 8² weights, and small ones; the head 50 · 8
    assert 12 * 64 + 400 < found["weights"] < 12 * 64 + 400 + 200
    assert found["seconds"] > 0 and found["memory"] > 1e7


@pytest.mark.parametrize("arguments, message", [
    ("--n 17 --quick --method bond", "bond wants at most 16"),
    ("--n 5 --quick --method infalign", "infalign wants at most 4"),
    ("--n 0", "want at least 1"),
    ("--beta 1 --method vbon", "it belongs to kl-rl"),
    ("--beta 1 --n 4 16 --method kl-rl", "a call of their own"),
    ("--n 4 --m 2 --quick --method infalign", "infalign wants at most 2"),
    ("--beta 0", "want a number from"),
    ("--method ppo", "invalid choice"),
])
def test_wrong_arguments_are_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnusableInput, match=message):
        compare.main(arguments.split())


def test_help_does_not_wait_for_matplotlib():
    code = ("import sys; from experiments import compare, studies\n"
            "try: compare.main(['--help'])\n"
            "except SystemExit: sys.exit('matplotlib' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == 0
    assert b"--method" in done.stdout
