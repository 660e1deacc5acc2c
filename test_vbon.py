"""Tests of vbon.py, section by section, then of the model that it trains and of the main job.

    pytest test_vbon.py                            all of them: half a minute
    pytest test_vbon.py -x -k exercise_3           those of an exercise of the README

A part of the tutorial. The oracles are worlds so small that every response can be listed. Numbers
in brackets, such as (2), are the equations at the top of vbon.py. The other tests are in tests/.
"""
import contextlib
import io
import itertools
import json
import math
import runpy
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


def assert_near(found, wanted, atol=1e-12):
    """The same shape and dtype, and nearly the same numbers. A failure shows both tensors."""
    __tracebackhide__ = True                            # show the test, not this function
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol,
                               msg=lambda why: f"{why}\n\nwant\n{wanted}\n\ngot\n{found}")


def exact_cdf(prob, reward):
    """P(r' < r) and P(r' <= r) for each response, where all are known."""
    lower = (prob * (reward < reward[:, None])).sum(1)
    not_higher = (prob * (reward <= reward[:, None])).sum(1)
    return lower, not_higher

# ------------------------------------------------------------------------- 1. the CDF of the reward

def test_exercise_3_the_cdf_is_the_strict_rank_plus_one():
    """(1): reward 2.5 against 3, 1, 2, 2 has rank 3, so F = 4/5; reward 2 has rank 1."""
    ref_rewards = torch.tensor([[3.0, 1.0, 2.0, 2.0]])
    reward = torch.tensor([[2.5, 2.0, 0.0, 1.0, 3.0, 9.0]])
    fifths = torch.tensor([[4, 2, 1, 1, 4, 5]]).double()
    assert_near(vbon.empirical_cdf(reward, ref_rewards), fifths / 5)


def test_exercise_3_each_prompt_is_compared_with_its_own_reference_rewards():
    """Two prompts with three reference responses, then two with as many as y has."""
    ref_rewards = torch.tensor([[3.0, 1.0, 2.0], [0.0, 0.0, 7.0]])
    reward = torch.tensor([[2.5, 0.0], [2.5, 8.0]])
    quarters = torch.tensor([[3, 1], [3, 4]]).double()
    assert_near(vbon.empirical_cdf(reward, ref_rewards), quarters / 4)
    thirds = torch.tensor([[2, 1], [3, 3]]).double()
    assert_near(vbon.empirical_cdf(reward, ref_rewards[:, :2]), thirds / 3)


def test_exercise_3_a_reward_is_higher_even_by_a_hair():
    """In float32, 1 + 10^-12 is 1."""
    reward = torch.tensor([[1 + 1e-12]], dtype=torch.float64)
    found = vbon.empirical_cdf(reward, torch.ones(1, 1))
    assert_near(found, torch.ones(1, 1).double())


def test_a_tie_counts_half_in_the_win_rate():
    """Reward 2 against 1, 2, 2, 3 beats one and ties with two: 0.5."""
    ref_rewards = torch.tensor([[1.0, 2.0, 2.0, 3.0]])
    reward = torch.tensor([[2.0, 0.0, 1.0, 2.5, 9.0]])
    assert vbon.win_rate(reward, ref_rewards).tolist() == [[0.5, 0.0, 0.125, 0.75, 1.0]]

# ----------------------------------------------------------------- 2. the distribution of best-of-N

@pytest.mark.parametrize("n, halves", [(1, [1, 1]), (2, [1, 3]), (3, [1, 7])])
def test_exercise_1_the_better_one_of_two_is_missed_once_in_2_to_the_n(n, halves):
    """Two responses, equally likely."""
    bon = vbon.brute_force(torch.tensor([0.5, 0.5]).double(), torch.tensor([-1.0, 1.0]), n)
    assert_near(bon, torch.tensor(halves).double() / 2 ** n)


def test_exercise_1_equals_share_in_proportion_to_their_probability():
    """By hand: best of 2 of a, b, c, with a and c better than b. The formula (2) is wrong here.

    Of the nine pairs, bb (1/16) gives b. aa, ab, ba (8/16) give a, and cc, bc, cb (3/16) give c.
    ac and ca (4/16) give a or c.
    """
    prob = torch.tensor([1 / 2, 1 / 4, 1 / 4], dtype=torch.float64)
    reward = torch.tensor([2.0, 1.0, 2.0])
    sixteenths = torch.tensor([8 + 2, 1, 3 + 2]).double()
    assert_near(vbon.brute_force(prob, reward, 2), sixteenths / 16)


