"""Tests against oracles: enumeration, autograd of the exact quantity, closed forms; no mocks.

    pytest test_vbon.py
"""
import contextlib
import io
import itertools
import json
import math
import subprocess
import sys
import time
from decimal import Decimal, getcontext
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import tiktoken._educational
import torch

import train
import vbon
from assets import figures
from assets.figures import decode, frontier_shares, optimum, targets, theory, tilt
from model import GPT, lm_loss, load_gpt, train_lm
from reward import (PATTERN, Classifier, builtin_reviews, encode, load_reviews, pretrained_encoding,
                    train_classifier, train_tokenizer)
from vbon import Target

HERE = Path(__file__).parent
PROB = torch.tensor([0.1, 0.3, 0.2, 0.15, 0.05, 0.2], dtype=torch.float64)      # six responses
DISTINCT = torch.tensor([2.0, -1.0, 0.5, 3.0, 1.0, -4.0], dtype=torch.float64)
TIED = torch.tensor([2.0, -1.0, 2.0, 3.0, -1.0, -1.0], dtype=torch.float64)


def brute_force_bon(prob, reward, n):
    """π_bon by the definition: over all N-tuples, the best one wins, ties share."""
    bon = torch.zeros_like(prob)
    for draw in itertools.product(range(len(prob)), repeat=n):
        draw = torch.tensor(draw)
        best = draw[reward[draw] == reward[draw].max()]
        bon.index_add_(0, best, prob[draw].prod().expand(len(best)) / len(best))
    return bon


def exact_cdf(prob, reward):
    """P(r' < r) and P(r' <= r) for each response of an enumerated world."""
    less = (prob * (reward < reward[:, None])).sum(1)
    return less, (prob * (reward <= reward[:, None])).sum(1)

# ------------------------------------------------------------------------------ 1. the reward's CDF

def test_cdf_by_hand():
    ref = torch.tensor([[3.0, 1.0, 2.0, 2.0], [0.0, 0.0, 0.0, 7.0]])
    reward = torch.tensor([[0.0, 1.0, 2.0, 2.5, 9.0], [7.0, 0.0, -1.0, 8.0, 1.0]])
    fifths = torch.tensor([[1, 1, 2, 4, 5], [4, 1, 1, 5, 4]], dtype=torch.float64)
    assert torch.equal(vbon.empirical_cdf(reward, ref), fifths / 5)                    # strict rank
    less, at_most = vbon.cdf_interval(reward, ref)
    assert torch.equal(less, (fifths - 1) / 5)
    assert torch.equal(at_most, torch.tensor([[1, 2, 4, 4, 5], [5, 4, 1, 5, 4]]).double() / 5)


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_interval_weight_has_mean_one(n):
    """Each of M + 1 rewards in turn as y, the others as reference, ties included: exactly 1."""
    pool = torch.tensor([0.3, 1.0, 1.0, 2.0, -1.0, 1.0, 5.0])
    others = torch.stack([torch.cat([pool[:i], pool[i + 1:]]) for i in range(len(pool))])
    less, at_most = vbon.cdf_interval(pool[:, None], others)
    weight = vbon.bon_logprob_ties(torch.zeros_like(less), less.log(), at_most.log(), n).exp()
    assert weight.mean().item() == pytest.approx(1, abs=1e-12)


def test_only_the_ranking_of_rewards_matters_to_best_of_n():
    g = torch.Generator().manual_seed(0)
    reward, ref = (torch.randn(4, k, generator=g, dtype=torch.float64) for k in (8, 64))
    logprob = -20 * torch.rand(4, 8, generator=g)
    for f in (torch.sigmoid, lambda r: r ** 3, lambda r: torch.where(r > 1.5, 100 * r, r)):
        for method in ("vbon", "bound", "kl-rl", "soft-bon"):
            before, after = (vbon.log_target(Target(method, 4, 0.5), logprob, a, b)
                             for a, b in ((reward, ref), (f(reward), f(ref))))
            assert torch.equal(before, after) == (method in ("vbon", "bound"))

# -------------------------------------------------------------------- 2. the best-of-N distribution

@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_bon_logprob_is_brute_force(n):
    truth = brute_force_bon(PROB, DISTINCT, n)
    less, at_most = exact_cdf(PROB, DISTINCT)                                 # F of the worst is 0
    ours = vbon.bon_logprob(PROB.log(), less.log(), n).exp()
    assert torch.allclose(ours, truth, atol=1e-14) and ours.sum().item() == pytest.approx(1)
    assert torch.allclose(vbon.bon_logprob_ties(PROB.log(), less.log(), at_most.log(), n).exp(),
                          truth, atol=1e-14)
    truth = brute_force_bon(PROB, TIED, n)
    less, at_most = exact_cdf(PROB, TIED)
    ties = vbon.bon_logprob_ties(PROB.log(), less.log(), at_most.log(), n).exp()
    assert torch.allclose(ties, truth, atol=1e-14) and ties.sum().item() == pytest.approx(1)
    if n > 1:                                                # with ties the paper's form loses mass
        assert vbon.bon_logprob(PROB.log(), less.log(), n).exp().sum() < 0.95


@pytest.mark.parametrize("n", [1, 2, 7, 4096])
@pytest.mark.parametrize("log_p", [-0.0078125, -20.0, -110.0, -2000.0])
@pytest.mark.parametrize("cdf", [0.0, 2 ** -10, 0.5, 1.0])
def test_bon_logprob_against_exact_arithmetic(n, log_p, cdf):
    """log((F + p)^N - F^N) in 1,000 digits more than p needs; inputs are exact in float32 too."""
    getcontext().prec = 1000 + round(-log_p / math.log(10))
    p, f = Decimal(log_p).exp(), Decimal(cdf)
    truth = n * log_p if cdf == 0 else float(((f + p) ** n - f ** n).ln())
    for dtype in (torch.float32, torch.float64):
        inputs = torch.tensor(log_p, dtype=dtype), torch.tensor(cdf, dtype=dtype).double().log(), n
        ours = vbon.bon_logprob(*inputs).item()
        assert ours == pytest.approx(truth, rel=1e-9, abs=1e-9)
        bound = vbon.bon_logprob_bound(*inputs).item()
        assert bound <= ours + 1e-9
        if cdf > 0 and log_p < -30:
            assert bound == pytest.approx(ours, rel=1e-9)                         # the gap closes


def test_where_the_naive_forms_break():
    for dtype, log_p in ((torch.float32, -20.0), (torch.float64, -40.0)):
        p, f = torch.tensor(log_p, dtype=dtype).exp(), torch.tensor(0.5, dtype=dtype)
        assert ((f + p) ** 4 - f ** 4).log() == -math.inf
        assert vbon.bon_logprob(p.log(), f.log(), 4).isfinite()
    p, f = torch.tensor(-110.0).exp(), torch.tensor(0.5)                  # expm1/log1p, in float32
    assert torch.expm1(4 * torch.log1p(p / f)).log() == -math.inf
    with pytest.raises(OverflowError):
        float(math.comb(1030, 515))
    assert torch.tensor(0.0) * torch.tensor(-math.inf) != 0                                   # nan
    for n in (1, 4):
        zero, log_p = torch.tensor(-math.inf), torch.tensor(-3.0)
        assert vbon.bon_logprob(log_p, zero, n).item() == pytest.approx(-3.0 * n)
        assert vbon.bon_logprob_bound(log_p, zero, n).item() == (-3.0 if n == 1 else -math.inf)


