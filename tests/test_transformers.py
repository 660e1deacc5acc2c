"""What a run leaves, in the transformers library: the same model, tokenizer and distribution."""
import random

import pytest
import torch
from running import run

from model import GPT, response_mask
from support.huggingface import load_model, save_model
from support import results
from support.tokenizer import pretrained_encoding, train_tokenizer

transformers = pytest.importorskip("transformers", reason="needs the transformers library")

ODD = ["", " ", "a film", "naïve café", "日本語の映画", "🎬🍿", "tabs\t\n\n  and\r\n",
       "'s don't 12_3__ !?", "\x00\u2028é", "x" * 50, "  two  spaces ", "a\u00a0b", "ǅ ʰ ² ½ Ⅷ",
       "मराठी ไทย", "e\u0301", "_", "'S 'T", "1٢3", "\u200d\u200b"]
LETTERS = [chr(i) for i in [*range(32, 127), 9, 10, 13, 0xa0, 0xe9, 0x2019, 0x20ac, 0x4e2d, 0x1f600,
                            0x661, 0x300, 0x2028]]
PROMPT = "i watched this"


def odd_strings(count):
    rng = random.Random(0)
    return ODD + ["".join(rng.choices(LETTERS, k=rng.randint(1, 40))) for _ in range(count)]


@pytest.mark.parametrize("name", ["policy-n2-seed0", "reference-seed0"])
def test_transformers_loads_what_a_run_leaves(name, finished_run):
    folder = finished_run / "out" / name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    encoding = pretrained_encoding(folder)
    ours = load_model(folder)
    for text in odd_strings(100):
        assert tokenizer.encode(text, add_special_tokens=False) == encoding.encode_ordinary(text)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, encoding.n_vocab, (8, 20), generator=generator)
    with torch.no_grad():
        wanted = ours(tokens)
        difference = theirs(tokens).logits - wanted
    assert difference.abs().max() <= 2e-5 * wanted.abs().max()
    assert theirs.config.tie_word_embeddings is False
    assert theirs.config.eos_token_id == theirs.config.bos_token_id == encoding.eot_token
    assert theirs.config.pad_token_id == encoding.eot_token
    for token in (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id):
        assert token == encoding.eot_token
    assert tokenizer.model_max_length == theirs.config.n_positions == 28


@pytest.fixture(scope="module")
def varied(tmp_path_factory):
    """A folder of a model whose responses differ in length, as a run leaves it; ours and theirs."""
    folder = tmp_path_factory.mktemp("varied") / "policy"
    encoding = train_tokenizer(["i watched this film . the end was slow"], 300)
    ours = GPT(encoding.n_vocab, 28, n_embd=16, n_head=2, tied=False,
               generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in ours.parameters():
            p *= 20
        # the first number of the last state is always 1; the head uses it to end more often
        ours.ln_f.weight[0] = 0
        ours.ln_f.bias[0] = 1
        ours.lm_head.weight[-1, 0] = 3
    row = {name: 0 for name in results.KEYS} | {"prompt_tokens": 4, "length": 24}
    results.export_model(folder, ours, encoding, row)
    return folder, ours


def test_the_tokenizer_returns_what_generate_needs_and_nothing_else(varied):
    """GPT-2 would add an embedding for each token type."""
    folder, _ = varied
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert set(tokenizer(PROMPT, return_tensors="pt")) == {"input_ids", "attention_mask"}


@torch.no_grad()
def test_a_plain_generate_samples_from_the_models_own_distribution(varied):
    folder, ours = varied
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = tokenizer([PROMPT] * 4000, return_tensors="pt")
    torch.manual_seed(0)
    tokens = model.generate(**prompt)
    start = prompt["input_ids"].shape[1]
    assert tokens.shape[1] == 28                        # prompt and response have 28 positions
    theirs = tokens[None, :, start:]
    g = torch.Generator().manual_seed(1)
    mine, _ = ours.sample(prompt["input_ids"][:1], 4000, 28 - start, g)
    for one, two in zip(statistics(ours, prompt["input_ids"][:1], theirs),
                        statistics(ours, prompt["input_ids"][:1], mine)):
        error = ((one.var() + two.var()) / 4000).sqrt()
        assert abs(one.mean() - two.mean()) < 4 * error
    assert statistics(ours, prompt["input_ids"][:1], mine)[1].std() > 3


def statistics(model, prompt, response):
    """The log-probabilities, the lengths and the first tokens of responses (1, K, L)."""
    logprob = model.logprob(prompt, response)[0]
    length = response_mask(response, model.eot)[0].sum(-1).double()
    return logprob, length, response[0, :, 0].double()


@torch.no_grad()
def test_prompts_of_several_lengths_are_padded_on_the_left(varied):
    folder, _ = varied
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    batch = tokenizer(["i", PROMPT], return_tensors="pt", padding=True)
    assert batch["attention_mask"][0, 0] == 0
    assert batch["attention_mask"][:, -1].tolist() == [1, 1]
    output = model.generate(**batch, do_sample=False, max_new_tokens=3)
    for text, row in zip(["i", PROMPT], output):
        alone = tokenizer(text, return_tensors="pt")
        alone = model.generate(**alone, do_sample=False, max_new_tokens=3)[0]
        wanted = alone[len(tokenizer(text)["input_ids"]):]
        assert torch.equal(row[batch["input_ids"].shape[1]:][:len(wanted)], wanted)


def test_the_pipeline_runs_for_twenty_prompts(varied):
    folder, _ = varied
    pipeline = transformers.pipeline("text-generation", model=str(folder))
    prompts = [" ".join(["film"] * i) for i in range(1, 21)]
    for prompt in prompts:
        assert len(pipeline.tokenizer(prompt)["input_ids"]) < 28
        text = pipeline(prompt)[0]["generated_text"]
        assert text.startswith(prompt)


def test_what_transformers_saves_is_a_model_to_start_from(finished_run, tmp_path):
    first = finished_run / "out" / "policy-n2-seed0"
    folder = tmp_path / "theirs"
    save_model(transformers.AutoModelForCausalLM.from_pretrained(first), folder)
    save_model(transformers.AutoTokenizer.from_pretrained(first), folder)
    weights = load_model(folder).state_dict()
    for key, x in load_model(first).state_dict().items():
        assert torch.equal(weights[key], x), key
    args = ("--quick", "--n", 2, "--init", "theirs", "--lm-steps", 0)
    status, _, error = run(*args, cwd=tmp_path)
    assert (status, error) == (0, "")