def test_exercise_2_the_exact_form_by_hand():
    """(2): π_ref = 0.1 and F = 0.75 with n = 2 give 0.85² - 0.75² = 0.16."""
    bon = vbon.bon_logprob(torch.tensor(0.1).log(), torch.tensor(0.75).log(), 2).exp()
    assert_near(bon, torch.tensor(0.16).double(), atol=1e-7)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_exercise_2_the_exact_form_is_brute_force_without_ties(n):
    """(2). The F of the worst response is 0, and 0 · (-∞) is nan."""
    cdf, _ = exact_cdf(PROB, DISTINCT)
    bon = vbon.bon_logprob(PROB.log(), cdf.log(), n).exp()
    assert_near(bon, vbon.brute_force(PROB, DISTINCT, n), atol=1e-14)


@pytest.mark.parametrize("reward", [DISTINCT, TIED], ids=["distinct", "tied"])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_exercise_6_the_general_form_is_brute_force_with_and_without_ties(n, reward):
    """(4)"""
    cdf_lt, cdf_le = exact_cdf(PROB, reward)
    bon = vbon.bon_logprob_ties(PROB.log(), cdf_lt.log(), cdf_le.log(), n).exp()
    assert_near(bon, vbon.brute_force(PROB, reward, n), atol=1e-14)


def test_the_exact_form_loses_probability_where_rewards_tie():
    cdf, _ = exact_cdf(PROB, TIED)
    assert vbon.bon_logprob(PROB.log(), cdf.log(), 4).exp().sum().item() < 0.81


def test_with_the_response_itself_in_the_cdf_the_exact_form_counts_it_twice():
    """(1) with <= instead of <: the probabilities of the toy's responses would sum to 1.92."""
    with_itself = vbon.TOY_PROB.cumsum(0)
    total = vbon.bon_logprob(vbon.TOY_PROB.log(), with_itself.log(), 4).exp().sum().item()
    assert total == pytest.approx(1.9218, abs=1e-4)


def exact_log_bon(log_p, cdf, n):
    """(2), with decimals of fifty digits more than there are between F and F + π_ref."""
    with localcontext() as context:
        context.prec = 50 + round(-log_p / math.log(10))
        context.Emin = -10 ** 8
        f = Decimal(cdf)
        difference = (f + Decimal(log_p).exp()) ** n - f ** n
        return float(difference.ln())


GRID = list(itertools.product([-0.0078125, -20.0, -110.0, -2000.0],     # exact in float32, too
                              [0.0, 2 ** -10, 0.5, 1.0], [1, 2, 7, 4096]))


@pytest.mark.parametrize("log_p, cdf, n", GRID)
def test_exercise_2_the_exact_form_and_its_bound_agree_with_exact_arithmetic(log_p, cdf, n):
    """(2) and (3), also where F + π_ref rounds to F."""
    ref_logprob = torch.tensor(log_p)
    log_cdf = torch.tensor(cdf).double().log()
    exact = vbon.bon_logprob(ref_logprob, log_cdf, n).item()
    assert exact == pytest.approx(exact_log_bon(log_p, cdf, n), rel=1e-9, abs=1e-9)
    bound = vbon.bon_logprob_bound(ref_logprob, log_cdf, n).item()
    assert bound <= exact + 1e-9
    if cdf > 0 and log_p <= -110:                       # an improbable response: they are one
        assert bound == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("log_p, cdf, n", GRID)
