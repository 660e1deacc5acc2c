"""A model of transformers behind the two methods: exact probabilities."""
import pytest
import torch

import vbon

transformers = pytest.importorskip("transformers", reason="needs the transformers library")

from experiments.other_model import OtherModel, pad_left  # noqa: E402 (it imports transformers)

PROMPT = torch.tensor([[0, 2]])


def llama():
    """Always the same small Llama, with four tokens."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=4, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, initializer_range=0.4))


def gpt2():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=4, n_positions=16, n_embd=16, n_layer=1, n_head=2, initializer_range=0.4,
        bos_token_id=3, eos_token_id=3))


def with_adapters():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(gpt2(), peft.LoraConfig(target_modules="all-linear",
                                                       init_lora_weights=False))


def all_responses(ends=(3,), pad=3):
    """All strings of 3 tokens, padded after their first end (1, *, 3)."""
    y = torch.cartesian_prod(*[torch.arange(4)] * 3)
    ended = torch.isin(y, torch.tensor(ends)).int()
    y[ended.cumsum(1) > ended] = pad
    return y.unique(dim=0)[None]


def shares(y, sampled):  # (S, L), (K, L) -> (S,)
    """Return how often each response was sampled. There must be no others."""
    index = (sampled[:, None] == y[None]).all(-1).int().argmax(-1)
    assert torch.equal(y[index], sampled)
    return index.bincount(minlength=len(y)) / len(sampled)


@pytest.mark.parametrize("ends, pad", [([3], 3), ([1, 3], 3), ([1, 3], 0), ([], 3)])
def test_it_samples_from_the_distribution_of_its_logprobs(ends, pad):
    model = OtherModel(llama(), ends, pad)
    y = all_responses(ends, pad)
    with torch.no_grad():
        p = model.logprob(PROMPT, y)[0].exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    sampled, _ = model.sample(PROMPT, 20_000, 3, torch.Generator().manual_seed(0))
    assert (shares(y[0], sampled[0]) - p).abs().max() < 0.012


@torch.no_grad()
@pytest.mark.parametrize("make", [llama, gpt2, with_adapters])
def test_prompts_padded_on_the_left_are_as_if_alone(make):
    """Also those that begin with the token which pads responses."""
    model = OtherModel(make(), [3], 3)
    prompts = [[0, 2], [3, 3, 0, 2], [2, 3, 1]]
    prompt = pad_left(prompts)
    y = all_responses().expand(3, -1, -1)
    together = model.logprob(prompt, y)
    sampled, _ = model.sample(prompt, 20_000, 3, torch.Generator().manual_seed(0))
    for i, ids in enumerate(prompts):
        alone = model.logprob(torch.tensor([ids]), y[i:i + 1])
        assert torch.allclose(together[i:i + 1], alone, atol=1e-5)
        # the last response ends at once: by transformers' own call, without a mask
        logits = model.model(torch.tensor([ids])).logits[0, -1].double()
        assert together[i, -1].item() == pytest.approx(logits.log_softmax(-1)[3].item(), abs=1e-5)
        assert (shares(y[i], sampled[i]) - together[i].exp()).abs().max() < 0.012


def test_its_random_numbers_are_those_of_the_generator_whatever_the_settings_of_the_model():
    first, _ = OtherModel(llama(), [3], 3).sample(PROMPT, 50, 3, torch.Generator().manual_seed(5))
    other = llama()
    other.generation_config.update(temperature=0.1, top_k=1, repetition_penalty=3.0)
    torch.manual_seed(77)
    before = torch.get_rng_state()
    second, _ = OtherModel(other, [3], 3).sample(PROMPT, 50, 3, torch.Generator().manual_seed(5))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())


def test_the_steps_of_vbon_work_with_it():
    policy = OtherModel(llama(), [3], 3)
    generator = torch.Generator().manual_seed(0)
    rollout = vbon.roll_out(policy, policy, lambda x, y: y.sum(-1), PROMPT, 8, 3, generator)
    log_target = vbon.bon_target(rollout.ref_logprob, rollout.reward, rollout.reward, 3)
    logprob = vbon.reinforce(policy, PROMPT, rollout.response, log_target)
    assert torch.equal(logprob, rollout.ref_logprob)
    assert all(p.grad.norm() > 0 for p in policy.parameters())
