"""The README's exercises: each wrong answer below fails one of the tests that are named there.

An answer takes the place of a function of vbon.py. Then the tests of its exercise run, in order.
"""
import inspect

import pytest
import test_vbon
import torch

import vbon


def arguments_of(test):
    """All the arguments that pytest would call a test with."""
    found = [{}]
    for mark in getattr(test, "pytestmark", []):
        names = mark.args[0].split(", ")
        more = []
        for known in found:
            for values in mark.args[1]:
                if len(names) == 1:
                    values = [values]
                more.append(known | dict(zip(names, values)))
        found = more
    return found


def run_exercise(number):
    """Like `pytest test_vbon.py -x -k exercise_NUMBER`; returns how many tests passed."""
    passed = 0
    for name, test in vars(test_vbon).items():
        if name.startswith(f"test_exercise_{number}_"):
            for arguments in arguments_of(test):
                test(**arguments)
                passed += 1
    return passed


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6])
def test_the_functions_of_vbon_pass(number):
    assert run_exercise(number) >= 3


def check_that_it_fails(number, name, answer, monkeypatch):
    monkeypatch.setattr(vbon, name, answer)
    # any other error would be a mistake in the answers below
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        run_exercise(number)

# --------------------------------------------------------------------------- one line that is wrong

TIED_MASS = "torch.where(equal > 0, equal / (m + 1), ref_logprob.exp())"
CHANGES = [
    # exercise, function, right, wrong
    (1, "brute_force", "reward[y] == reward[y].max()", "y == y.max()"),
    (1, "brute_force", "prob[y].prod() / len(best)", "prob[y].prod()"),
    (1, "brute_force", "product(range(len(prob)), repeat=n)", "combinations(range(len(prob)), n)"),
    (2, "bon_logprob", "math.lgamma(n + 1) - torch.lgamma(i + 1) - torch.lgamma(n - i + 1)", "0"),
    (2, "bon_logprob", "_numbers(1, n, log_cdf)", "_numbers(0, n, log_cdf)"),
    (2, "bon_logprob", "logsumexp(0)", "float().logsumexp(0)"),
    (2, "bon_logprob", "logsumexp(0)", "float().logsumexp(0).double()"),
    (2, "bon_logprob", "_log_power(log_cdf, n - i)", "(n - i) * log_cdf"),
    (4, "leave_one_out", "score.sum(-1, keepdim=True) - score", "score.sum(-1, keepdim=True)"),
    (4, "leave_one_out", "/ (score.shape[1] - 1)", "/ score.shape[1]"),
    (4, "leave_one_out", "score.sum(-1, keepdim=True)", "score.sum(0, keepdim=True)"),
    (4, "reverse_kl_loss", "score - leave_one_out(score)", "score"),
    (4, "reverse_kl_loss", "score - leave_one_out(score)", "score + leave_one_out(score)"),
    (4, "reverse_kl_loss", "score - leave_one_out(score)", "score - score.mean(1, keepdim=True)"),
    (4, "reverse_kl_loss", "-(advantage", "(advantage"),
    (4, "reverse_kl_loss", ".detach()", ""),
    (4, "reverse_kl_loss", ".mean()", ".sum()"),
    (5, "roll_out", "@torch.no_grad()", ""),
    (5, "roll_out", "policy.sample(", "reference.sample("),
    (5, "roll_out", "reference.logprob(x, y)", "policy.logprob(x, y)"),
    (5, "roll_out", "reward_fn(prompt, response)", "reward_fn(prompt, response).T.reshape(-1, k)"),
    (5, "roll_out", "response.split(size)", "response[:len(prompt) // size * size].split(size)"),
    (5, "reinforce", "share * reverse_kl_loss", "reverse_kl_loss"),
    (5, "reinforce", "len(x) / len(prompt)", "size / len(prompt)"),
    (5, "reinforce", "found = []", "found = policy.zero_grad() or []"),
    (5, "reinforce", "logprob.detach()", "logprob"),
    (5, "reinforce", "log_target.split(size)", "[log_target] * len(prompt)"),
    (5, "reinforce", "log_target.split(size)", "[log_target[:size]] * len(prompt)"),
    (5, "reinforce", "response.split(size)", "response[:len(prompt) // size * size].split(size)"),
    (6, "bon_logprob_ties", "_numbers(0, n - 1, log_lt)", "_numbers(1, n, log_lt)"),
    (6, "bon_logprob_ties", "_log_power(log_le, n - 1 - j)", "_log_power(log_le, n - j)"),
    (6, "bon_logprob_ties", "_log_power(log_lt, j)", "j * log_lt"),
    (6, "bon_target", TIED_MASS, "equal / (m + 1)"),
    (6, "bon_target", TIED_MASS, "ref_logprob.exp()"),
    (6, "bon_target", TIED_MASS, "equal.clamp(min=1) / (m + 1)"),
    (6, "bon_target", ".clamp(max=1)", ""),
    (6, "bon_target", "torch.minimum(cdf_lt, cdf_le - tied).clamp(min=0)", "cdf_lt"),
    (6, "bon_target", ".clamp(min=0)", ""),
    (6, "bon_target", "empirical_cdf(reward, ref_rewards)",
     "count_less_and_equal(reward, ref_rewards)[0] / ref_rewards.shape[1]"),
    (6, "bon_target", "empirical_cdf(reward, ref_rewards)",
     "empirical_cdf(reward, ref_rewards[:1].expand_as(ref_rewards))"),
    (6, "bon_target", "count_less_and_equal(reward, ref_rewards)",
     "count_less_and_equal(reward, ref_rewards[:1].expand_as(ref_rewards))"),
]