def test_general_form_contains_the_other_two():
    log_p, log_f = torch.tensor([-1.5, -9.0]), torch.tensor([0.6, 0.2]).double().log()
    log_le = (log_f.exp() + log_p.double().exp()).log()
    assert torch.allclose(vbon.bon_logprob_ties(log_p, log_f, log_le, 5),
                          vbon.bon_logprob(log_p, log_f, 5))
    assert torch.allclose(vbon.bon_logprob_ties(log_p, log_f, log_f, 5),
                          vbon.bon_logprob_bound(log_p, log_f, 5))


def bon_row(target, draws, refs, g):
    picked = decode(target, **draws, g=g)
    return vbon.metrics(target.n, vbon.log_target(target, *picked, refs), *picked, refs)


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_theory_is_what_simulation_finds(n):
    """best_of_n and both baselines' metrics on rewards that are their own CDF."""
    g = torch.Generator().manual_seed(1)
    draws = dict(reward=torch.rand(200, 100 * n, generator=g),
                 logprob=torch.full((200, 100 * n), -50.0))
    refs = torch.rand(200, 2000, generator=g)
    kl, win = vbon.bon_theory(n)
    row = bon_row(Target("bon", n), draws, refs, g)
    assert row["win_rate"] == pytest.approx(win, abs=0.006)
    assert row["kl_ref"] == pytest.approx(kl, abs=0.03) and row["kl_bon"] == 0
    row = bon_row(Target("ref", n), draws, refs, g)
    assert row["win_rate"] == pytest.approx(0.5, abs=0.01) and row["kl_ref"] == 0
    assert row["kl_bon"] == pytest.approx(n - 1 - math.log(n), rel=0.04, abs=1e-9)
    assert vbon.bon_theory(4) == (pytest.approx(0.636294, abs=1e-6), 0.8)


def test_best_of_n_breaks_ties_at_random():
    reward = torch.tensor([[1.0, 3.0, 3.0, 2.0]]).repeat(4000, 1)
    best = vbon.best_of_n(reward, torch.Generator().manual_seed(0))
    assert set(best.tolist()) == {1, 2} and abs((best == 1).float().mean().item() - 0.5) < 0.04


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_bon_expected_reward_is_the_mean_over_all_subsets(n):
    rewards = torch.tensor([[0.5, -1.0, 2.0, 2.0, 7.0, 0.1], [1.0, 2.0, 3.0, 4.0, 5.0, 60.0]])
    truth = [sum(map(max, itertools.combinations(row, n))) / math.comb(6, n)
             for row in rewards.tolist()]
    assert vbon.bon_expected_reward(rewards, n).tolist() == pytest.approx(truth)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_soft_best_of_n_is_brute_force(n):
    """Six equally likely responses; all (N-1)-tuples of them are the rivals."""
    tuples = torch.cartesian_prod(*[torch.arange(6)] * n).view(-1, n)
    truth = torch.zeros(6, dtype=torch.float64)
    truth.index_add_(0, tuples.flatten(), (TIED[tuples] / 0.7).softmax(1).flatten() / len(tuples))
    rivals = TIED[torch.cartesian_prod(*[torch.arange(6)] * max(1, n - 1))].view(1, -1)
    ours = vbon.log_target(Target("soft-bon", n, 0.7), torch.full((1, 6), 1 / 6).log(), TIED[None],
                           rivals).exp()
    assert torch.allclose(ours[0], truth, atol=1e-7)
    g = torch.Generator().manual_seed(0)
    reward = DISTINCT[None, :n].repeat(20_000, 1)
    drawn = vbon.best_of_n(reward, g, beta=0.7).bincount(minlength=n) / 20_000
    assert torch.allclose(drawn.double(), (DISTINCT[:n] / 0.7).softmax(0), atol=0.015)


def test_soft_best_of_n_while_sampling_is_its_density():
    """The mean of log π/π_ref over answers, from two halves of the same numbers: the decoder's
    frequencies and the formula."""
    g = torch.Generator().manual_seed(3)
    draws = dict(reward=torch.randn(100, 400, generator=g),
                 logprob=torch.full((100, 400), -50.0))
    refs = torch.randn(100, 3000, generator=g)
    picked = decode(Target("soft-bon", 4, 1.0), **draws, g=g)
    weight = vbon.log_target(Target("soft-bon", 4, 1.0), draws["logprob"], draws["reward"],
                             refs).double() + 50                      # log π/π_ref of all draws
    assert weight.exp().mean().item() == pytest.approx(1, abs=0.02)
    expected = (weight.exp() * draws["reward"]).mean().item()
    assert picked[1].mean().item() == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_winners_are_best_of_n_of_the_cached(n):
    truth = brute_force_bon(torch.full((6,), 1 / 6, dtype=torch.float64), TIED, n)
    drawn = vbon.winners(TIED[None], n, 40_000, torch.Generator().manual_seed(1))[0]
    assert torch.allclose(drawn.bincount(minlength=6) / 40_000, truth.float(), atol=0.01)


def test_tilt_is_the_closed_form_and_lies_above_best_of_n():
    """exp(t·F): win rate 1/(1 - e^-t) - 1/t, KL t·win - log((e^t - 1)/t)."""
    ref = torch.randn(3, 4000, generator=torch.Generator().manual_seed(0))
    cdf = vbon.empirical_cdf(ref, ref)
    for t in (0.5, 3.0, 20.0):
        got, win = tilt(t * cdf, ref), 1 / (1 - math.exp(-t)) - 1 / t
        assert got["win_rate"] == pytest.approx(win, abs=1e-3)
        assert got["kl_ref"] == pytest.approx(t * win - math.log(math.expm1(t) / t), abs=2e-3)
    for n in (2, 4, 8, 32):
        got, (kl, win) = optimum(Target("vbon", n), ref), vbon.bon_theory(n)
        assert got["win_rate"] == pytest.approx(win, abs=1e-3)
        assert got["kl_ref"] == pytest.approx(kl, abs=4e-3)
        expected = vbon.bon_expected_reward(ref, n).mean().item()
        assert got["reward"] == pytest.approx(expected, abs=0.01)
        assert got["ess"] == pytest.approx(4000 * (2 * n - 1) / n ** 2, rel=0.01)
    curves = theory(ref)
    for name, plane in (("tilt", "win_rate"), ("kl-rl", "reward")):           # highest in its plane
        best = curves[name]
        for other in curves.values():
            at = other["kl_ref"] < best["kl_ref"][-1]
            highest = np.interp(other["kl_ref"][at], best["kl_ref"], best[plane])
            assert (highest >= other[plane][at] - 1e-3).all()
    beta = 0.8                                      # Gaussian rewards: mean 1/β, KL 1/(2 β²)
    got = optimum(Target("kl-rl", 1, beta), ref)
    assert got["reward"] == pytest.approx(1 / beta, abs=0.12)
    assert got["kl_ref"] == pytest.approx(0.5 / beta ** 2, abs=0.12)

