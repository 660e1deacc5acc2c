"""The network, sampling and scoring, adapters, and the loss of a language model."""
import copy
import itertools
import math

import pytest
import torch

import model as model_file
from model import (GPT, LowRank, add_adapters, lm_loss, merge_adapters, response_mask,
                   sample_ids)


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
    assert logits.shape == (5, 12, 20)
    assert torch.allclose(logits, model(tokens), rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_model_looks_only_back():
    tokens = some_tokens()
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 20
    before = small_gpt()(tokens)
    after = small_gpt()(changed)
    assert torch.allclose(before[:, :7], after[:, :7], rtol=0, atol=1e-5)
    assert not torch.allclose(before[:, 7:], after[:, 7:], rtol=0, atol=1e-2)


def test_logprobs_while_sampling_are_those_scored_later_for_long_responses():
    g = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, 19, (6, 3), generator=g)
    response, sampled = small_gpt().sample(prompt, 50, 9, g)
    lengths = response_mask(response, 19).sum(-1)
    assert lengths.min() < 4
    assert lengths.max() == 9
    assert torch.allclose(sampled, small_gpt().logprob(prompt, response), rtol=0, atol=2e-4)


def test_a_batch_too_large_for_memory_is_sampled_in_parts(monkeypatch):
    """The cache of a prompt: a key and a value of 16 numbers, 4 bytes each, in 2 blocks, for 2
    responses of 12 tokens."""
    prompt = torch.arange(15).view(5, 3)
    monkeypatch.setattr(model_file, "CACHE_BYTES", 3 * (2 * 16 * 4 * 2 * 2 * 12) - 1)
    response, logprob = small_gpt().sample(prompt, 2, 9, torch.Generator().manual_seed(0))
    monkeypatch.undo()
    g = torch.Generator().manual_seed(0)                # parts of two prompts, one after the other
    parts = [small_gpt().sample(part, 2, 9, g) for part in prompt.split(2)]
    assert torch.equal(response, torch.cat([part for part, _ in parts]))
    assert torch.equal(logprob, torch.cat([part for _, part in parts]))


def test_what_follows_the_end_does_not_count():
    prompt = torch.tensor([[1, 2]])
    ended = torch.tensor([[[5, 19, 19, 19], [5, 19, 7, 8]]])
    one, two = small_gpt().logprob(prompt, ended)[0].tolist()
    assert one == pytest.approx(two, abs=1e-5)


def test_width_must_be_a_multiple_of_the_heads():
    with pytest.raises(ValueError, match="n_embd = 16 is not a multiple of n_head = 3"):
        GPT(10, 4, n_head=3, n_embd=16)


def test_untying_keeps_the_function_and_parts_the_weights():
    model = small_gpt()
    assert model.lm_head.weight is model.wte.weight
    before = model(some_tokens())
    model.untie_head()
    assert torch.equal(model(some_tokens()), before)
    assert model.lm_head.weight is not model.wte.weight
    assert model.config["tied"] is False
    # what changes the one does not change the other
    embedding = model.wte.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight += 1
    assert torch.equal(model.wte.weight, embedding)


def test_a_sampled_id_is_one_of_the_tokens_even_where_rounding_says_the_next():
    # half of the products of a uniform number and the smallest float are rounded up to it
    prob = torch.full((200, 1), 1e-45)
    assert sample_ids(prob, torch.Generator().manual_seed(0)).unique().tolist() == [0]


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