@pytest.mark.parametrize("number, name, right, wrong", CHANGES)
def test_a_wrong_line_fails(number, name, right, wrong, monkeypatch):
    source = inspect.getsource(getattr(vbon, name))
    assert source.count(right) == 1
    names = dict(vars(vbon))
    exec(source.replace(right, wrong), names)
    check_that_it_fails(number, name, names[name], monkeypatch)

# ----------------------------------------------------------------------------- another way to do it

def brute_by_formula(prob, reward, n):
    cdf_lt, _ = test_vbon.exact_cdf(prob, reward)
    return (cdf_lt + prob) ** n - cdf_lt ** n


def naive_line(ref_logprob, log_cdf, n):
    p = ref_logprob.double().exp()
    cdf = log_cdf.double().exp()
    return ((cdf + p) ** n - cdf ** n).log()


def naive_line_with_expm1(ref_logprob, log_cdf, n):
    """Precise for long responses, but nan where F = 0."""
    log_cdf = log_cdf.double()
    more = torch.log1p((ref_logprob.double() - log_cdf).exp())
    return n * log_cdf + torch.expm1(n * more).log()


def cdf(less, ref_rewards):
    return (less.double() + 1) / (ref_rewards.shape[1] + 1)


def cdf_of_unsorted_rewards(reward, ref_rewards):
    return cdf(torch.searchsorted(ref_rewards, reward), ref_rewards)


def cdf_of_all_prompts_together(reward, ref_rewards):
    every = ref_rewards.flatten()
    less = (every < reward[..., None]).sum(-1)
    return (less.double() + 1) / (len(every) + 1)


def cdf_of_the_first_prompt(reward, ref_rewards):
    return cdf((ref_rewards[0] < reward[..., None]).sum(-1), ref_rewards)


def cdf_with_a_broadcast_for_one_prompt(reward, ref_rewards):
    return cdf((ref_rewards < reward[..., None]).sum(-1), ref_rewards)


def cdf_with_less_or_equal(reward, ref_rewards):
    return cdf((ref_rewards[:, None] <= reward[..., None]).sum(-1), ref_rewards)


def rank_by_m(reward, ref_rewards):
    return (ref_rewards[:, None] < reward[..., None]).double().mean(-1)


def rank_plus_one_by_m(reward, ref_rewards):
    return rank_by_m(reward, ref_rewards) + 1 / ref_rewards.shape[1]


def cdf_in_float32(reward, ref_rewards):
    return cdf((ref_rewards[:, None] < reward[..., None]).sum(-1), ref_rewards).float()


def cdf_of_rewards_in_float32(reward, ref_rewards):
    less = (ref_rewards[:, None].float() < reward[..., None].float()).sum(-1)
    return cdf(less, ref_rewards)


def baseline_with_gradients(logprob, log_target):
    """Unbiased, since responses are independent, but noisy."""
    score = log_target - logprob
    advantage = score.detach() - vbon.leave_one_out(score)
    return -(advantage * logprob).mean()


def target_by_the_interval(ref_logprob, reward, ref_rewards, n):
    less, equal = vbon.count_less_and_equal(reward, ref_rewards)
    total = ref_rewards.shape[1] + 1
    log_lt = (less / total).log()
    log_le = ((less + equal + 1) / total).log()
    return vbon.bon_logprob_ties(ref_logprob, log_lt, log_le, n)


def target_for_rewards_that_do_not_tie(ref_logprob, reward, ref_rewards, n):
    log_cdf = vbon.empirical_cdf(reward, ref_rewards).log()
    return vbon.bon_logprob(ref_logprob, log_cdf, n)


def general_form_with_a_division(ref_logprob, log_lt, log_le, n):
    lower = log_lt.exp()
    not_higher = log_le.exp()
    return ref_logprob + ((not_higher ** n - lower ** n) / (not_higher - lower)).log()


@pytest.mark.parametrize("number, name, answer", [
    (1, "brute_force", brute_by_formula),
    (2, "bon_logprob", naive_line),
    (2, "bon_logprob", naive_line_with_expm1),
    (2, "bon_logprob", vbon.bon_logprob_bound),
    (3, "empirical_cdf", cdf_of_unsorted_rewards),
    (3, "empirical_cdf", cdf_of_all_prompts_together),
    (3, "empirical_cdf", cdf_of_the_first_prompt),
    (3, "empirical_cdf", cdf_with_a_broadcast_for_one_prompt),
    (3, "empirical_cdf", cdf_with_less_or_equal),
    (3, "empirical_cdf", rank_by_m),
    (3, "empirical_cdf", rank_plus_one_by_m),
    (3, "empirical_cdf", cdf_in_float32),
    (3, "empirical_cdf", cdf_of_rewards_in_float32),
    (4, "reverse_kl_loss", baseline_with_gradients),
    (6, "bon_target", target_by_the_interval),
    (6, "bon_target", target_for_rewards_that_do_not_tie),
    (6, "bon_logprob_ties", general_form_with_a_division),
])
def test_a_wrong_answer_fails(number, name, answer, monkeypatch):
    check_that_it_fails(number, name, answer, monkeypatch)