def test_a_bell_moved_upwards_stays_away_from_best_of_n():
    """Rewards N(0, 1) under π_ref, N(δ, 1) under a policy: at best 0.18 nats to best of 4."""
    z = torch.linspace(-9, 11, 4001, dtype=torch.float64)
    log_cdf, kl = torch.special.log_ndtr(z), []
    for delta in torch.linspace(0.8, 1.4, 61, dtype=torch.float64):
        density = (-(z - delta) ** 2 / 2).softmax(0)
        to_ref = delta ** 2 / 2
        kl.append((density * (to_ref - math.log(4) - 3 * log_cdf)).sum().item())
    assert min(kl) == pytest.approx(0.178, abs=0.001)

# ---------------------------------------------------------------- 3. the objective and its gradient

def test_leave_one_out():
    score = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    assert vbon.leave_one_out(score).tolist() == [[4.0, 3.5, 1.5], [1.5, 1.5, 0.0]]


def tiny_world():
    """A real GPT over 3 letters and end-of-text (id 3), and all its 40 responses of length <= 3."""
    model = GPT(4, 4, n_layer=1, n_head=2, n_embd=16, generator=torch.Generator().manual_seed(3))
    for p in model.parameters():
        p.data *= 2                                                     # away from uniform
    strings = {s[:s.index(3) + 1] if 3 in s else s for s in itertools.product(range(4), repeat=3)}
    response = torch.tensor([s + (3,) * (3 - len(s)) for s in sorted(strings)])[None]   # (1, 40, 3)
    reward = torch.randperm(40, generator=torch.Generator().manual_seed(4)).double()[None]
    return model, torch.tensor([[1]]), response, reward


def world_reward(prompt, response):
    """The reward of tiny_world as a function of any responses."""
    _, _, strings, reward = tiny_world()
    code = torch.tensor([16, 4, 1])
    table = torch.zeros(64, dtype=torch.float64).scatter(0, (strings[0] * code).sum(-1), reward[0])
    return table[(response * code).sum(-1)]


def exact_bon(model, prompt, response, reward, n):
    """log π_bon (1, 40) with the exact F of the enumerated world."""
    with torch.no_grad():
        logprob = vbon.response_logprob(model, prompt, response)
    less, _ = exact_cdf(logprob[0].exp(), reward[0])
    return vbon.bon_logprob(logprob, less.log()[None], n)


def exact_kl(policy, log_bon, prompt, response, forward=False):
    """KL(π_θ || π_bon), or forward KL(π_bon || π_θ), summed over every response."""
    logprob = vbon.response_logprob(policy, prompt, response)
    return ((log_bon.exp() if forward else logprob.exp()) * (logprob - log_bon)).sum().abs()


def gradient(y, model):
    """dy/dθ as one vector."""
    parts = torch.autograd.grad(y, list(model.parameters()), retain_graph=True)
    return torch.cat([part.flatten() for part in parts])


def test_probabilities_of_all_responses_sum_to_one():
    model, prompt, response, _ = tiny_world()
    total = vbon.response_logprob(model, prompt, response).exp().sum().item()
    assert total == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("k", [2, 3])
def test_expected_gradient_is_autograd_of_the_exact_kl(k):
    """Equation (6): reverse_kl_loss's gradient, averaged over all K-tuples by probability."""
    reference, prompt, response, reward = tiny_world()
    keep = torch.tensor([0, 1, 5, 17, 30, 39]) if k == 3 else torch.arange(40)
    log_bon = exact_bon(reference, prompt, response, reward, 4)[:, keep]
    logits = torch.randn(len(keep), dtype=torch.float64, generator=torch.Generator().manual_seed(9),
                         requires_grad=True)
    logprob = logits.log_softmax(0)
    exact, = torch.autograd.grad((logprob.exp() * (logprob - log_bon[0])).sum(), logits,
                                 retain_graph=True)
    tuples = torch.cartesian_prod(*[torch.arange(len(keep))] * k)
    weight = logprob.detach()[tuples].sum(1).exp()                                # (K-tuples,)
    mean = sum(w * vbon.reverse_kl_loss(logprob[t][None], log_bon[0, t][None])
               for w, t in zip(weight, tuples))
    drawn, = torch.autograd.grad(mean, logits)
    assert torch.allclose(drawn, exact, atol=1e-9)


def test_gradient_through_the_model_and_the_bias_of_the_per_token_kl():
    """The surrogate through a real GPT; why response_kl is reported, never differentiated."""
    reference, prompt, response, reward = tiny_world()
    policy, *_ = tiny_world()
    g = torch.Generator().manual_seed(5)
    for p in policy.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=g)
    log_bon = exact_bon(reference, prompt, response, reward, 4)
    exact = gradient(exact_kl(policy, log_bon, prompt, response), policy)
    logprob = vbon.response_logprob(policy, prompt, response)
    weight = logprob.detach().exp()[0]
    pairs = torch.cartesian_prod(torch.arange(40), torch.arange(40))
    # the loss is linear in the log-probabilities: first its gradient, then the model's
    leaf = logprob.detach()[0][pairs].requires_grad_()
    loss = vbon.reverse_kl_loss(leaf, log_bon[0][pairs])                           # mean over pairs
    per_pair = torch.autograd.grad(loss, leaf)[0] * len(pairs) * (weight[pairs].prod(1)[:, None])
    by_string = torch.zeros(40, dtype=torch.float64)
    by_string.index_add_(0, pairs.flatten(), per_pair.flatten())
    drawn = gradient((logprob[0] * by_string).sum(), policy)
    assert (drawn - exact).norm() < 1e-4 * exact.norm()

    to_ref = vbon.response_logprob(reference, prompt, response).detach()
    true_kl = exact_kl(policy, to_ref, prompt, response)
    per_token = vbon.response_kl(policy, reference, prompt, response)
    assert (per_token >= -1e-6).all()
    assert (weight * per_token[0]).sum().item() == pytest.approx(true_kl.item(), abs=1e-5)
    right, naive = gradient(true_kl, policy), gradient((weight * per_token[0]).sum(), policy)
    assert (naive - right).norm() > 0.1 * right.norm()


@pytest.mark.parametrize("method,n,steps", [("vbon", 4, 220), ("bound", 4, 260), ("kl-rl", 1, 150),
                                            ("bon-sft", 4, 300), ("bond", 4, 300)])
