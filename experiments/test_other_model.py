"""A model of transformers behind the two methods: exact probabilities, and updates."""
import itertools

import pytest
import torch

import vbon

transformers = pytest.importorskip("transformers", reason="needs the transformers library")

from experiments.other_model import OtherModel, main  # noqa: E402 (it imports transformers)

STRINGS = torch.tensor([list(y) for y in itertools.product(range(4), repeat=3)])
PROMPT = torch.tensor([[0, 2]])


def small_llama():
    """Four tokens, of which the last one ends a response; not a GPT-2."""
    config = transformers.LlamaConfig(
        vocab_size=4, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=8, initializer_range=0.4)
    torch.manual_seed(0)
    return OtherModel(transformers.LlamaForCausalLM(config), 3)


def all_responses():
    """(1, 40, 3): all strings that end with their first 3, or have none; padded with 3."""
    ended = (STRINGS == 3).cumsum(-1) > 0
    return STRINGS.masked_fill(ended, 3).unique(dim=0)[None]


def letters(prompt, response):
    """A reward: every response has its own."""
    return (response * torch.tensor([16, 4, 1])).sum(-1).double()


def exact_target(model, n):
    """π_bon of all responses (40,), by equation (2)."""
    y = all_responses()
    p = model.logprob(PROMPT, y)[0].double().exp()
    r = letters(PROMPT, y)[0]
    cdf = ((r[None] < r[:, None]) * p).sum(1)
    return (cdf + p) ** n - cdf ** n


def test_it_samples_from_the_distribution_of_its_logprobs():
    model = small_llama()
    with torch.no_grad():
        p = model.logprob(PROMPT, all_responses())[0].exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    sampled, logprob = model.sample(PROMPT, 20_000, 3, torch.Generator().manual_seed(0))
    index = (sampled[0][:, None] == all_responses()[0][None]).all(-1).int().argmax(-1)
    share = index.bincount(minlength=len(p)) / 20_000
    assert (share - p).abs().max() < 0.01
    assert torch.allclose(logprob[0].exp(), p[index], atol=1e-5)


def test_updates_bring_it_to_best_of_n():
    policy = small_llama()
    reference = small_llama()
    generator = torch.Generator().manual_seed(1)
    ref_response, _ = reference.sample(PROMPT, 5_000, 3, generator)
    ref_rewards = letters(PROMPT, ref_response)
    target = exact_target(reference, 3).detach()
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.003)
    kls = []
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.003 * (1 - step / 300)
        optimizer.zero_grad()
        rollout = vbon.roll_out(policy, reference, letters, PROMPT, 512, 3, generator)
        log_target = vbon.bon_target(rollout.ref_logprob, rollout.reward, ref_rewards, 3)
        vbon.reinforce(policy, PROMPT, rollout.response, log_target)
        optimizer.step()
        with torch.no_grad():
            log_p = policy.logprob(PROMPT, all_responses())[0].double()
        kls.append((log_p.exp() * (log_p - target.log())).sum().item())
    assert kls[0] > 0.2
    assert kls[-1] < 0.02


def test_the_demo_runs_on_a_folder(tmp_path, capsys):
    from model import GPT
    from support.reviews import builtin_reviews
    from support.tokenizer import save_tokenizer, train_tokenizer
    encoding = train_tokenizer([text for text, _ in builtin_reviews(200, 0)], 300)
    GPT(encoding.n_vocab, 40, 1, 2, 8).save_pretrained(tmp_path)
    save_tokenizer(encoding, tmp_path)
    main([str(tmp_path), "--steps", "3"])
    assert capsys.readouterr().out.count("win_rate") == 3
