"""Tests of vbon.py, section by section, then of the model that it trains and of the main job.

    pytest test_vbon.py

A part of the tutorial. The oracles are worlds so small that every response can be listed. Numbers
in brackets, such as (2), are the equations at the top of vbon.py. The other tests are in tests/.
"""
import contextlib
import io
import itertools
import json
import math
import subprocess
import sys
from decimal import Decimal, localcontext
from pathlib import Path

import pytest
import torch

import vbon
from model import GPT, response_mask, token_kl

torch.set_num_threads(1)            # the tensors here are tiny: threads only wait for each other

# Six responses: their probabilities, rewards that are all different, and rewards that tie.
PROB = torch.tensor([0.1, 0.3, 0.2, 0.15, 0.05, 0.2], dtype=torch.float64)
DISTINCT = torch.tensor([2.0, -1.0, 0.5, 3.0, 1.0, -4.0], dtype=torch.float64)
TIED = torch.tensor([2.0, -1.0, 2.0, 3.0, -1.0, -1.0], dtype=torch.float64)


def brute_force_bon(prob, reward, n):
    """π_bon by its definition: all tuples of n responses; those that tie for the best share."""
    bon = torch.zeros(len(prob)).double()
    for indices in itertools.product(range(len(prob)), repeat=n):
        y = torch.tensor(indices)
        best = y[reward[y] == reward[y].max()]
        share = prob[y].prod() / len(best)
        bon.index_add_(0, best, share.expand(len(best)))
    return bon


def exact_cdf(prob, reward):
    """P(r' < r) and P(r' <= r) for each response, where all are known."""
    lower = (prob * (reward < reward[:, None])).sum(1)
    not_higher = (prob * (reward <= reward[:, None])).sum(1)
    return lower, not_higher


def kl_divergence(p, q):
    return torch.xlogy(p, p / q).sum().item()

# ------------------------------------------------------------------------- 1. the CDF of the reward

def test_the_cdf_is_the_strict_rank_plus_one():
    """(1): reward 2.5 against 1, 2, 2, 3 has rank 3, so F = 4/5."""
    ref_rewards = torch.tensor([[1.0, 2.0, 2.0, 3.0]])
    reward = torch.tensor([[2.5, 2.0, 0.0, 1.0, 3.0, 9.0]])
    fifths = torch.tensor([[4, 2, 1, 1, 4, 5]]).double()
    assert torch.equal(vbon.empirical_cdf(reward, ref_rewards), fifths / 5)


def test_a_tie_counts_half_in_the_win_rate():
    """Reward 2 against 1, 2, 2, 3 beats one and ties with two: 0.5."""
    ref_rewards = torch.tensor([[1.0, 2.0, 2.0, 3.0]])
    reward = torch.tensor([[2.0, 0.0, 1.0, 2.5, 9.0]])
    assert vbon.win_rate(reward, ref_rewards).tolist() == [[0.5, 0.0, 0.125, 0.75, 1.0]]

# ----------------------------------------------------------------- 2. the distribution of best-of-N

@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_the_exact_form_is_brute_force_without_ties(n):
    """(2). The F of the worst response is 0."""
    cdf, _ = exact_cdf(PROB, DISTINCT)
    bon = vbon.bon_logprob(PROB.log(), cdf.log(), n).exp()
    assert torch.allclose(bon, brute_force_bon(PROB, DISTINCT, n), rtol=0, atol=1e-14)