def test_training_reaches_the_exact_target(method, n, steps):
    """The optimum of each method is the distribution that it claims, on the enumerated world."""
    reference, prompt, response, reward = tiny_world()
    policy, *_ = tiny_world()
    target = Target(method, n, 12.0 if method == "kl-rl" else None)
    goal = exact_bon(reference, prompt, response, reward, n)
    with torch.no_grad():
        ref_logprob = vbon.response_logprob(reference, prompt, response)
    if method == "bound":
        less, _ = exact_cdf(ref_logprob[0].exp(), reward[0])
        goal = (ref_logprob + (n - 1) * less.log()).log_softmax(1)
        goal[0, less == 0] = -100                                   # π_bon of the very worst is not
    if method == "kl-rl":
        goal = (ref_logprob + reward / target.beta).log_softmax(1)
    g = torch.Generator().manual_seed(6)
    cached, _ = vbon.sample(reference, prompt, 20_000, 3, g)
    ref_rewards = world_reward(prompt, cached)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.005)
    before = exact_kl(policy, goal, prompt, response, method == "bon-sft").item()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.006 * (1 - step / steps)
        seen = vbon.update(policy, reference, optimizer, world_reward,
                           vbon.grow(target, step, steps), prompt, cached, ref_rewards, 512, g)
    after = exact_kl(policy, goal, prompt, response, method == "bon-sft").item()
    assert after < 0.015 < 0.1 < before, (before, after)
    if method != "vbon":
        return
    assert abs(seen["kl_target"] - after) < 0.02
    # the same numbers from the evaluation, which has no access to the exact distribution
    drawn, logprob = vbon.sample(policy, prompt, 20_000, 3, g)
    to_ref = vbon.response_logprob(reference, prompt, drawn).detach()
    kl_ref = vbon.response_kl(policy, reference, prompt, drawn).detach()
    twice = [x.repeat(2, 1) for x in (logprob, to_ref, world_reward(prompt, drawn), ref_rewards)]
    row = vbon.metrics(n, *twice, kl_ref.repeat(2, 1))
    assert row["kl_ref"] == pytest.approx(exact_kl(policy, ref_logprob, prompt, response).item(),
                                          abs=0.02)
    assert row["kl_bon"] == pytest.approx(after, abs=0.01)

# -------------------------------------------------------------------------- 4. sampling and scoring

def test_mask_by_hand():
    response = torch.tensor([[[5, 9, 9, 9], [9, 9, 9, 9], [1, 2, 3, 4], [1, 2, 3, 9]]])
    assert vbon.response_mask(response, 9).int().tolist() == [
        [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]]


def small_gpt():
    model = GPT(20, 12, n_layer=2, n_head=2, n_embd=16, generator=torch.Generator().manual_seed(0))
    for p in model.parameters():
        p.data *= 4
    return model


def test_log_probability_while_sampling_is_the_one_scored_later():
    g = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, 19, (6, 3), generator=g)
    response, sampled = vbon.sample(small_gpt(), prompt, 50, 9, g, rows=128)
    lengths = vbon.response_mask(response, 19).sum(-1)
    assert lengths.min() < 4 and lengths.max() == 9 and (response[:, :, -1] != 19).any()
    scored = vbon.response_logprob(small_gpt(), prompt, response)
    assert torch.allclose(sampled.double(), scored, atol=2e-4)


def test_samples_follow_the_enumerated_distribution():
    model, prompt, response, _ = tiny_world()
    drawn, _ = vbon.sample(model, prompt, 40_000, 3, torch.Generator().manual_seed(2))
    prob = vbon.response_logprob(model, prompt, response).exp()[0]
    count = (drawn[0][:, None] == response).all(-1).sum(0)
    assert count.sum() == 40_000
    assert ((count / 40_000 - prob).abs() < 5 * (prob / 40_000).sqrt() + 1e-6).all()


def test_cached_attention_is_full_attention_and_looks_only_back():
    g = torch.Generator().manual_seed(1)
    model, tokens = small_gpt(), torch.randint(0, 20, (5, 12), generator=g)
    with torch.no_grad():
        full = model(tokens)
        cache = model.new_cache(5, 12)
        parts = [model(tokens[:, :4], cache)]
        parts += [model(tokens[:, t:t + 1], cache, t) for t in range(4, 12)]
        assert full.shape == (5, 12, 20) and torch.allclose(torch.cat(parts, 1), full, atol=1e-4)
        changed = tokens.clone()
        changed[:, 7:] = (changed[:, 7:] + 1) % 20
        assert torch.allclose(model(changed)[:, :7], full[:, :7], atol=1e-5)


def test_chunks_change_nothing(monkeypatch):
    """Scores and, where no draw is involved (best of one cached response), the update itself."""
    g = torch.Generator().manual_seed(0)
    prompt, whole = torch.randint(0, 19, (6, 3), generator=g), []
    cached, logprob = vbon.sample(small_gpt(), prompt, 1, 9, g)
    for logits in (2 ** 26, 20 * 12 * 2):
        monkeypatch.setattr(vbon, "LOGITS", logits)
        assert torch.allclose(vbon.response_logprob(small_gpt(), prompt, cached), logprob.double(),
                              atol=2e-4)
        policy = small_gpt()
        seen = vbon.update(policy, None, torch.optim.SGD(policy.parameters(), 0.1), None,
                           Target("bon-sft", 2), prompt, cached, torch.zeros(6, 1), 2, g)
        assert seen["nll"] == pytest.approx(-logprob.mean().item(), abs=1e-4)
        whole.append(torch.cat([p.flatten() for p in policy.parameters()]))
    assert torch.allclose(*whole, atol=1e-5) and not torch.allclose(
        whole[0], torch.cat([p.flatten() for p in small_gpt().parameters()]), atol=1e-3)


def test_low_rank_updates_are_of_low_rank():
    policy, tokens = small_gpt(), torch.arange(12)[None]
    trained = vbon.low_rank(policy, 2, torch.Generator().manual_seed(0))
    assert torch.equal(policy(tokens), small_gpt()(tokens))                   # starts at π_ref
    assert (model := small_gpt()).lm_head.weight is model.wte.weight              # tied before
    assert sum(p.requires_grad for p in policy.parameters()) == len(trained) == 2 * (1 + 4 * 2)
    optimizer = torch.optim.Adam(trained, lr=0.01)
    for _ in range(3):
        policy(tokens).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        after = policy(tokens)
    weights = {name: attrgetter(name)(policy).detach() for name in small_gpt().state_dict()}
    plain = load_gpt(dict(config=policy.config, weights=weights), "cpu")
    assert torch.allclose(plain(tokens), after, atol=1e-4) and not torch.allclose(
        after, small_gpt()(tokens), atol=1e-2)
    for (name, new), old in zip(plain.state_dict().items(), small_gpt().state_dict().values()):
        change = torch.linalg.matrix_rank((new - old).double(), atol=1e-4).item() if (
            new.dim() == 2) else (new != old).sum().item()
        assert change == (2 if new.dim() == 2 and name[:2] not in ("wt", "wp") else 0), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
