"""The network, long responses, adapters. Sampling, scoring, masks and KLs: test_vbon.py."""
import math

import pytest
import torch

from model import GPT, LowRank, add_adapters, merge_adapters, prompts_at_a_time, sample_ids


def small_gpt(tied=True):
    """Always the same model of 20 tokens, far from uniform."""
    generator = torch.Generator().manual_seed(0)
    model = GPT(20, 12, n_layer=2, n_head=2, n_embd=16, tied=tied, generator=generator)
    with torch.no_grad():
        for p in model.parameters():
            p *= 4
    return model


def some_tokens():
    return torch.randint(0, 20, (5, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_logprobs_of_long_responses_agree_while_ended_ones_leave_the_batch():
    """Sampled with a cache, token by token; scored with full attention, in one pass."""
    generator = torch.Generator().manual_seed(0)
    model = GPT(300, 512, n_layer=2, n_head=2, n_embd=32, generator=generator)
    for p in model.parameters():
        p *= 3
    prompt = torch.randint(0, 299, (4, 4), generator=generator)
    response, sampled = model.sample(prompt, 6, 500, generator)
    lengths = (response != 299).sum(-1).flatten().sort().values
    assert lengths[3] < 100
    assert lengths[-1] == 500
    assert sampled.dtype == torch.float64
    assert (sampled - model.logprob(prompt, response)).abs().max() < 1e-4


def test_new_weights_are_as_large_as_gpt2s():
    model = GPT(300, 40, n_layer=2, n_head=2, n_embd=64, generator=torch.Generator().manual_seed(0))
    for name, p in model.named_parameters():
        if "ln_" in name:
            assert p.unique().tolist() == [0 if name.endswith("bias") else 1], name
        elif name.endswith("bias"):
            assert not p.any(), name
        else:
            # two blocks, each of which adds twice
            std = 0.02 / math.sqrt(4) if "c_proj" in name else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name
    # the MLP is four times as wide; input and output share their weights
    assert sum(p.numel() for p in model.parameters()) == 340 * 64 + 128 + 2 * (12 * 64 ** 2 + 832)


@pytest.mark.parametrize("use, message", [
    (lambda model, x: model(x), "13 tokens; this model has room for 12"),
    (lambda model, x: model.sample(x[:, :4], 2, 10), "13 tokens; this model has room for 12"),
    (lambda model, x: model.states(x[:, :2], model.new_cache(5, 9), 4), "one token at a time"),
    (lambda model, x: GPT(10, 4, n_head=3, n_embd=16), "n_embd = 16 is not a multiple of n_head"),
    # the adapter of the head would not be on the embedding, though both are one weight
    (lambda model, x: add_adapters(model, 2, torch.Generator()), "call untie_head first"),
])
def test_what_a_caller_would_not_notice_is_refused(use, message):
    tokens = torch.cat([some_tokens(), some_tokens()[:, :1]], 1)        # 13, and 12 positions
    with pytest.raises(ValueError, match=message):
        use(small_gpt(), tokens)


def test_a_sampled_id_is_one_that_has_a_probability_whatever_the_rounding():
    # half of the products of a uniform number and the smallest float are rounded up to it
    prob = torch.tensor([[0, 1e-45]]).repeat(200, 1)
    assert sample_ids(prob, torch.Generator().manual_seed(0)).unique().tolist() == [1]


def test_a_large_vocabulary_is_scored_a_few_prompts_at_a_time():
    """The logits of 3 prompts of GPT-2 are 2^25 numbers."""
    large = GPT(50257, 12, n_layer=1, n_head=1, n_embd=1)
    assert [prompts_at_a_time(large, k, 24) for k in (1, 8, 1000)] == [27, 3, 1]

# ----------------------------------------------------------------------------------------- adapters

def adapted_gpt(steps):
    """A policy with adapters of rank 2, after some steps of training."""
    policy = small_gpt()
    policy.untie_head()
    trained = add_adapters(policy, 2, torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(trained, lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        policy(some_tokens()).square().mean().backward()
        optimizer.step()
    return policy, trained


def test_a_policy_starts_as_the_reference_and_only_its_adapters_are_trained():
    policy, trained = adapted_gpt(0)
    assert torch.equal(policy(some_tokens()), small_gpt()(some_tokens()))
    assert policy.lm_head.linear.weight.data_ptr() != policy.wte.weight.data_ptr()
    assert len(trained) == 2 * (4 * 2 + 1)              # on 4 maps in 2 blocks, and on the head
    assert sum(p.requires_grad for p in policy.parameters()) == len(trained)


def test_an_adapter_maps_inputs_of_size_1_to_numbers_of_size_1():
    adapter = LowRank(torch.nn.Linear(10_000, 3), 4, torch.Generator().manual_seed(0))
    x = torch.randn(500, 10_000, generator=torch.Generator().manual_seed(1))
    assert (x @ adapter.a.T).std().item() == pytest.approx(1, abs=0.05)


def test_a_merged_model_is_the_adapted_one_and_differs_from_the_first_by_the_rank():
    policy, _ = adapted_gpt(3)
    before = policy(some_tokens()).detach()
    merge_adapters(policy)
    assert torch.allclose(policy(some_tokens()), before, rtol=0, atol=1e-5)
    start = small_gpt()
    start.untie_head()
    assert policy.state_dict().keys() == start.state_dict().keys()
    for name, weight in start.state_dict().items():
        change = policy.state_dict()[name] - weight
        is_linear = "c_" in name and name.endswith("weight") or name == "lm_head.weight"
        rank = torch.linalg.matrix_rank(change.double().view(len(change), -1), atol=1e-4)
        assert rank == (2 if is_linear else 0), name