@pytest.mark.parametrize("reward", [DISTINCT, TIED], ids=["distinct", "tied"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_the_general_form_is_brute_force_with_and_without_ties(n, reward):
    """(4)"""
    cdf_lt, cdf_le = exact_cdf(PROB, reward)
    bon = vbon.bon_logprob_ties(PROB.log(), cdf_lt.log(), cdf_le.log(), n).exp()
    assert torch.allclose(bon, brute_force_bon(PROB, reward, n), rtol=0, atol=1e-14)


def test_the_exact_form_loses_probability_where_rewards_tie():
    cdf, _ = exact_cdf(PROB, TIED)
    assert vbon.bon_logprob(PROB.log(), cdf.log(), 4).exp().sum().item() < 0.81


def test_the_exact_form_by_hand():
    """π_ref = 0.1 and F = 0.75 with n = 2 give 0.85² - 0.75² = 0.16."""
    bon = vbon.bon_logprob(torch.tensor(0.1).double().log(), torch.tensor(0.75).log(), 2).exp()
    assert bon.item() == pytest.approx(0.16)


@pytest.mark.parametrize("n", [1, 2, 7, 4096])
@pytest.mark.parametrize("log_p", [-0.0078125, -20.0, -110.0, -2000.0])
@pytest.mark.parametrize("cdf", [0.0, 2 ** -10, 0.5, 1.0])
def test_the_forms_agree_with_exact_arithmetic(n, log_p, cdf):
    """(2), (3) and (4) against decimals of a thousand digits. The inputs are exact in float32."""
    with localcontext() as context:
        context.prec = 1000 + round(-log_p / math.log(10))
        context.Emin = -10 ** 8
        f = Decimal(cdf)
        difference = (f + Decimal(log_p).exp()) ** n - f ** n
        truth = float(difference.ln())
    ref_logprob = torch.tensor(log_p)
    log_cdf = torch.tensor(cdf).double().log()
    exact = vbon.bon_logprob(ref_logprob, log_cdf, n).item()
    assert exact == pytest.approx(truth, rel=1e-9, abs=1e-9)
    bound = vbon.bon_logprob_bound(ref_logprob, log_cdf, n).item()
    assert bound <= exact + 1e-9
    if cdf > 0 and log_p <= -110:                       # an improbable response: they are one
        assert bound == pytest.approx(exact, rel=1e-9)
    log_le = torch.logaddexp(log_cdf, ref_logprob.double())
    general = vbon.bon_logprob_ties(ref_logprob, log_cdf, log_le, n).item()
    assert general == pytest.approx(truth, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("dtype, log_p", [(torch.float32, -20.0), (torch.float64, -40.0)])
def test_the_naive_line_breaks_where_the_sum_does_not(dtype, log_p):
    """F + p rounds to F, and the logarithm of 0 is -inf."""
    p = torch.tensor(log_p, dtype=dtype).exp()
    f = torch.tensor(0.5, dtype=dtype)
    assert ((f + p) ** 4 - f ** 4).log() == -math.inf
    truth = math.log(4) + 3 * math.log(0.5) + log_p
    assert vbon.bon_logprob(p.log(), f.log(), 4).item() == pytest.approx(truth, abs=1e-5)


@pytest.mark.parametrize("n", [1, 4])
def test_a_cdf_of_zero_gives_no_nan(n):
    """Best-of-n returns the worst response only if all n samples are this one."""
    zero = torch.tensor(-math.inf)
    log_p = torch.tensor(-3.0)
    assert vbon.bon_logprob(log_p, zero, n).item() == pytest.approx(-3.0 * n)
    assert vbon.bon_logprob_ties(log_p, zero, log_p, n).item() == pytest.approx(-3.0 * n)
    assert vbon.bon_logprob_bound(log_p, zero, n).item() == (-3.0 if n == 1 else -math.inf)


def test_the_general_form_contains_the_other_two():
    log_p = torch.tensor([-1.5, -9.0])
    cdf = torch.tensor([0.6, 0.2]).double()
    log_le = (cdf + log_p.double().exp()).log()
    exact = vbon.bon_logprob(log_p, cdf.log(), 5)
    bound = vbon.bon_logprob_bound(log_p, cdf.log(), 5)
    assert torch.allclose(vbon.bon_logprob_ties(log_p, cdf.log(), log_le, 5), exact)
    assert torch.allclose(vbon.bon_logprob_ties(log_p, cdf.log(), cdf.log(), 5), bound)


def test_without_ties_the_target_is_the_exact_form_with_the_empirical_cdf():
    """(7): where no reference response has y's reward."""
    g = torch.Generator().manual_seed(0)
    reward = torch.randn(5, 8, generator=g)
    ref_rewards = torch.randn(5, 64, generator=g)
    ref_logprob = -6 * torch.rand(5, 8, generator=g)
    log_cdf = vbon.empirical_cdf(reward, ref_rewards).log()
    target = vbon.bon_target(ref_logprob, reward, ref_rewards, 4)
    exact = vbon.bon_logprob(ref_logprob, log_cdf, 4)
    inside = log_cdf.exp() + ref_logprob.double().exp() <= 1        # else F_le is capped
    assert inside.sum() > 30
    assert torch.allclose(target[inside], exact[inside], rtol=0, atol=1e-12)


def test_the_target_by_hand_where_rewards_tie():
    """(7): reward 2 against 1, 2, 2, 3 has F_lt = 2/5 and F_le = 4/5, so its weight is 6/5."""
    target = vbon.bon_target(torch.tensor([[-9.0]]), torch.tensor([[2]]),
                             torch.tensor([[1, 2, 2, 3]]), 2)
    assert target.item() == pytest.approx(-9 + math.log(6 / 5))


@pytest.mark.parametrize("reward", [DISTINCT, TIED], ids=["distinct", "tied"])
@pytest.mark.parametrize("m, error, lowest", [(64, 0.004, -0.016), (512, 0.0007, -0.004)])
def test_the_target_is_best_of_n_in_a_world_that_is_sampled_again_and_again(
        reward, m, error, lowest):
    """(7), for 8,000 sets of m reference responses, against brute force."""
    bon = brute_force_bon(PROB, reward, 4)
    prob = PROB.expand(8000, 6)
    g = torch.Generator().manual_seed(0)
    ref_rewards = reward[torch.multinomial(prob, m, replacement=True, generator=g)]
    log_target = vbon.bon_target(prob.log(), reward.expand(8000, 6), ref_rewards, 4)
    # the mean weight under π_ref is nearly 1
    weight = log_target.exp().sum(1).mean().item()
    assert weight == pytest.approx(1, abs=2 / m)
    # it aims at the win rate of best-of-4
    cdf_lt, cdf_le = exact_cdf(PROB, reward)
    wins = (cdf_lt + cdf_le) / 2
    aim = (log_target.softmax(1) @ wins).mean().item()
    assert aim == pytest.approx((bon @ wins).item(), abs=error)
    # a perfect policy reads a KL of nearly 0
    kl = (bon * (bon.log() - log_target)).sum(1).mean().item()
    assert lowest < kl < 0.001


def two_values():
    """A reward that 8 of 100 responses get, and how it looks: one success, one failure."""
    ref_rewards = torch.zeros(1, 100)
    ref_rewards[0, :8] = 1
    return torch.tensor([[1.0, 0.0]]), ref_rewards, torch.tensor([[0.08, 0.92]])


def test_for_a_reward_of_two_values_the_target_aims_at_what_best_of_n_attains():
    """(7). Best of 4 succeeds with probability 1 - .92⁴ = .28; the paper's plug-in aims at 1."""
    reward, ref_rewards, share = two_values()
    unlikely = torch.full((1, 2), -50.0)
    target = vbon.bon_target(unlikely, reward, ref_rewards, 4)
    success = (share.log() + target).softmax(1)[0, 0].item()
    assert success == pytest.approx(1 - 0.92 ** 4, abs=0.005)
    log_cdf = vbon.empirical_cdf(reward, ref_rewards).log()
    plug_in = (share.log() + vbon.bon_logprob(unlikely, log_cdf, 4)).softmax(1)[0, 0].item()
    assert plug_in > 0.99


def test_only_the_order_of_rewards_matters_to_the_last_bit():
    g = torch.Generator().manual_seed(0)
    reward = torch.randn(4, 8, generator=g).double().round(decimals=1)          # some of them tie
    ref_rewards = torch.randn(4, 64, generator=g).double().round(decimals=1)
    ref_logprob = -20 * torch.rand(4, 8, generator=g)
    target = vbon.bon_target(ref_logprob, reward, ref_rewards, 4)
    for increasing in (torch.sigmoid, torch.exp, lambda r: 5 * r - 1, lambda r: r ** 3):
        other = vbon.bon_target(ref_logprob, increasing(reward), increasing(ref_rewards), 4)
        assert torch.equal(target, other)


def test_the_best_of_equals_is_one_of_them_at_random():
    reward = torch.tensor([[1, 3, 3, 2]]).repeat(4000, 1)
    best = vbon.best_of_n(reward, torch.Generator().manual_seed(0))
    assert set(best.tolist()) == {1, 2}
    assert (best == 1).double().mean().item() == pytest.approx(0.5, abs=0.04)


def test_above_all_reference_rewards_the_target_is_a_probability():
    """(7) is capped: log π_bon = log(1 - (1 - π_ref)^N). With F_le = 1 + π_ref it would be +25."""
    p = torch.tensor([[0.5, 0.01, 1e-9]]).double()
    ref_rewards = torch.arange(64)[None]
    target = vbon.bon_target(p.log(), torch.full((1, 3), 99), ref_rewards, 512)
    assert torch.allclose(target, torch.log1p(-(1 - p) ** 512), rtol=0, atol=1e-6)
    assert (target <= 0).all()
    # by rounding, a probability may be a hair above 1
    assert vbon.bon_target(torch.tensor([[1e-7]]), torch.tensor([[99]]), ref_rewards, 4).item() == (
        pytest.approx(0, abs=1e-6))
    # below all of them nothing is capped
    low = vbon.bon_target(p.log(), torch.full((1, 3), -9), ref_rewards, 2)
    assert low[0, 0].item() == pytest.approx(math.log((1 / 65 + 0.5) ** 2 - (1 / 65) ** 2))


def test_without_ties_best_of_n_attains_the_closed_form():
    kl, win = vbon.bon_attains(torch.arange(512)[None], 4)
    assert kl == pytest.approx(math.log(4) - 3 / 4, abs=1e-5)
    assert win == pytest.approx(4 / 5, abs=1e-9)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_win_rate_that_best_of_n_attains_is_that_over_all_sets(n):
    """The best of n different responses against another one, for two prompts."""
    wins = []
    for reward in (DISTINCT, TIED):
        reward = reward.tolist()
        for i in range(6):
            others = reward[:i] + reward[i + 1:]
            for best in map(max, itertools.combinations(others, n)):
                wins.append((best > reward[i]) + (best == reward[i]) / 2)
    _, win = vbon.bon_attains(torch.stack([DISTINCT, TIED]), n)
    # both prompts have the same number of sets
    assert win == pytest.approx(sum(wins) / len(wins), abs=1e-12)


@pytest.mark.parametrize("p, n", [(0.01, 256), (0.01, 64), (0.08, 4)])
def test_what_best_of_n_attains_with_rare_successes_is_unbiased(p, n):
    """Best of n succeeds with probability 1 - (1-p)^n."""
    success = 1 - (1 - p) ** n
    win = success * (1 - p / 2) + (1 - success) * (1 - p) / 2
    g = torch.Generator().manual_seed(0)
    rewards = (torch.rand(4000, 512, generator=g) < p).float()
    kl, found = vbon.bon_attains(rewards, n)
    assert found == pytest.approx(win, abs=0.003)
    exact = success * math.log(success / p) + (1 - success) * math.log((1 - success) / (1 - p))
    # the KL is biased downwards where successes are rare, and unknown where they are very rare
    if n == 256:
        assert math.isnan(kl)
    else:
        assert 0.94 * exact < kl < 1.01 * exact


@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_kl_that_best_of_n_attains_is_brute_force_with_ties(n):
    """24 rewards that are equally likely, six of them different, with ties."""
    sixth = torch.ones(6).double() / 6
    kls = []
    for reward in (DISTINCT, TIED):
        kls.append(kl_divergence(brute_force_bon(sixth, reward, n), sixth))
    kl, _ = vbon.bon_attains(torch.stack([DISTINCT, TIED]).repeat(1, 20), n)
    assert kl == pytest.approx(sum(kls) / 2, abs=1e-12)


def test_where_few_samples_decide_the_kl_is_unknown():
    """512 rewards are worth some 2 · 512 / n effective samples."""
    rewards = torch.arange(512)[None]
    assert not math.isnan(vbon.bon_attains(rewards, 60)[0])
    kl, win = vbon.bon_attains(rewards, 70)
    assert math.isnan(kl)
    assert win == pytest.approx(70 / 71)
    # with as many samples as there are, one can only take the best
    assert vbon.bon_attains(torch.arange(4)[None], 4)[1] == pytest.approx(0.7793, abs=1e-4)

# ---------------------------------------------------------------- 3. the objective and its gradient

def test_the_baseline_is_the_mean_of_the_other_scores():
    score = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    assert vbon.leave_one_out(score).tolist() == [[4.0, 3.5, 1.5], [1.5, 1.5, 0.0]]


def six_number_policy():
    """log π_θ of a policy of six logits, log π_bon, and the gradient of the exact KL."""
    logits = torch.tensor([0.3, -0.5, 1.0, 0.1, -1.2, 0.4]).double().requires_grad_()
    logprob = logits.log_softmax(0)
    cdf_lt, cdf_le = exact_cdf(PROB, TIED)
    log_bon = vbon.bon_logprob_ties(PROB.log(), cdf_lt.log(), cdf_le.log(), 4)
    kl = (logprob.exp() * (logprob - log_bon)).sum()           # (5), with the sign turned
    exact, = torch.autograd.grad(kl, logits)
    return logprob.detach(), log_bon, exact


def all_gradients(loss, logprob, log_target, k):
    """What a loss gives for each of the 6^k samples: their probabilities, gradients (6^k, 6)."""
    y = torch.tensor(list(itertools.product(range(6), repeat=k)))           # (6^k, k)
    sampled = logprob[y].requires_grad_()
    # the loss is a mean over samples; here each sample counts as a prompt
    by_response, = torch.autograd.grad(len(y) * loss(sampled, log_target[y]), sampled)
    score_function = torch.eye(6)[y] - logprob.exp()                        # ∇ log π_θ(y)
    gradient = (by_response[:, :, None] * score_function).sum(1)
    return logprob[y].sum(1).exp(), gradient


def loss_with_own_score(logprob, log_target):
    """Wrong on purpose: the baseline is the mean of all K scores."""
    score = (log_target - logprob).detach()
    return -((score - score.mean(1, keepdim=True)) * logprob).mean()


def loss_without_baseline(logprob, log_target):
    """Right, but noisy."""
    score = (log_target - logprob).detach()
    return -(score * logprob).mean()


@pytest.mark.parametrize("k", [2, 3])
def test_the_expected_gradient_is_that_of_the_exact_kl(k):
    """(6) = the gradient of (5), over all samples of k responses."""
    logprob, log_bon, exact = six_number_policy()
    chance, gradient = all_gradients(vbon.reverse_kl_loss, logprob, log_bon, k)
    assert torch.allclose(chance @ gradient, exact, rtol=0, atol=1e-12)


def test_a_baseline_with_the_own_score_is_biased():
    logprob, log_bon, exact = six_number_policy()
    chance, gradient = all_gradients(loss_with_own_score, logprob, log_bon, 3)
    assert torch.allclose(chance @ gradient, 2 / 3 * exact, rtol=0, atol=1e-12)


def test_the_baseline_makes_the_gradient_less_noisy():
    logprob, log_bon, exact = six_number_policy()
    noise = []
    for loss in (vbon.reverse_kl_loss, loss_without_baseline):
        # a target is often known up to a constant only, here 3
        chance, gradient = all_gradients(loss, logprob, log_bon + 3, 4)
        assert torch.allclose(chance @ gradient, exact, rtol=0, atol=1e-12)
        noise.append((chance @ (gradient - exact).square().sum(1)).item())
    assert noise[0] < 0.2 * noise[1]


def test_at_the_target_each_sample_has_a_gradient_of_zero():
    _, log_bon, _ = six_number_policy()
    for constant in (0, -7):                            # a target that is known up to a factor
        _, gradient = all_gradients(vbon.reverse_kl_loss, log_bon, log_bon + constant, 3)
        assert gradient.abs().max().item() < 1e-14

# ------------------------------------------- a real GPT of four tokens, and all its forty responses

PROMPT = torch.tensor([[1]])
EOT = 3


def all_responses():
    """The responses of at most three tokens (1, 40, 3), padded with end-of-text."""
    found = set()
    for ids in itertools.product(range(4), repeat=3):
        if EOT in ids:
            words = ids[:ids.index(EOT)]
            ids = words + (EOT,) * (3 - len(words))
        found.add(ids)
    return torch.tensor(sorted(found))[None]


RESPONSES = all_responses()
REWARDS = torch.randperm(40, generator=torch.Generator().manual_seed(4)).double()[None]


def which(response):
    """(..., 3) -> (...): the place of each response in the list of all."""
    same = (response[..., None, :] == RESPONSES[0]).all(-1)
    return same.long().argmax(-1)


def reward_fn(prompt, response):
    return REWARDS[0, which(response)]


def tiny_gpt(noise=0.0):
    """Always the same model; with noise, another one near it."""
    model = GPT(4, 4, n_layer=1, n_head=2, n_embd=16, generator=torch.Generator().manual_seed(3))
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p *= 2                                             # further away from uniform
            p += noise * torch.randn(p.shape, generator=g)
    return model


def all_logprobs(model):
    """log π(y) (40,) of all responses."""
    return model.logprob(PROMPT, RESPONSES)[0].double()


def exact_bon(reference, n):
    """log π_bon (40,) of all responses, with the exact F."""
    ref_logprob = all_logprobs(reference).detach()
    cdf, _ = exact_cdf(ref_logprob.exp(), REWARDS[0])
    return vbon.bon_logprob(ref_logprob, cdf.log(), n)


def exact_kl(policy, log_target):
    """KL(π_θ || target), summed over all responses."""
    logprob = all_logprobs(policy)
    return (logprob.exp() * (logprob - log_target)).sum()


def gradient_of(y, model):
    """dy/dθ as one vector."""
    parts = torch.autograd.grad(y, list(model.parameters()))
    return torch.cat([part.flatten() for part in parts])


def test_the_probabilities_of_all_responses_sum_to_one():
    assert all_logprobs(tiny_gpt()).exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_the_mask_ends_with_the_first_end_of_text():
    response = torch.tensor([[5, 9, 9, 9], [9, 9, 9, 9], [1, 2, 3, 4], [1, 2, 3, 9], [1, 9, 2, 9]])
    assert response_mask(response, 9).int().tolist() == [
        [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]


def test_samples_follow_the_enumerated_distribution():
    response, _ = tiny_gpt().sample(PROMPT, 40_000, 3, torch.Generator().manual_seed(2))
    prob = all_logprobs(tiny_gpt()).exp()
    share = which(response)[0].bincount(minlength=40) / 40_000
    assert torch.equal(RESPONSES[0, which(response)], response)      # no others
    assert ((share - prob).abs() < 5 * (prob / 40_000).sqrt()).all()


def test_the_logprob_while_sampling_is_the_one_scored_later():
    response, sampled = tiny_gpt().sample(PROMPT, 200, 3, torch.Generator().manual_seed(0))
    scored = tiny_gpt().logprob(PROMPT, response)
    assert len(set(which(response)[0].tolist())) > 20          # short ones and long ones
    assert torch.allclose(sampled, scored, rtol=0, atol=1e-5)


def test_the_expected_gradient_reaches_the_weights_of_the_model():
    """(6) through a GPT, over all pairs of responses, by their probability."""
    policy = tiny_gpt(noise=0.1)
    log_bon = exact_bon(tiny_gpt(), 4)
    exact = gradient_of(exact_kl(policy, log_bon), policy)
    pairs = torch.cartesian_prod(torch.arange(40), torch.arange(40))
    logprob = all_logprobs(policy)
    # the gradient by log-probabilities of all pairs, then that of the log-probabilities
    sampled = logprob.detach()[pairs].requires_grad_()
    loss = len(pairs) * vbon.reverse_kl_loss(sampled, log_bon[pairs])
    by_response, = torch.autograd.grad(loss, sampled)
    chance = logprob.detach()[pairs].sum(1).exp()
    expected = torch.zeros(40).double()
    expected.index_add_(0, pairs.flatten(), (chance[:, None] * by_response).flatten())
    mean = gradient_of((expected * logprob).sum(), policy)
    assert (mean - exact).norm() < 1e-4 * exact.norm()


def test_the_kl_per_token_has_the_mean_of_the_exact_kl():
    policy = tiny_gpt(noise=0.1)
    per_token = token_kl(policy, tiny_gpt(), PROMPT, RESPONSES)[0]
    exact = exact_kl(policy, all_logprobs(tiny_gpt()))
    assert (per_token > -1e-6).all()
    assert (all_logprobs(policy).exp() @ per_token.double()).item() == pytest.approx(
        exact.item(), abs=1e-6)


def test_the_kl_per_token_has_a_wrong_gradient():
    """So it is reported, and never differentiated: which responses are sampled depends on θ too."""
    policy = tiny_gpt(noise=0.1)
    per_token = token_kl(policy, tiny_gpt(), PROMPT, RESPONSES)[0]
    naive = gradient_of(all_logprobs(policy).detach().exp() @ per_token.double(), policy)
    exact = gradient_of(exact_kl(policy, all_logprobs(tiny_gpt()).detach()), policy)
    assert (naive - exact).norm() > 0.1 * exact.norm()

# --------------------------------------------------------------------------------- 4. the algorithm

def test_n_grows_over_the_first_steps_and_stays():
    assert [vbon.grow(16, step, 10) for step in range(10)] == [2, 4, 8] + 7 * [16]
    assert vbon.grow(5, 0, 1) == 5
    assert [vbon.grow(1, step, 10) for step in range(10)] == 10 * [1]


def test_a_rollout_has_the_samples_their_rewards_and_their_reference_logprobs():
    policy = tiny_gpt(noise=0.1)
    prompt = PROMPT.repeat(5, 1)
    whole = vbon.roll_out(policy, tiny_gpt(), reward_fn, prompt, 6, 3,
                          torch.Generator().manual_seed(0))
    sampled, _ = policy.sample(prompt, 6, 3, torch.Generator().manual_seed(0))
    assert torch.equal(whole.response, sampled)
    assert torch.equal(whole.reward, reward_fn(prompt, sampled))
    assert torch.allclose(whole.ref_logprob.exp(), all_logprobs(tiny_gpt()).exp()[which(sampled)])
    assert not whole.ref_logprob.requires_grad
    # scoring in parts changes nothing
    for part in (1, 2, 5, 9):
        parts = vbon.roll_out(policy, tiny_gpt(), reward_fn, prompt, 6, 3,
                              torch.Generator().manual_seed(0), part)
        assert torch.equal(parts.response, whole.response)
        assert torch.equal(parts.reward, whole.reward)
        assert torch.allclose(parts.ref_logprob, whole.ref_logprob, rtol=0, atol=1e-5)


@pytest.mark.parametrize("part", [None, 1, 2, 5, 9])
def test_reinforce_adds_the_gradient_of_the_loss(part):
    """Minus (6), whatever the parts; what .grad held before stays in the sum."""
    policy = tiny_gpt()
    prompt = torch.arange(5)[:, None] % 3
    response, _ = policy.sample(prompt, 4, 3, torch.Generator().manual_seed(0))
    log_target = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).double()
    logprob = policy.logprob(prompt, response).double()
    exact = gradient_of(vbon.reverse_kl_loss(logprob, log_target), policy)
    for times in (1, 2):
        found = vbon.reinforce(policy, prompt, response, log_target, part)
        added = torch.cat([p.grad.flatten() for p in policy.parameters()])
        assert torch.allclose(added, times * exact, rtol=0, atol=1e-6)
    assert torch.allclose(found, logprob, rtol=0, atol=1e-5)
    assert found.dtype == torch.float64
    assert not found.requires_grad


def test_updates_bring_the_policy_to_best_of_n():
    """The complete algorithm, without access to the exact F, ends at the exact distribution."""
    steps = 220
    reference = tiny_gpt()
    policy = tiny_gpt()
    log_bon = exact_bon(reference, 4)
    g = torch.Generator().manual_seed(6)
    ref_response, _ = reference.sample(PROMPT, 20_000, 3, g)
    ref_rewards = reward_fn(PROMPT, ref_response)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.006)
    assert exact_kl(policy, log_bon).item() > 0.1
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.006 * (1 - step / steps)
        n = vbon.grow(4, step, steps)
        optimizer.zero_grad()
        rollout = vbon.roll_out(policy, reference, reward_fn, PROMPT, 512, 3, g)
        log_target = vbon.bon_target(rollout.ref_logprob, rollout.reward, ref_rewards, n)
        vbon.reinforce(policy, PROMPT, rollout.response, log_target)
        optimizer.step()
    assert exact_kl(policy, log_bon).item() < 0.015

# --------------------------------------------------------------------------------- the two programs

TOY = """
import runpy, sys
for name in ("matplotlib", "model", "reward", "train", "tiktoken"):
    sys.modules[name] = None                                   # importing it is an error
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def test_the_toy_runs_with_torch_alone_and_reaches_best_of_n():
    done = subprocess.run([sys.executable, "-c", TOY, vbon.__file__], capture_output=True,
                          text=True, check=True)
    lines = done.stdout.splitlines()
    table = [line.split() for line in lines if line.count(".") == 7]
    assert [row[:3] for row in table] == [
        ["-4.0", "0.200", "0.00"], ["-1.0", "0.300", "0.20"], ["0.5", "0.200", "0.50"],
        ["1.0", "0.050", "0.70"], ["2.0", "0.100", "0.75"], ["3.0", "0.150", "0.85"]]
    for reward, ref, cdf, best_of_n, exact, bound, policy in table:
        assert best_of_n == exact
        assert float(bound) <= float(exact)
        assert float(policy) == pytest.approx(float(exact), abs=0.01)
    steps = [line.split() for line in lines if line.startswith("  update")]
    assert [step for _, step, _ in steps] == ["0", "25", "50", "100", "200", "400"]
    kls = [float(kl) for _, _, kl in steps]
    assert kls[0] == pytest.approx(1.2007, abs=1e-4)
    assert len(kls) == 6
    assert 0 <= kls[-1] < 0.01


def quick_run(folder):
    """What the main job prints, with everything tiny."""
    import train                                               # the other tests do without it
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        train.main(["--quick", "--n", "2", "--out", str(folder / "out")])
    lines = Path(folder, "out", "results.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        assert row.pop("seconds") >= 0
    return printed.getvalue(), rows


def test_the_main_job_writes_results_a_picture_and_samples(tmp_path):
    printed, rows = quick_run(tmp_path)
    assert "vBoN n=2 3/3" in printed
    assert "theory, n = 2" in printed
    assert [row["method"] for row in rows] == ["ref", "bon", "vbon"]
    assert [row["samples_per_answer"] for row in rows] == [1, 2, 1]
    for row in rows:
        assert (row["n"], row["seed"], row["beta"]) == (2, 0, None)
        assert 0 <= row["positive"] <= 1
        for name in ("reward", "win_rate", "kl_ref", "kl_bon"):
            assert math.isfinite(row[name])
            assert math.isfinite(row[name + "_se"])
    assert (tmp_path / "out" / "vbon.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "out" / "samples.txt").read_text(encoding="utf-8").count("\n  vBoN ") == 8

    # once more: nothing is trained or sampled again, and the results are the same
    printed, again = quick_run(tmp_path)
    assert "vBoN n=2 3/3" not in printed
    assert "reference model 10/10" not in printed
    assert again == rows


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