def test_cuda_agrees_with_the_cpu():
    g = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, 19, (6, 3), generator=g)
    response, _ = vbon.sample(small_gpt(), prompt, 50, 9, g)
    there = small_gpt().cuda()
    scored = vbon.response_logprob(there, prompt.cuda(), response.cuda())
    assert torch.allclose(vbon.response_logprob(small_gpt(), prompt, response), scored, atol=0.3)
    drawn, logprob = vbon.sample(there, prompt.cuda(), 2000, 9, torch.Generator("cuda"))
    again = vbon.response_logprob(small_gpt(), prompt, drawn.cpu())                   # bfloat16
    assert logprob.mean().item() == pytest.approx(again.mean().item(), abs=0.05)


def test_grow_ends_at_the_target():
    grown = [vbon.grow(Target("vbon", 16), step, 10) for step in range(10)]
    assert [target.n for target in grown] == [2, 4, 8] + 7 * [16] and grown[-1].beta is None
    assert vbon.grow(Target("vbon", 5), 0, 1) == Target("vbon", 5)
    grown = [vbon.grow(Target("kl-rl", 1, 0.5), step, 10) for step in range(10)]
    assert [1 / target.beta for target in grown] == pytest.approx([0.5, 1, 1.5] + 7 * [2])

# ------------------------------------------------------------------------------------ 5. evaluation

def test_win_rate_and_metrics_by_hand():
    ref = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    assert vbon.win_rate(torch.tensor([[-1.0, 0.0, 1.5, 3.0, 4.0]]), ref).tolist() == [
        [0, 0.125, 0.5, 0.875, 1]]
    reward, logprob = torch.tensor([[1.0, 3.0], [5.0, 7.0], [3.0, -5.0]]), torch.full((3, 2), -9.0)
    row = vbon.metrics(2, logprob + 1, logprob, reward, ref.expand(3, 4))
    assert row["reward"] == pytest.approx(7 / 3) and row["positive"] == pytest.approx(5 / 6)
    assert row["reward_se"] == pytest.approx(torch.tensor([2.0, 6.0, -1.0]).std().item() / 3 ** 0.5)
    assert row["kl_ref"] == 1 and row["kl_ref_se"] == 0
    cdf = torch.tensor([2, 4, 5, 5, 4, 1]) / 5                              # ties: strict
    assert row["kl_bon"] == pytest.approx(1 - (2 * cdf + math.exp(-9)).log().mean().item())
    assert vbon.metrics(2, logprob, logprob, reward, ref.expand(3, 4), 0 * reward)["kl_ref"] == 0


def test_decode_by_hand():
    reward = torch.tensor([[1.0, 4.0, 3.0, 2.0]])
    g = torch.Generator().manual_seed(0)
    assert decode(Target("ref", 2), reward - 9, reward, g)[1].tolist() == [[1, 3]]
    logprob, best = decode(Target("bon", 2), reward - 9, reward, g)
    assert best.tolist() == [[4, 3]] and torch.equal(logprob, best - 9)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_without_beta_kl_rl_goes_as_far_as_best_of_n(n):
    rewards = 2 * torch.randn(8, 2000, generator=torch.Generator().manual_seed(0))
    *others, target = targets(["kl-rl"], n, None, rewards)
    assert [other.method for other in others] == ["ref", "bon", "soft-bon"]
    assert optimum(target, rewards)["kl_ref"] == pytest.approx(vbon.bon_theory(n)[0], rel=0.06)
    both = targets(["bond", "soft-bon"], n, [3.0, 1.0], rewards)
    assert [target.beta for target in both] == [None, None, 3.0, 1.0, None]


def test_frontier_shares_by_hand():
    points = [("vbon", 1.0, 0.8), ("vbon", 2.0, 0.9), ("kl-rl", 1.0, 0.7), ("kl-rl", 0.5, 0.7),
              ("kl-rl", 3.0, 0.85), ("bond", 2.0, 0.9)]
    rows = [dict(method=m, seed=0, kl_ref=kl, win_rate=win) for m, kl, win in points]
    rows += [dict(method="bond", seed=1, kl_ref=9.0, win_rate=0.1)]     # alone among its own seed
    shares = frontier_shares(rows, "win_rate")
    assert {m: x[0] for m, x in shares.items()} == {"vbon": 1, "kl-rl": 1 / 3, "bond": 1}
    assert shares["vbon"][1:] == (1, 1) and shares["kl-rl"][1] == 0 < shares["kl-rl"][2]


@pytest.mark.parametrize("call", [
    lambda: vbon.bon_logprob(torch.zeros(2), torch.zeros(2), 0),
    lambda: vbon.bon_logprob(torch.zeros(2), torch.zeros(2), 2.0),
    lambda: vbon.bon_logprob(torch.zeros(2), torch.zeros(3), 2),
    lambda: vbon.bon_logprob_bound(torch.tensor([math.nan]), torch.zeros(1), 2),
    lambda: vbon.bon_logprob_ties(torch.zeros(2), torch.zeros(2), torch.zeros(3), 2),
    lambda: vbon.bon_theory(0), lambda: vbon.bon_theory(True),
    lambda: vbon.empirical_cdf(torch.zeros(2, 3), torch.zeros(3, 3)),
    lambda: vbon.empirical_cdf(torch.zeros(3), torch.zeros(3)),
    lambda: vbon.empirical_cdf(torch.zeros(2, 3), torch.zeros(2, 0)),
    lambda: vbon.cdf_interval(torch.tensor([[math.nan]]), torch.zeros(1, 2)),
    lambda: vbon.empirical_cdf(torch.zeros(1, 2), torch.tensor([[math.inf, 0]])),
    lambda: vbon.best_of_n(torch.zeros(3)), lambda: vbon.best_of_n(torch.tensor([[math.nan, 1]])),
    lambda: vbon.bon_expected_reward(torch.zeros(1, 3), 4),
    lambda: vbon.bon_expected_reward(torch.zeros(1, 3), 0),
    lambda: vbon.leave_one_out(torch.zeros(3, 1)), lambda: vbon.leave_one_out(torch.zeros(3)),
    lambda: vbon.reverse_kl_loss(torch.zeros(3, 1), torch.zeros(3, 1)),
    lambda: vbon.reverse_kl_loss(torch.zeros(3, 2), torch.zeros(2, 3)),
    lambda: vbon.reverse_kl_loss(torch.zeros(1, 2), torch.tensor([[0.0, -math.inf]])),
    lambda: vbon.log_target(Target("nonsense", 2), *torch.zeros(3, 1, 1)),
    lambda: GPT(10, 4, n_head=3, n_embd=16)])
def test_bad_arguments_are_refused(call):
    with pytest.raises(ValueError, match="."):
        call()

# ----------------------------------------------------------------------------- GPT-2's own files

CONFIG = dict(vocab_size=50, n_positions=12, n_embd=16, n_layer=3, n_head=4,
              activation_function="gelu_new", layer_norm_epsilon=1e-5)


