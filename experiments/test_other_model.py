"""A model of transformers behind the two methods: exact probabilities, and updates."""
import itertools
import time

import pytest
import torch

import vbon

transformers = pytest.importorskip("transformers", reason="needs the transformers library")

from experiments.other_model import OtherModel, main  # noqa: E402 (it imports transformers)

STRINGS = torch.tensor([list(y) for y in itertools.product(range(4), repeat=3)])
PROMPT = torch.tensor([[0, 2]])


def llama(**changes):
    """Always the same small Llama; not a GPT-2."""
    sizes = dict(vocab_size=4, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                 num_attention_heads=2, max_position_embeddings=512, initializer_range=0.4)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(sizes | changes)))


def small_llama(ends=3, pad=3):
    """Four tokens; by default the last one ends a response."""
    return OtherModel(llama(), ends, pad)


def all_responses(ends=(3,), pad=3):
    """All strings of 3 tokens, padded after their first end (1, *, 3)."""
    found = set()
    for ids in itertools.product(range(4), repeat=3):
        stop = [i for i, token in enumerate(ids) if token in ends]
        if stop:
            ids = ids[:stop[0] + 1] + (pad,) * (2 - stop[0])
        found.add(ids)
    return torch.tensor(sorted(found))[None]


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


@pytest.mark.parametrize("ends, pad", [(3, 3), ([3], 3), ([1, 3], 3), ([1, 3], 0), (None, 3)])
def test_it_samples_from_the_distribution_of_its_logprobs(ends, pad):
    """One end, several, or none."""
    model = small_llama(ends, pad)
    ends = [ends] if isinstance(ends, int) else ends or []
    y = all_responses(ends, pad)
    with torch.no_grad():
        p = model.logprob(PROMPT, y)[0].exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    sampled, logprob = model.sample(PROMPT, 20_000, 3, torch.Generator().manual_seed(0))
    index = (sampled[0][:, None] == y[0][None]).all(-1).int().argmax(-1)
    assert torch.equal(y[0][index], sampled[0])
    share = index.bincount(minlength=len(p)) / 20_000
    assert (share - p).abs().max() < 0.012
    assert torch.allclose(logprob[0].exp(), p[index], atol=1e-5)


def test_its_random_numbers_are_those_of_the_generator():
    before = torch.get_rng_state()
    first, _ = small_llama().sample(PROMPT, 50, 3, torch.Generator().manual_seed(5))
    torch.manual_seed(77)
    state = torch.get_rng_state()
    second, _ = small_llama().sample(PROMPT, 50, 3, torch.Generator().manual_seed(5))
    assert torch.equal(first, second)
    assert before is not None and state is not None


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prompts_padded_on_the_left_are_as_if_alone(kind):
    torch.manual_seed(0)
    inner = llama()
    if kind == "gpt2":
        inner = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=4, n_positions=16, n_embd=16, n_layer=1, n_head=2, initializer_range=0.4))
    model = OtherModel(inner, 3, 3)
    # the padding is the end-of-text, which also occurs inside of a prompt
    prompt = torch.tensor([[3, 3, 0, 2], [1, 3, 0, 2], [3, 2, 3, 1]])
    y = all_responses().expand(3, -1, -1)
    together = model.logprob(prompt, y)
    for i, alone in enumerate([[0, 2], [1, 3, 0, 2], [2, 3, 1]]):
        assert torch.allclose(together[i], model.logprob(torch.tensor([alone]), y[:1])[0], atol=1e-5)
    sampled, logprob = model.sample(prompt, 10_000, 3, torch.Generator().manual_seed(0))
    # the mean log-probability is that of the distribution
    exact = (together.exp() * together).sum(-1)
    assert torch.allclose(logprob.mean(-1), exact, atol=0.06)


def test_half_precision_is_refused_with_a_reason():
    with pytest.raises(ValueError, match="is torch.bfloat16: load the model in float32"):
        OtherModel(llama().bfloat16(), 3, 3)


def test_its_own_generation_settings_do_not_matter():
    model = small_llama()
    first, _ = model.sample(PROMPT, 200, 3, torch.Generator().manual_seed(0))
    model.model.generation_config.update(temperature=0.1, top_k=1, do_sample=True)
    second, _ = model.sample(PROMPT, 200, 3, torch.Generator().manual_seed(0))
    assert torch.equal(first, second)


def test_sampling_takes_hardly_longer_than_bare_generate():
    model = OtherModel(llama(vocab_size=1000, hidden_size=64, num_hidden_layers=2), None, 0)
    prompt = torch.ones(8, 4, dtype=torch.int64)
    seconds = {}
    for name, call in (
            ("generate", lambda: model.model.generate(
                prompt.repeat_interleave(4, 0), do_sample=True, top_k=0, max_new_tokens=128,
                eos_token_id=None, pad_token_id=0,
                attention_mask=torch.ones(32, 4, dtype=torch.int64))),
            ("ours", lambda: model.sample(prompt, 4, 128, torch.Generator()))):
        call()
        began = time.perf_counter()
        call()
        seconds[name] = time.perf_counter() - began
    assert seconds["ours"] < 2 * seconds["generate"]


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama in bfloat16 with a tokenizer, prompts of several lengths, and a reward."""
    from support.reviews import builtin_reviews
    from support.tokenizer import save_tokenizer, train_tokenizer
    folder = tmp_path_factory.mktemp("other")
    encoding = train_tokenizer([text for text, _ in builtin_reviews(200, 0)], 300)
    model = llama(vocab_size=encoding.n_vocab, num_hidden_layers=2, hidden_size=32,
                  initializer_range=0.1)
    model.generation_config.eos_token_id = encoding.eot_token
    model.bfloat16().save_pretrained(folder / "model")
    save_tokenizer(encoding, folder / "model")
    (folder / "prompts.txt").write_text("i watched\nthis film last night was\nthe plot\n",
                                        encoding="utf-8")
    (folder / "reward.py").write_text(
        "def reward(prompts, responses):\n    return [r.count('a') + r.count('e') for r in responses]\n",
        encoding="utf-8")
    return folder


def test_the_demo_trains_and_leaves_a_folder_that_transformers_loads(folder, capsys):
    main([str(folder / "model"), "--prompts", str(folder / "prompts.txt"), "--reward",
          str(folder / "reward.py"), "--n", "3", "--steps", "60", "--length", "8", "--batch", "3",
          "--k", "32", "--out", str(folder / "tuned")])
    wins = [float(line.split("win_rate ")[1].split()[0])
            for line in capsys.readouterr().out.splitlines() if "win_rate" in line]
    assert len(wins) == 60
    assert sum(wins[:5]) / 5 < 0.6
    assert sum(wins[-10:]) / 10 > 0.65                  # best of 3: .75; in bfloat16 it hardly moves
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "tuned")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tuned")
    batch = tokenizer(["i watched"], return_tensors="pt")
    assert model.generate(**batch, max_new_tokens=4).shape[1] > batch["input_ids"].shape[1]


@pytest.mark.parametrize("arguments, message", [
    (["--k", "1"], "--k 1: want at least 2"), (["--n", "0"], "--n 0"), (["--steps", "0"], "--steps 0")])
def test_wrong_arguments_are_refused(arguments, message, folder):
    with pytest.raises(ValueError, match=message):
        main([str(folder / "model"), "--prompts", "p", "--reward", "r", *arguments])
