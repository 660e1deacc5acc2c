"""The edges of vbon.py: rewards of any kind, tiny differences, arguments that make no sense."""
import math

import pytest
import torch

import vbon
from experiments import theory


def test_each_prompt_is_compared_with_its_own_reference_rewards():
    ref_rewards = torch.tensor([[3.0, 1.0, 2.0, 2.0], [0.0, 0.0, 0.0, 7.0]])
    reward = torch.tensor([[2.5, 0.0], [2.5, 8.0]])
    fifths = torch.tensor([[4, 1], [4, 5]]).double()
    assert torch.equal(vbon.empirical_cdf(reward, ref_rewards), fifths / 5)


def test_integer_and_boolean_rewards_are_numbers_like_others():
    ref_rewards = torch.tensor([[1, 2, 2, 3]])
    assert vbon.empirical_cdf(torch.tensor([[2, 4]]), ref_rewards).tolist() == [[0.4, 1.0]]
    success = torch.tensor([[True, False]])
    assert vbon.win_rate(success, torch.tensor([[False, True]])).tolist() == [[0.75, 0.25]]


def test_the_best_is_the_highest_even_by_a_hair():
    reward = torch.tensor([[1.0, 2.0, 2.0 + 1e-15], [3.0, -1.0, 2.0]], dtype=torch.float64)
    for seed in range(10):
        assert vbon.best_of_n(reward, torch.Generator().manual_seed(seed)).tolist() == [2, 0]


def test_a_constant_in_the_target_changes_nothing():
    logprob = torch.tensor([[-1.0, -2.0, -4.0]]).double().requires_grad_()
    target = torch.tensor([[-3.0, -1.0, -2.0]])
    gradients = []
    for constant in (0, 1000):
        loss = vbon.reverse_kl_loss(logprob, target + constant)
        gradients.append(torch.autograd.grad(loss, logprob)[0])
    assert torch.allclose(*gradients, rtol=0, atol=1e-9)


ONE = torch.zeros(1, 2)
NAN = torch.tensor([[math.nan, 0.0]])
INFINITE = torch.tensor([[math.inf, 0.0]])


@pytest.mark.parametrize("function, arguments", [
    (vbon.bon_logprob, (ONE, ONE, 0)),
    (vbon.bon_logprob, (ONE, ONE, 2.0)),
    (vbon.bon_logprob, (ONE, torch.zeros(1, 3), 2)),
    (vbon.bon_logprob_bound, (NAN, ONE, 2)),
    (vbon.bon_logprob_bound, (ONE, NAN, 2)),
    (vbon.bon_logprob_ties, (ONE, ONE, torch.zeros(1, 3), 2)),
    (vbon.bon_target, (torch.zeros(1, 3), ONE, ONE, 2)),
    (vbon.bon_target, (ONE, ONE, ONE, 0)),
    (theory.bon_theory, (0,)),
    (theory.bon_theory, (True,)),
    (vbon.bon_attains, (ONE, 0)),
    (vbon.bon_attains, (torch.zeros(2), 2)),
    (vbon.empirical_cdf, (torch.zeros(2, 3), torch.zeros(3, 3))),
    (vbon.empirical_cdf, (torch.zeros(3), torch.zeros(3))),
    (vbon.empirical_cdf, (torch.zeros(2, 3), torch.zeros(2, 0))),
    (theory.cdf_interval, (NAN, ONE)),
    (vbon.win_rate, (ONE, INFINITE)),
    (vbon.best_of_n, (torch.zeros(3),)),
    (vbon.best_of_n, (NAN,)),
    (vbon.leave_one_out, (torch.zeros(3, 1),)),
    (vbon.leave_one_out, (torch.zeros(3),)),
    (vbon.reverse_kl_loss, (torch.zeros(3, 1), torch.zeros(3, 1))),
    (vbon.reverse_kl_loss, (torch.zeros(3, 2), torch.zeros(2, 3))),
    (vbon.reverse_kl_loss, (ONE, -INFINITE)),
])
def test_bad_arguments_are_refused_with_what_is_wanted(function, arguments):
    with pytest.raises(ValueError, match="want"):
        function(*arguments)