def gpt2_weights(scale=0.3):
    """Random tensors under the names and shapes of a GPT-2 checkpoint."""
    g = torch.Generator().manual_seed(0)
    shapes = {"wte.weight": (50, 16), "wpe.weight": (12, 16), "ln_f.weight": (16,),
              "ln_f.bias": (16,)}
    for i in range(3):
        for name, shape in {"ln_1": (16,), "attn.c_attn": (16, 48), "attn.c_proj": (16, 16),
                            "ln_2": (16,), "mlp.c_fc": (16, 64), "mlp.c_proj": (64, 16)}.items():
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[-1:]}
    return {name: scale * torch.randn(shape, generator=g) for name, shape in shapes.items()}


def numpy_gpt2(w, tokens):
    """GPT-2's logits (T, V), written down a second time, in float64."""
    w = {name: x.double().numpy() for name, x in w.items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * w[name + ".weight"] + w[name + ".bias"]

    x, T = w["wte.weight"][tokens] + w["wpe.weight"][:len(tokens)], len(tokens)
    for h in ("h.0.", "h.1.", "h.2."):
        qkv = norm(x, h + "ln_1") @ w[h + "attn.c_attn.weight"] + w[h + "attn.c_attn.bias"]
        out = []
        for head in range(4):
            q, k, v = (qkv[:, 16 * part + 4 * head:][:, :4] for part in range(3))
            score = np.where(np.tri(T, dtype=bool), q @ k.T / 2, -np.inf)
            prob = np.exp(score - score.max(-1, keepdims=True))
            out.append(prob / prob.sum(-1, keepdims=True) @ v)
        x = x + np.concatenate(out, -1) @ w[h + "attn.c_proj.weight"] + w[h + "attn.c_proj.bias"]
        u = norm(x, h + "ln_2") @ w[h + "mlp.c_fc.weight"] + w[h + "mlp.c_fc.bias"]
        u = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3)))
        x = x + u @ w[h + "mlp.c_proj.weight"] + w[h + "mlp.c_proj.bias"]
    return norm(x, "ln_f") @ w["wte.weight"].T


def save_gpt2(folder, weights, config=CONFIG, safetensors=False):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if not safetensors:
        return torch.save(weights, folder / "pytorch_model.bin")
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, x in weights.items():
        part = x.numpy().tobytes()
        header[name] = dict(dtype="F32", shape=[*x.shape],
                            data_offsets=[len(data), len(data) + len(part)])
        data += part
    head = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + data)


@pytest.mark.parametrize("scale", [0.02, 0.3])
def test_gpt2_checkpoints_give_gpt2_logits(tmp_path, scale):
    weights, tokens = gpt2_weights(scale), [3, 1, 4, 1, 5, 9, 2, 6]
    truth = numpy_gpt2(weights, tokens)
    extra = {"transformer." + name: x for name, x in weights.items()} | {
        "lm_head.weight": weights["wte.weight"],
        "transformer.h.0.attn.bias": torch.ones(1, 1, 12, 12)}
    for number, (saved, safe) in enumerate(itertools.product((weights, extra), (False, True))):
        save_gpt2(tmp_path / str(number), saved, safetensors=safe)
        with torch.no_grad():
            logits = GPT.from_pretrained(str(tmp_path / str(number)))(torch.tensor([tokens]))[0]
        assert np.abs(logits.numpy() - truth).max() < 1e-5 * np.abs(truth).max()
    save_gpt2(tmp_path / "0", weights, CONFIG | dict(activation_function="relu"))
    other = GPT.from_pretrained(str(tmp_path / "0"))(torch.tensor([tokens]))[0].detach().numpy()
    assert np.abs(other - truth).max() > 1e-3 * np.abs(truth).max()


class Code:
    """What a hostile pickle does when it is loaded as an object."""
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_unsound_gpt2_checkpoints_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    w, name = gpt2_weights(), "h.1.mlp.c_fc.weight"
    for bad in (w | {name: w[name].T}, w | {name: w[name][:-1]}, w | {"other": torch.zeros(3)},
                {n: x for n, x in w.items() if n != name}, w | {name: Code()}, w | {name: 3},
                w | {"lm_head.weight": 2 * w["wte.weight"]}, [1, 2], {}):
        save_gpt2(tmp_path / "x", bad)
        with pytest.raises(ValueError, match="x: no sound GPT-2") as error:
            GPT.from_pretrained("x")
        assert "\n" not in str(error.value) and not (tmp_path / "executed").exists()
    for change in (dict(n_embd=8), dict(activation_function="step"), dict(n_head=3),
                   dict(scale_attn_by_inverse_layer_idx=True), dict(n_layer=2)):
        save_gpt2(tmp_path / "x", w, CONFIG | change)
        with pytest.raises(ValueError, match="x: no sound GPT-2"):
            GPT.from_pretrained("x")
    for file, safe in (("pytorch_model.bin", False), ("model.safetensors", True)):
        save_gpt2(tmp_path / "x", w, safetensors=safe)
        content = (tmp_path / "x" / file).read_bytes()
        for length in (0, 5, 100, len(content) - 1):
            (tmp_path / "x" / file).write_bytes(content[:length])
            with pytest.raises(ValueError, match="x: no sound GPT-2"):
                GPT.from_pretrained("x")


