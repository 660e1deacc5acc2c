"""The README's exercises: each wrong answer below fails one of the tests that are named there.

An answer is a function of vbon.py with one expression changed. It takes the place of that function.
Then the tests of its exercise run, in order.
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

# ------------------------------------------------------------------- one expression that is wrong

TIED_MASS = "torch.where(equal > 0, equal / (m + 1), ref_logprob.exp())"
CHANGES = [
    # exercise, function, right, wrong
    (1, "brute_force", "reward[y] == reward[y].max()", "y == y.max()"),
    (1, "brute_force", "prob[y].prod() / len(best)", "prob[y].prod()"),
    (1, "brute_force", "product(range(len(prob)), repeat=n)", "combinations(range(len(prob)), n)"),
    (2, "bon_logprob", "math.lgamma(n + 1) - torch.lgamma(i + 1) - torch.lgamma(n - i + 1)", "0"),
    (2, "bon_logprob", "_numbers(1, n, log_cdf)", "_numbers(0, n, log_cdf)"),
    (2, "bon_logprob", "logsumexp(0)", "float().logsumexp(0).double()"),
    (2, "bon_logprob", "_log_power(log_cdf, n - i)", "(n - i) * log_cdf"),
    # the naive line; a line that is precise for long responses, but nan where F = 0; the bound
    (2, "bon_logprob", "log_term.logsumexp(0)",
     "((log_cdf.exp() + ref_logprob.exp()) ** n - log_cdf.exp() ** n).log()"),
    (2, "bon_logprob", "log_term.logsumexp(0)",
     "n * log_cdf + torch.expm1(n * torch.log1p((ref_logprob - log_cdf).exp())).log()"),
    (2, "bon_logprob", "log_term.logsumexp(0)", "bon_logprob_bound(ref_logprob, log_cdf, n)"),
    # rewards that are not sorted; those of all prompts, of the first one, and for one prompt only
    (3, "empirical_cdf", "less +", "torch.searchsorted(ref_rewards, reward).double() +"),
    (3, "empirical_cdf", "(less + 1) / (m + 1)",
     "((ref_rewards.flatten() < reward[..., None]).double().sum(-1) + 1) / "
     "(ref_rewards.numel() + 1)"),
    (3, "empirical_cdf", "reward, ref_rewards)\n",
     "reward, ref_rewards[:1].expand_as(ref_rewards))\n"),
    (3, "empirical_cdf", "less +", "(ref_rewards < reward[..., None]).double().sum(-1) +"),
    (3, "empirical_cdf", "less +", "less + _ +"),
    (3, "empirical_cdf", "(less + 1) / (m + 1)", "less / m"),
    (3, "empirical_cdf", "(less + 1) / (m + 1)", "((less + 1) / (m + 1)).float()"),
    (3, "empirical_cdf", "reward, ref_rewards)\n", "reward.float(), ref_rewards.float())\n"),
    (4, "leave_one_out", "score.sum(-1, keepdim=True) - score", "score.sum(-1, keepdim=True)"),
    (4, "leave_one_out", "/ (score.shape[1] - 1)", "/ score.shape[1]"),
    (4, "leave_one_out", "score.sum(-1, keepdim=True)", "score.sum(0, keepdim=True)"),
    (4, "reverse_kl_loss", "score - leave_one_out(score)", "score"),
    (4, "reverse_kl_loss", "score - leave_one_out(score)", "score + leave_one_out(score)"),
    (4, "reverse_kl_loss", "score - leave_one_out(score)", "score - score.mean(1, keepdim=True)"),
    # unbiased, since responses are independent, but noisy
    (4, "reverse_kl_loss", "leave_one_out(score)", "leave_one_out(log_target - logprob)"),
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
    (5, "reinforce", "log_target.split(size)", "[log_target[:size]] * len(prompt)"),
    (5, "reinforce", "response.split(size)", "response[:len(prompt) // size * size].split(size)"),
    (6, "bon_logprob_ties", "_numbers(0, n - 1, log_lt)", "_numbers(1, n, log_lt)"),
    (6, "bon_logprob_ties", "_log_power(log_le, n - 1 - j)", "_log_power(log_le, n - j)"),
    (6, "bon_logprob_ties", "_log_power(log_lt, j)", "j * log_lt"),
    (6, "bon_logprob_ties", "log_term.logsumexp(0)",
     "((log_le.exp() ** n - log_lt.exp() ** n) / (log_le.exp() - log_lt.exp())).log()"),
    (6, "bon_target", TIED_MASS, "(equal + 1) / (m + 1)"),
    (6, "bon_target", TIED_MASS, "equal.clamp(min=1) / (m + 1)"),
    (6, "bon_target", TIED_MASS, "equal / (m + 1)"),
    (6, "bon_target", TIED_MASS, "ref_logprob.exp()"),
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
def test_a_wrong_answer_fails(number, name, right, wrong, monkeypatch):
    source = inspect.getsource(getattr(vbon, name))
    assert source.count(right) == 1
    names = dict(vars(vbon))
    exec(source.replace(right, wrong), names)
    monkeypatch.setattr(vbon, name, names[name])
    # any other error would be a mistake in the answers above
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        run_exercise(number)