def test_exercise_6_the_general_form_agrees_with_exact_arithmetic(log_p, cdf, n):
    """(4) with F_le = F_lt + π_ref is (2)."""
    ref_logprob = torch.tensor(log_p)
    log_lt = torch.tensor(cdf).double().log()
    log_le = torch.logaddexp(log_lt, ref_logprob.double())
    general = vbon.bon_logprob_ties(ref_logprob, log_lt, log_le, n).item()
    assert general == pytest.approx(exact_log_bon(log_p, cdf, n), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("dtype, log_p", [(torch.float32, -20.0), (torch.float64, -40.0)])
def test_the_naive_line_breaks_where_the_sum_does_not(dtype, log_p):
    """F + p rounds to F, and the logarithm of 0 is -inf."""
    p = torch.tensor(log_p, dtype=dtype).exp()
    f = torch.tensor(0.5, dtype=dtype)
    assert ((f + p) ** 4 - f ** 4).log() == -math.inf
    truth = math.log(4) + 3 * math.log(0.5) + log_p
    assert vbon.bon_logprob(p.log(), f.log(), 4).item() == pytest.approx(truth, abs=1e-5)


def test_with_equal_cdfs_the_general_form_is_the_bound():
    log_p = torch.tensor([-1.5, -9.0])
    log_cdf = torch.tensor([0.6, 0.2]).double().log()
    bound = vbon.bon_logprob_bound(log_p, log_cdf, 5)
    assert_near(vbon.bon_logprob_ties(log_p, log_cdf, log_cdf, 5), bound)


def test_exercise_6_the_target_by_hand():
    """(7) and (4), for n = 2, where π_bon = π_ref (F_le + F_lt). Against 3, 1, 2, 2, with
    π_ref = 0.1, the rewards have

        reward    F_lt    F_le
          2       2/5     4/5       two reference responses tie with it
          2.5     4/5     0.9       none does: F_lt + π_ref
          0       1/5     0.3
          3       4/5     1
          9       0.9     1         no reward is higher: F_lt makes room for π_ref
    """
    ref_rewards = torch.tensor([[3, 1, 2, 2], [0, 0, 0, 9]])
    reward = torch.tensor([[2, 2.5, 0, 3, 9], [5, 0, 5, 0, 5]])
    ref_logprob = torch.full((2, 5), math.log(0.1), dtype=torch.float64)
    # for the second prompt, F_lt and F_le are 4/5 and 0.9, or 1/5 and 4/5
    both = torch.tensor([[12, 17, 5, 18, 19], [17, 10, 17, 10, 17]]).double() / 10
    found = vbon.bon_target(ref_logprob, reward, ref_rewards, 2).exp()
    assert_near(found, 0.1 * both)


def test_exercise_6_above_all_reference_rewards_the_target_is_a_probability():
    """(7) is capped: log π_bon = log(1 - (1 - π_ref)^N). With F_le = 1 + π_ref it may exceed 0."""
    p = torch.tensor([[0.5, 0.01, 1e-9]]).double()
    ref_rewards = torch.arange(64)[None]
    target = vbon.bon_target(p.log(), torch.full((1, 3), 99), ref_rewards, 512)
    assert_near(target, torch.log1p(-(1 - p) ** 512), atol=1e-6)
    # by rounding, a probability may be a hair above 1
    rounded = vbon.bon_target(torch.tensor([[1e-7]]), torch.tensor([[99]]), ref_rewards, 4)
    assert rounded.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("reward", [DISTINCT, TIED], ids=["distinct", "tied"])
@pytest.mark.parametrize("m, error, lowest", [(64, 0.004, -0.016), (512, 0.0007, -0.004)])
def test_exercise_6_the_target_is_best_of_n_in_a_world_that_is_sampled_again_and_again(
        reward, m, error, lowest):
    """(7), for 8,000 sets of m reference responses, against brute force."""
    bon = vbon.brute_force(PROB, reward, 4)
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


def test_exercise_6_for_a_reward_of_two_values_the_target_aims_at_what_best_of_n_attains():
    """(7). 8 of 100 responses succeed, so best of 4 does with probability 1 - .92⁴ = .28."""
    ref_rewards = torch.zeros(1, 100)
    ref_rewards[0, :8] = 1
    reward = torch.tensor([[1.0, 0.0]])
    share = torch.tensor([[0.08, 0.92]])
    unlikely = torch.full((1, 2), -50.0)                # of each response
    target = vbon.bon_target(unlikely, reward, ref_rewards, 4)
    success = (share.log() + target).softmax(1)[0, 0].item()
    assert success == pytest.approx(1 - 0.92 ** 4, abs=0.005)
    # the paper's estimate, (2) with F_lt alone, aims at 1
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

# ---------------------------------------------------------------- 3. the objective and its gradient

def test_exercise_4_the_baseline_is_the_mean_of_the_other_scores():
    """Scores 1, 2, 6 have the baselines 4, 3.5, 1.5."""
    score = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    wanted = torch.tensor([[4.0, 3.5, 1.5], [1.5, 1.5, 0.0]])
    assert_near(vbon.leave_one_out(score), wanted)


def test_exercise_4_the_gradient_by_hand():
    """Scores 1, 2, 6 less their baselines are -3, -1.5, 4.5. Divide by -3: a mean, and minus."""
    logprob = torch.zeros(1, 3, requires_grad=True)
    loss = vbon.reverse_kl_loss(logprob, torch.tensor([[1.0, 2.0, 6.0]]))
    gradient, = torch.autograd.grad(loss, logprob)
    assert_near(gradient, torch.tensor([[1.0, 0.5, -1.5]]))
    assert loss.dtype == torch.float64


def six_number_policy():
    """log π_θ of a policy of six logits, log π_bon, and the gradient of the exact KL."""
    logits = torch.tensor([0.3, -0.5, 1.0, 0.1, -1.2, 0.4]).double().requires_grad_()
    logprob = logits.log_softmax(0)
    log_bon = vbon.brute_force(PROB, TIED, 4).log()
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


def loss_without_baseline(logprob, log_target):
    """Right, but noisy."""
    score = (log_target - logprob).detach()
    return -(score * logprob).mean()


@pytest.mark.parametrize("k", [2, 3])
def test_exercise_4_the_expected_gradient_is_that_of_the_exact_kl(k):
    """(6) = the gradient of (5), over all samples of k responses."""
    logprob, log_bon, exact = six_number_policy()
    chance, gradient = all_gradients(vbon.reverse_kl_loss, logprob, log_bon, k)
    assert_near(chance @ gradient, exact)


def test_exercise_4_at_the_target_each_sample_has_a_gradient_of_zero():
    """Whatever the sample is: there all scores are equal, so each is its baseline."""
    _, log_bon, _ = six_number_policy()
    for constant in (0, -7):                            # a target that is known up to a factor
        _, gradient = all_gradients(vbon.reverse_kl_loss, log_bon, log_bon + constant, 3)
        assert_near(gradient, torch.zeros_like(gradient))


def test_exercise_4_the_baseline_makes_the_gradient_less_noisy():
    logprob, log_bon, exact = six_number_policy()
    noise = []
    for loss in (vbon.reverse_kl_loss, loss_without_baseline):
        # a target is often known up to a constant only, here 3
        chance, gradient = all_gradients(loss, logprob, log_bon + 3, 4)
        assert_near(chance @ gradient, exact)
        noise.append((chance @ (gradient - exact).square().sum(1)).item())
    assert noise[0] < 0.2 * noise[1]

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
REWARDS = torch.randperm(40, generator=torch.Generator().manual_seed(4)).double()


def which(response):
    """(..., 3) -> (...): the place of each response in the list of all."""
    same = (response[..., None, :] == RESPONSES[0]).all(-1)
    return same.long().argmax(-1)


def reward_fn(prompt, response):
    """The reward (P, K) depends on the prompt (P, 1), too."""
    return REWARDS[which(response)] + 50 * prompt


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
    cdf, _ = exact_cdf(ref_logprob.exp(), REWARDS)
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
    assert_near(sampled, scored.detach(), atol=1e-5)


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


FIVE_PROMPTS = torch.tensor([[0], [1], [2], [0], [1]])
PARTS = [None, 1, 2, 5, 9]                              # a part of 2 leaves one prompt over


@pytest.mark.parametrize("part", PARTS)
def test_exercise_5_a_rollout_has_the_samples_their_rewards_and_their_reference_logprobs(part):
    """Steps (a) and (b), for 5 prompts and 6 responses to each."""
    policy = tiny_gpt(noise=0.3)
    found = vbon.roll_out(policy, tiny_gpt(), reward_fn, FIVE_PROMPTS, 6, 3,
                          torch.Generator().manual_seed(0), part)
    response, _ = policy.sample(FIVE_PROMPTS, 6, 3, torch.Generator().manual_seed(0))
    assert_near(found.response, response)
    assert_near(found.reward, reward_fn(FIVE_PROMPTS, response))
    ref_logprob = tiny_gpt().logprob(FIVE_PROMPTS, response)
    assert_near(found.ref_logprob, ref_logprob.detach().double(), atol=1e-5)
    assert not found.ref_logprob.requires_grad


@pytest.mark.parametrize("part", PARTS)
def test_exercise_5_reinforce_adds_the_gradient_of_the_loss(part):
    """Minus (6), whatever the parts; what .grad held before stays in the sum."""
    policy = tiny_gpt()
    response, _ = policy.sample(FIVE_PROMPTS, 4, 3, torch.Generator().manual_seed(0))
    log_target = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).double()
    logprob = policy.logprob(FIVE_PROMPTS, response).double()
    exact = gradient_of(vbon.reverse_kl_loss(logprob, log_target), policy)
    for times in (1, 2):
        found = vbon.reinforce(policy, FIVE_PROMPTS, response, log_target, part)
        added = torch.cat([p.grad.flatten() for p in policy.parameters()])
        assert_near(added, times * exact, atol=1e-6)
    assert_near(found, logprob.detach(), atol=1e-5)
    assert not found.requires_grad


def test_exercise_5_updates_bring_the_policy_to_best_of_n():
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

def test_the_toy_reaches_best_of_n(capsys):
    """`python vbon.py`: six responses of known probability."""
    runpy.run_path(vbon.__file__, run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines if line.count(".") == 7]
    assert [row[:3] for row in table] == [
        ["-4.0", "0.200", "0.00"], ["-1.0", "0.300", "0.20"], ["0.5", "0.200", "0.50"],
        ["1.0", "0.050", "0.70"], ["2.0", "0.100", "0.75"], ["3.0", "0.150", "0.85"]]
    for _, _, _, best_of_n, exact, _, policy in table:
        assert best_of_n == exact
        assert float(policy) == pytest.approx(float(exact), abs=0.01)
    assert table[5][3:6] == ["0.4780", "0.4780", "0.3685"]
    steps = [line.split() for line in lines if line.startswith("  update")]
    assert [step for _, step, _ in steps] == ["0", "25", "50", "100", "200", "400"]
    kls = [float(kl) for _, _, kl in steps]
    assert kls[0] == pytest.approx(1.2007, abs=1e-4)
    assert kls == sorted(kls, reverse=True)
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