def test_gpt2_vocabulary_comes_from_its_own_folder(tmp_path):
    """Merges are written as GPT-2 does, bytes as printable characters; two folders, no mix-up."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    order = printable + [b for b in range(256) if b not in printable]
    letter = {b: chr(b) if b in printable else chr(256 + order.index(b) - len(printable))
              for b in order}
    for word in ("ab", " c"):
        ids = {letter[b]: i for i, b in enumerate(order)}
        left, right = (letter[b] for b in word.encode())
        ids |= {left + right: 256, "<|endoftext|>": 257}
        (tmp_path / "vocab.json").write_text(json.dumps(ids))
        (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{left} {right}\n")
        encoding = pretrained_encoding(str(tmp_path))
        assert encoding.n_vocab == 258 and encoding.eot_token == 257
        assert encoding.encode_ordinary(word) == [256] and len(encoding.encode_ordinary("xy")) == 2
        for text in ODD:
            assert encoding.decode(encoding.encode_ordinary(text)) == text
    # the whole program from such a folder, if model and vocabulary fit
    args = ["--quick", "--n", 2, "--init", tmp_path, "--steps", 2]
    for rows in (50, 258):
        w = {name: 0.1 * x for name, x in gpt2_weights().items()}
        w["wte.weight"] = 0.1 * torch.randn(rows, 16, generator=torch.Generator().manual_seed(0))
        save_gpt2(tmp_path, w, CONFIG | dict(vocab_size=rows))
        code, text, error = run(*args, cwd=tmp_path)
        assert code == (0 if rows == 258 else 2) and (rows == 258 or "50 tokens" in error)
    assert len(results(tmp_path / "out")) == 3 and results(tmp_path / "out")[0]["length"] == 8
    saved = train.load(next((tmp_path / "out/cache").glob("reference*.pt")))
    assert saved["config"]["n_layer"] == 3                     # those weights, hardly moved
    assert (saved["weights"]["wte.weight"] - w["wte.weight"]).abs().max() < 0.01
    (tmp_path / "merges.txt").write_text("#version: 0.2\nx y\n")
    with pytest.raises(ValueError, match="no GPT-2 vocabulary"):
        pretrained_encoding(str(tmp_path))

# ------------------------------------------------------------------------- tokenizer, model, reward

ODD = ["", " ", "a film", "naïve café", "日本語の映画", "🎬🍿", "tabs\t\n\n  and\r\n",
       "'s don't 12_3__ !?", "\x00\u2028é"]


def test_tokenizer_round_trip_and_merges():
    texts = [text for text, _ in builtin_reviews(300, 0)]
    encoding = train_tokenizer(texts, 400)
    for text in ODD + texts[:50]:
        assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert encoding.n_vocab == 400 and encoding.eot_token == 399
    theirs = tiktoken._educational.bpe_train("\n".join(texts), 290, PATTERN, visualise=None)
    ours = train_tokenizer(["\n".join(texts)], 291)                     # then two pairs tie
    assert [ours.decode_single_token_bytes(i) for i in range(290)] == list(theirs)
    assert train_tokenizer(["ab"], 1000).n_vocab == 258                   # all bytes, one pair, end
    assert encode(encoding, ["", texts[0]], 5)[0].tolist() == [399] * 5


def test_language_model_learns_the_text():
    encoding = train_tokenizer((text for text, _ in builtin_reviews(300, 0)), 400)
    tokens = encode(encoding, [text for text, _ in builtin_reviews(300, 0)], 24)
    g = torch.Generator().manual_seed(0)
    model = GPT(400, 24, n_embd=32, generator=g)
    before = lm_loss(model, tokens).item()
    train_lm(model, tokens, 60, 32, 1e-2, g, range(60))
    assert before == pytest.approx(math.log(400), abs=0.1)
    assert lm_loss(model, tokens).item() < 4


def test_classifier_learns_sentiment_and_ignores_what_follows_the_end():
    reviews = builtin_reviews(3000, 0)
    encoding = train_tokenizer((text for text, _ in reviews[:500]), 512)
    tokens = encode(encoding, [text for text, _ in reviews], 40)
    labels = torch.tensor([label for _, label in reviews])
    g = torch.Generator().manual_seed(0)
    model = train_classifier(tokens[500:], labels[500:], 512, range(4), g)
    with torch.no_grad():
        assert ((model(tokens[:500]) > 0) == labels[:500]).float().mean() > 0.8
        good, bad = encode(encoding, ["i loved it . superb .", "i hated it . awful ."], 40)
        assert model(good[None]) > 0.5 and model(bad[None]) < -0.5
        longer = torch.cat([tokens[:9], torch.full((9, 7), 511)], 1)
        assert torch.allclose(model(tokens[:9]), model(longer), atol=1e-5)
        assert torch.equal(model.reward(good[None, :4], good[None, None, 4:])[0], model(good[None]))
    assert Classifier(512)(tokens[:3]).tolist() == [0, 0, 0]


def test_builtin_reviews_are_as_described():
    reviews = builtin_reviews(4000, 1)
    assert reviews == builtin_reviews(4000, 1) != builtin_reviews(4000, 2)
    assert len({text for text, _ in reviews}) > 3900
    assert 0.45 < sum(y for _, y in reviews) / 4000 < 0.55

# ----------------------------------------------------------------------------------------- train.py

def run(*args, cwd, program=train):
    """Status, standard output and standard error of a command, without a new process."""
    code, out, error = 0, io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            program.main([str(arg) for arg in args])
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), error.getvalue()


def results(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_quick_run_its_cache_and_its_results(tmp_path):
    code, text, error = run("--quick", "--n", 2, cwd=tmp_path)
    assert code == 0 and error == "" and "theory, N = 2" in text
    rows = results(tmp_path / "out")
    assert [row["method"] for row in rows] == ["ref", "bon", "vbon"]
    for row in rows:
        assert row["n"] == 2 and row["seed"] == 0 and row["beta"] is None and row["seconds"] >= 0
        for name in ("reward", "win_rate", "kl_ref", "kl_bon"):
            assert math.isfinite(row[name]) and math.isfinite(row[name + "_se"])
    assert rows[1]["kl_ref"] == pytest.approx(vbon.bon_theory(2)[0], abs=0.1)
    assert (tmp_path / "out/pareto.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "out/samples.txt").read_text().count("vBoN") == 8

    # another N, with a damaged stage: only that is made again, and the first result is kept
    victim = next((tmp_path / "out/cache").glob("training-*.pt"))
    victim.write_bytes(victim.read_bytes()[:-100] + bytes(100))
    code, text, _ = run("--quick", "--n", 4, 2, "--method", "vbon", "bound", cwd=tmp_path)
    assert code == 0 and text.count("corrupt") == 1 and victim.name in text
    assert text.count("already there") == 4
    again = results(tmp_path / "out")
    assert len(again) == 8 and not [*tmp_path.glob("out/policies/*.checkpoint")]
    assert (tmp_path / "out/samples.txt").read_text().count("vBoN bound") == 2 * 8
    for row in rows + again:
        del row["seconds"]
    assert all(row in again for row in rows)

    # every method, two seeds; β as given, or found so that its optimum is as far as best-of-n
    methods = ["vbon", "bound", "kl-rl", "bon-sft", "bond"]
    code, text, error = run("--quick", "--n", 2, "--seed", 0, 1, "--method", *methods,
                            cwd=tmp_path)
    assert code == 0 and error == "" and "frontier" in text
    rows = [row for row in results(tmp_path / "out") if row["n"] == 2 and row["seed"] == 1]
    assert [row["method"] for row in rows] == ["ref", "bon", "soft-bon", *methods]
    for row in rows:
        assert (row["beta"] is not None) == (row["method"] in ("kl-rl", "soft-bon"))
        assert row["beta_found"] == (row["beta"] is not None)
    assert len({row["reward"] for row in results(tmp_path / "out") if row["method"] == "ref"}) == 3
    code, text, error = run("--quick", "--n", 2, "--method", "kl-rl", "--beta", 0.5, 2,
                            cwd=tmp_path)
    assert code == 0 and error == ""
    given = [(row["beta"], row["beta_found"]) for row in results(tmp_path / "out")[-4:]]
    assert given == 2 * [(0.5, False), (2, False)]


def test_the_three_questions_and_own_words(tmp_path):
    assert run("--quick", "--n", 2, cwd=tmp_path)[0] == 0
    code, text, error = run("--quick", "--n", 2, cwd=tmp_path, program=figures)
    assert code == 0 and error == "" and (tmp_path / "out/m-n2.png").exists()
    assert "probability" in text and "RMSE" in text

    code, text, _ = run("--quick", "--n", 2, "--sample", "i watched this", cwd=tmp_path)
    assert code == 0 and text.count("i watched this ...") == 3 and "best of 2" in text
    code, _, error = run("--quick", "--n", 2, "--sample", "words " * 99, cwd=tmp_path)
    assert code == 2 and error.count("\n") == 1


def test_what_a_run_depends_on(tmp_path):
    """Neither on the other N nor on what ran before, but on every setting, such as M."""
    args = ["--quick", "--steps", 5, "--method", "vbon", "kl-rl", "--beta", 0.5]
    assert run(*args, "--n", 9, "--out", "one", cwd=tmp_path)[0] == 0
    code, text, _ = run(*args, "--n", 2, 9, "--out", "two", cwd=tmp_path)
    assert code == 0 and "n=9 15/15" in text and "n=2 5/5" in text   # threefold
    one, two = (without_seconds(tmp_path / name) for name in ("one", "two"))
    assert len(one) == 5 and one == [row for row in two if row["n"] == 9]
    code, text, _ = run(*args, "--n", 9, "--m", 20, "--out", "two", cwd=tmp_path)
    assert code == 0 and text.count("already there") == 3                       # all but training
    assert run(*args, "--n", 2, "--out", "two", cwd=tmp_path)[0] == 0
    assert sorted(row["m"] for row in results(tmp_path / "two")) == 10 * [16] + 5 * [20]
    with contextlib.chdir(tmp_path):
        w = train.build_world(train.prepare(["--quick"]), 0)
    held, trained = (set(map(tuple, x.tolist())) for x in (w.held, w.prompt))
    assert not held & trained and len(held) == len(trained) == 8
    assert not torch.equal(w.held_rewards, w.draws["reward"])      # F is from others than best-of-N


def test_wrong_usage_is_status_2_and_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for name, pos, neg in (("one", "good\n" * 200, None), ("few", "good\n", "bad\n"),
                           ("empty", "", ""), ("latin", "caf\xe9\n", "bad\n")):
        (tmp_path / name).mkdir()
        for label, text in (("pos", pos), ("neg", neg)):
            if text is not None:
                (tmp_path / name / f"{label}.txt").write_bytes(text.encode("latin1"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/results.jsonl").write_text("not json\n")
    for args in (["--n", "0"], ["--n", "2.5"], ["--n", "999"], ["--n", "17", "--method", "kl-rl"],
                 ["--beta", "nan"], ["--method", "dpo"], ["--nonsense"], ["--data", "nowhere"],
                 ["--data", "one"], ["--data", "few"],
                 ["--data", "empty"], ["--data", "latin"], ["--device", "abacus"],
                 ["--out", "file"], ["--out", "broken"], ["--sample", " "], ["--init", "few"],
                 ["--init", "nowhere"]):
        with pytest.raises(SystemExit) as stop:
            train.main(["--quick", *args])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("train.py: error:"), (args, error)
        assert error.count("\n") == 1, error
    assert (tmp_path / "broken/results.jsonl").read_text() == "not json\n"


def without_seconds(folder):
    return [{key: value for key, value in row.items() if key != "seconds"}
            for row in results(folder)]


def test_killed_run_ends_with_the_same_numbers(tmp_path):
    args = ["--quick", "--n", 2, "--steps", 40, "--method", "bond"]
    assert run(*args, cwd=tmp_path)[0] == 0
    whole = without_seconds(tmp_path / "out")
    assert whole[2]["win_rate"] > whole[0]["win_rate"] + 0.02                   # it has learned
    killed = subprocess.Popen([sys.executable, HERE / "train.py", *map(str, args), "--out",
                               "killed"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    while killed.poll() is None and not [*tmp_path.glob("killed/policies/*.checkpoint")]:
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() != 0
    code, text, _ = run(*args, "--out", "killed", cwd=tmp_path)
    assert code == 0 and "on from step" in text and without_seconds(tmp_path / "killed") == whole


TWO = """                       # the command, watched, then its process group put to the test
import torch, torch.distributed as dist, train
update, seen, both = train.vbon.update, [], [None, None]
def watched(*args):
    seen.append((args[5].tolist(), args[-1].initial_seed()))
    return update(*args)
