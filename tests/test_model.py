"""The network, sampling and scoring, and adapters; test_vbon.py has the GPT of forty responses."""
import itertools
import math

import pytest
import torch

from model import (GPT, LowRank, add_adapters, merge_adapters, prompts_at_a_time, response_mask,
                   sample_ids, token_kl)


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

# -------------------------------------------------------------------------------------- the network

@torch.no_grad()
def test_attention_with_a_cache_is_full_attention():
    model = small_gpt()
    tokens = some_tokens()
    cache = model.new_cache(5, 12)
    # keys and values, 5 texts, 2 heads, 12 tokens, 8 numbers; one for each block
    assert [block.shape for block in cache] == [(2, 5, 2, 12, 8)] * 2
    states = [model.states(tokens[:, :4], cache)]
    for t in range(4, 12):
        states.append(model.states(tokens[:, t:t + 1], cache, t))
    logits = model.lm_head(torch.cat(states, 1))
    assert torch.allclose(logits, model(tokens), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="one token at a time"):
        model.states(tokens[:, 4:6], cache, 4)


@torch.no_grad()
def test_the_model_looks_only_back_and_at_all_of_it():
    tokens = some_tokens()
    before = small_gpt()(tokens)
    for place in (0, 7, 11):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 20
        moved = (small_gpt()(changed) - before).abs().amax(-1)          # (5, 12)
        assert (moved[:, :place] < 1e-5).all()
        assert (moved[:, place:] > 1e-3).all()


@torch.no_grad()
def test_each_layer_adds_to_the_residual_stream():
    """With the biases alone, without the weights that read from it."""
    model = small_gpt()
    tokens = some_tokens()
    stream = model.wte(tokens) + model.wpe(torch.arange(12))
    for i, block in enumerate(model.h):
        for layer, bias in ((block.attn.c_proj, 0.3 + i), (block.mlp.c_proj, -2.0)):
            layer.weight.zero_()
            layer.bias.copy_(bias * torch.arange(16))
            stream = stream + layer.bias
    assert torch.allclose(model.states(tokens), model.ln_f(stream), rtol=0, atol=1e-4)


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
    assert model.h[0].mlp.c_fc.weight.shape == (256, 64)
    assert sum(p.numel() for p in model.parameters()) == 340 * 64 + 128 + 2 * (12 * 64 ** 2 + 832)


@pytest.mark.parametrize("use", [
    lambda model, tokens: model(tokens),
    lambda model, tokens: model.sample(tokens[:, :4], 2, 10),
    lambda model, tokens: model.logprob(tokens[:, :4], tokens[:, None, :10]),
    lambda model, tokens: model.states(tokens[:, :1], model.new_cache(5, 20), 12)])
def test_more_tokens_than_there_are_positions_are_refused(use):
    tokens = torch.cat([some_tokens(), some_tokens()[:, :1]], 1)        # 13, and 12 positions
    with pytest.raises(ValueError, match="tokens; this model has room for 12"):
        use(small_gpt(), tokens)


def test_width_must_be_a_multiple_of_the_heads():
    with pytest.raises(ValueError, match="n_embd = 16 is not a multiple of n_head = 3"):
        GPT(10, 4, n_head=3, n_embd=16)


def test_untying_keeps_the_function_and_parts_the_weights():
    model = small_gpt()
    assert model.lm_head.weight is model.wte.weight
    before = model(some_tokens())
    model.untie_head()
    assert torch.equal(model(some_tokens()), before)
    assert model.config["tied"] is False
    # what changes the one does not change the other
    embedding = model.wte.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight += 1
    assert torch.equal(model.wte.weight, embedding)
    model.untie_head()                                  # once more: nothing to do
    assert not torch.equal(model.lm_head.weight, embedding)

# ------------------------------------------------------------------------------ sampling and scoring

def ending_gpt():
    """Two letters and end-of-text, which is frequent: after 8 tokens, most responses have ended."""
    generator = torch.Generator().manual_seed(1)
    model = GPT(3, 10, n_layer=1, n_head=2, n_embd=16, generator=generator)
    with torch.no_grad():
        for p in model.parameters():
            p *= 6
    return model