def test_the_loss_of_a_new_model_is_that_of_guessing_and_falls():
    tokens = torch.arange(48).view(4, 12) % 19
    tokens[:, 8:] = 19
    model = GPT(20, 12, n_embd=32, n_head=2, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    assert lm_loss(model, tokens).item() == pytest.approx(math.log(20), abs=0.2)
    for _ in range(60):
        optimizer.zero_grad()
        lm_loss(model, tokens).backward()
        optimizer.step()
    assert lm_loss(model, tokens).item() < 0.5


def test_the_loss_is_the_mean_over_the_tokens_that_count():
    """The first token is given; one end-of-text counts."""
    tokens = torch.tensor([[3, 5, 19, 19, 19], [3, 6, 7, 8, 9]])
    prompt = tokens[:, :1]
    logprob = small_gpt().logprob(prompt, tokens[:, None, 1:])
    assert lm_loss(small_gpt(), tokens).item() == pytest.approx(-logprob.sum().item() / 6, abs=1e-4)

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


def test_a_policy_starts_as_the_reference():
    policy, _ = adapted_gpt(0)
    assert torch.equal(policy(some_tokens()), small_gpt()(some_tokens()))


def test_only_the_adapters_are_trained():
    policy, trained = adapted_gpt(0)
    assert len(trained) == 2 * (4 * 2 + 1)              # on 4 maps in 2 blocks, and on the head
    assert sum(p.requires_grad for p in policy.parameters()) == len(trained)


def test_an_adapter_maps_inputs_of_size_1_to_numbers_of_size_1():
    weight = torch.zeros(3, 10_000)
    adapter = LowRank(weight, 4, torch.Generator().manual_seed(0))
    x = torch.randn(500, 10_000, generator=torch.Generator().manual_seed(1))
    assert (x @ adapter.a.T).std().item() == pytest.approx(1, abs=0.05)


def test_what_adapters_change_is_of_low_rank():
    policy, _ = adapted_gpt(3)
    merge_adapters(policy)
    start = small_gpt()
    start.untie_head()
    for name, before in start.state_dict().items():
        change = policy.state_dict()[name] - before
        if "c_" in name and name.endswith("weight") or name == "lm_head.weight":
            assert torch.linalg.matrix_rank(change.double(), atol=1e-4).item() == 2, name
        else:
            assert not change.any(), name


def test_merging_adapters_keeps_the_function_and_the_names():
    policy, _ = adapted_gpt(3)
    before = policy(some_tokens()).detach()
    merge_adapters(policy)
    assert torch.allclose(policy(some_tokens()), before, rtol=0, atol=1e-5)
    assert not torch.allclose(small_gpt()(some_tokens()), before, rtol=0, atol=1e-2)
    assert policy.state_dict().keys() == small_gpt().state_dict().keys()


# -------------------------------------------------------- what a caller would not notice is refused

def test_a_tied_model_gets_no_adapters():
    """The adapter of the head would not be on the embedding, though both are one weight."""
    with pytest.raises(ValueError, match="call untie_head first"):
        add_adapters(small_gpt(), 2, torch.Generator())


def test_merging_a_copy_leaves_the_original_as_it_was():
    policy, _ = adapted_gpt(3)
    before = policy(some_tokens()).detach()
    duplicate = copy.deepcopy(policy)
    merge_adapters(duplicate)
    assert torch.equal(policy(some_tokens()), before)
    assert torch.allclose(duplicate(some_tokens()), before, rtol=0, atol=1e-5)
    merge_adapters(policy)
    assert torch.allclose(policy(some_tokens()), before, rtol=0, atol=1e-5)


def test_after_the_prompt_only_one_token_at_a_time_is_right():
    model = small_gpt()
    cache = model.new_cache(5, 12)
    model.states(some_tokens()[:, :4], cache)
    with pytest.raises(ValueError, match="one token at a time"):
        model.states(some_tokens()[:, 4:6], cache, 4)


@pytest.mark.parametrize("use", [
    lambda model, tokens: model(tokens),
    lambda model, tokens: model.sample(tokens[:, :4], 2, 10),
    lambda model, tokens: model.logprob(tokens[:, :4], tokens[:, None, :10]),
    lambda model, tokens: model.states(tokens[:, :1], model.new_cache(5, 20), 12)])
def test_more_tokens_than_there_are_positions_are_refused(use):
    tokens = torch.cat([some_tokens(), some_tokens()[:, :1]], 1)        # 13, and 12 positions
    with pytest.raises(ValueError, match="tokens; this model has room for 12"):
        use(small_gpt(), tokens)

# ---------------------------------------------------------------- sampling, with responses that end

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
    strings = set()
    for ids in itertools.product(range(3), repeat=7):
        if 2 in ids:
            ids = ids[:ids.index(2)] + (2,) * (7 - ids.index(2))
        strings.add(ids)
    strings = torch.tensor(sorted(strings))[None]                       # (1, 255, 7)
    prob = model.logprob(torch.tensor([[1, 0]]), strings)[0].exp()
    assert prob.sum().item() == pytest.approx(1, abs=1e-6)
    prompt = torch.tensor([[1, 0]]).repeat(4, 1)
    response, logprob = model.sample(prompt, 10_000, 7, torch.Generator().manual_seed(0))
    ended = (response[..., :4] == 2).any(-1).double().mean()
    assert 0.1 < ended < 0.95                           # some leave the batch, some do not
    code = 3 ** torch.arange(7)
    index = torch.searchsorted(*[x.contiguous() for x in sort_codes(strings, response, code)])
    order = (strings[0] * code).sum(-1).argsort()
    found = order[index.flatten()]
    share = found.bincount(minlength=255) / 40_000
    assert ((share - prob).abs() < 5 * (prob / 40_000).sqrt() + 1e-4).all()
    assert torch.allclose(logprob.flatten(), prob.log()[found], rtol=0, atol=1e-5)


def sort_codes(strings, response, code):
    """The sorted codes of all strings, and the codes of responses."""
    return (strings[0] * code).sum(-1).sort().values, (response * code).sum(-1)


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