train.vbon.update = watched
train.main()
dist.all_gather_object(both, seen)
for (a, _), (b, _) in zip(*both, strict=True):             # each step: two shares of one batch
    assert len(a) == len(b) == 2 and len(set(map(tuple, a + b))) == 4
assert both[0][0][0] != both[0][1][0]                      # and another one than before
assert len({seed for rank in both for _, seed in rank}) == 4
p = torch.nn.Parameter(torch.zeros(2))
p.grad = torch.full((2,), train.RANK + 1.0)
optimizer = torch.optim.SGD([p], 1.0)
optimizer.register_step_pre_hook(train.average_gradients)
optimizer.step()
assert p.tolist() == [-1.5, -1.5]
"""


def test_two_processes_draw_what_one_draws(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    (tmp_path / "two.py").write_text(TWO)
    args = ["--quick", "--n", "2", "--steps", "2", "--m", "400", "--out"]      # 2 parts to draw
    assert run(*args, "one", cwd=tmp_path)[0] == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*torchrun, "--", tmp_path / "two.py", *args, "two"], cwd=tmp_path,
                          text=True, capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("5 evaluation") == 1, done.stderr
    one, two = (without_seconds(tmp_path / name) for name in ("one", "two"))
    for a, b in zip(one[:2], two[:2]):                                # reference and best-of-N
        assert (a.pop("ranks"), b.pop("ranks")) == (1, 2)
        assert all(a[key] == pytest.approx(b[key], abs=1e-4) for key in a if "aim" not in key)
    assert one[2]["win_rate"] == pytest.approx(two[2]["win_rate"], abs=0.15)


def test_own_reviews_in_both_layouts(tmp_path):
    reviews = builtin_reviews(400, 3)
    for label, name in ((1, "pos"), (0, "neg")):
        texts = [text for text, y in reviews if y == label]
        (tmp_path / "files" / name).mkdir(parents=True)
        (tmp_path / "lines").mkdir(exist_ok=True)
        (tmp_path / "lines" / f"{name}.txt").write_text("\n\n".join(
            texts + [text.upper() for text in texts[:5]]) + "\n")
        for i, text in enumerate(texts):
            (tmp_path / "files" / name / f"{i}.txt").write_text(text.replace(" . ", " .<br />"))
    assert len(load_reviews(tmp_path / "lines")) == len(set(reviews))
    assert sorted(load_reviews(tmp_path / "files")) == sorted(load_reviews(tmp_path / "lines"))
    with contextlib.chdir(tmp_path):
        s = train.prepare(["--data", "lines", "--m", "7"]).s
    assert (s["reviews"], s["steps"], s["m"]) == (len(set(reviews)), 600, 7)