@torch.no_grad()
def test_samples_follow_the_enumerated_distribution_while_ended_ones_leave_the_batch():
    model = ending_gpt()
    prompt = torch.tensor([[1, 0]])
    strings = set()
    for ids in itertools.product(range(3), repeat=7):
        if 2 in ids:
            ids = ids[:ids.index(2)] + (2,) * (7 - ids.index(2))
        strings.add(ids)
    strings = torch.tensor(sorted(strings))[None]                       # (1, 255, 7)
    logprob = model.logprob(prompt, strings)[0]
    assert logprob.dtype == torch.float64
    prob = logprob.exp()
    assert prob.sum().item() == pytest.approx(1, abs=1e-6)
    response, sampled = model.sample(prompt.repeat(4, 1), 10_000, 7,
                                     torch.Generator().manual_seed(0))
    ended = (response[..., :4] == 2).any(-1).double().mean()
    assert 0.1 < ended < 0.95                           # some leave the batch, some do not
    # each string read as a number with the digits 0, 1, 2 is in ascending order
    digits = 3 ** torch.arange(6, -1, -1)
    found = torch.searchsorted((strings[0] * digits).sum(-1), (response * digits).sum(-1)).flatten()
    assert torch.equal(strings[0, found], response.flatten(0, 1))       # no others
    share = found.bincount(minlength=255) / 40_000
    assert ((share - prob).abs() < 5 * (prob / 40_000).sqrt() + 1e-4).all()
    assert torch.allclose(sampled.flatten(), logprob[found], rtol=0, atol=1e-5)


@torch.no_grad()
def test_logprobs_of_500_tokens_agree_to_four_digits():
    generator = torch.Generator().manual_seed(0)
    model = GPT(3000, 512, n_layer=2, n_head=2, n_embd=32, generator=generator)
    for p in model.parameters():
        p *= 3
    prompt = torch.randint(0, 2999, (4, 4), generator=generator)
    response, sampled = model.sample(prompt, 4, 500, generator)
    assert response_mask(response, 2999).sum(-1).max() > 300
    assert (sampled - model.logprob(prompt, response)).abs().max() < 1e-4


def test_what_follows_the_end_does_not_count():
    prompt = torch.tensor([[1, 2]])
    response = torch.tensor([[[5, 19, 19, 19], [5, 19, 7, 8]]])
    policy = small_gpt()
    policy.untie_head()
    with torch.no_grad():
        policy.lm_head.weight += 0.1 * torch.randn(20, 16, generator=torch.Generator())
    for found in (policy.logprob(prompt, response),
                  token_kl(policy, small_gpt(), prompt, response)):
        one, two = found[0].tolist()
        assert one == pytest.approx(two, abs=1e-5)
        assert one != 0


def test_a_sampled_id_is_one_of_the_tokens_even_where_rounding_says_the_next():
    # half of the products of a uniform number and the smallest float are rounded up to it
    prob = torch.full((200, 1), 1e-45)
    assert sample_ids(prob, torch.Generator().manual_seed(0)).unique().tolist() == [0]


def test_a_large_vocabulary_is_scored_a_few_prompts_at_a_time():
    """The logits of 3 prompts of GPT-2 are 2^25 numbers."""
    large = GPT(50257, 12, n_layer=1, n_head=1, n_embd=1)
    assert prompts_at_a_time(large, 8, 24) == 3
    assert prompts_at_a_time(large, 1, 24) == 27
    assert prompts_at_a_time(large, 1000, 24) == 1

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
    assert len(trained) == 2 * (4 * 2 + 1)              # on 4 maps in 2 blocks, and on the head
    assert sum(p.requires_grad for p in policy.parameters()) == len(trained)
    assert all(p.requires_grad for p in trained)


def test_an_adapter_maps_inputs_of_size_1_to_numbers_of_size_1():
    linear = torch.nn.Linear(10_000, 3)
    adapter = LowRank(linear, 4, torch.Generator().manual_seed(0))
    x = torch.randn(500, 10_000, generator=torch.Generator().manual_seed(1))
    assert (x @ adapter.a.T).std().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(adapter(x), linear(x))           # B starts at 0


def test_a_merged_model_is_the_adapted_one_and_differs_from_the_first_by_the_rank():
    policy, _ = adapted_gpt(3)
    before = policy(some_tokens()).detach()
    merge_adapters(policy)
    assert torch.allclose(policy(some_tokens()), before, rtol=0, atol=1e-5)
    assert not torch.allclose(small_gpt()(some_tokens()), before, rtol=0, atol=1e-2)
    start = small_gpt()
    start.untie_head()
    assert policy.state_dict().keys() == start.state_dict().keys()
    for name, weight in start.state_dict().items():
        change = policy.state_dict()[name] - weight
        if "c_" in name and name.endswith("weight") or name == "lm_head.weight":
            assert torch.linalg.matrix_rank(change.double(), atol=1e-4).item() == 2, name
        else:
            assert not change.any(), name


def test_a_tied_model_gets_no_adapters():
    """The adapter of the head would not be on the embedding, though both are one weight."""
    with pytest.raises(ValueError, match="call untie_head first"):
        add_adapters(small_gpt(), 2, torch.Generator())
