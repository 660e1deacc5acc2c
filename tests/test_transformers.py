"""What a run leaves, in the transformers library: the same model, tokenizer and distribution."""
import random

import pytest
import torch
from test_tokenizer import CASES, ODD, TEXTS, write_foreign

from model import response_mask
from support.huggingface import load_model
from support.tokenizer import make_encoding, pretrained_encoding, save_tokenizer, train_tokenizer

transformers = pytest.importorskip("transformers", reason="needs the transformers library")

LETTERS = [chr(i) for i in [*range(32, 127), 9, 10, 13, 0xa0, 0xe9, 0x2019, 0x20ac, 0x4e2d, 0x1f600,
                            0x661, 0x300, 0x2028]]
PROMPT = "i watched this"
POLICY = "out/policy-n2-seed0"


def load_both(folder):
    """The tokenizer and the model of a folder, as transformers loads them."""
    return (transformers.AutoTokenizer.from_pretrained(folder),
            transformers.AutoModelForCausalLM.from_pretrained(folder).eval())


def assert_same_ids(folder, texts):
    """For a folder of a tokenizer: transformers and we read it as the same."""
    ours = pretrained_encoding(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in texts:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode_ordinary(text)


@pytest.mark.parametrize("name", ["vbon", "gpt2"])
def test_transformers_reads_both_patterns(tmp_path, name):
    trained = train_tokenizer(TEXTS, 400)
    ranks = {trained.decode_single_token_bytes(i): i for i in range(399)}
    save_tokenizer(make_encoding(ranks, name), tmp_path)
    rng = random.Random(0)
    odd = ["".join(rng.choices(LETTERS, k=rng.randint(1, 40))) for _ in range(100)]
    assert_same_ids(tmp_path, ODD + odd + TEXTS)
    if name == "gpt2":
        (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "tokenizer_config.json").unlink()
        assert_same_ids(tmp_path, ODD + odd + TEXTS)


@pytest.mark.parametrize("place, value", [case[:2] for case in CASES if case[2] == "right"])
def test_transformers_reads_a_foreign_tokenizer_as_we_do(tmp_path, place, value):
    write_foreign(tmp_path, place, value)
    if place == "merges":
        (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
        (tmp_path / "tokenizer_config.json").unlink()
    assert_same_ids(tmp_path, ODD)


@pytest.mark.parametrize("name", [POLICY, "out/reference-seed0"])
def test_transformers_loads_what_a_run_leaves(name, finished_run):
    tokenizer, theirs = load_both(finished_run / name)
    ours = load_model(finished_run / name)
    assert_same_ids(finished_run / name, ODD)
    tokens = torch.randint(0, ours.eot + 1, (8, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = ours(tokens)
        difference = theirs(tokens).logits - wanted
    assert difference.abs().max() <= 2e-5 * wanted.abs().max()
    assert theirs.config.tie_word_embeddings is False
    for config in (theirs.config, tokenizer):
        assert config.eos_token_id == config.bos_token_id == config.pad_token_id == ours.eot
    assert tokenizer.unk_token_id == ours.eot
    assert tokenizer.model_max_length == theirs.config.n_positions == 28


def test_prompts_are_padded_on_the_left(finished_run):
    tokenizer, _ = load_both(finished_run / POLICY)
    batch = tokenizer(["i", PROMPT], padding=True)
    assert batch["attention_mask"] == [[0, 0, 1], [1, 1, 1]]
    assert batch["input_ids"][0][-1:] == tokenizer.encode("i")


def statistics(model, prompt, response):
    """The log-probabilities, the lengths and the first tokens of responses (1, K, L)."""
    logprob = model.logprob(prompt, response)[0]
    length = response_mask(response, model.eot)[0].sum(-1).double()
    return logprob, length, response[0, :, 0].double()


@torch.no_grad()
def test_a_plain_generate_samples_from_the_models_own_distribution(finished_run):
    tokenizer, theirs = load_both(finished_run / POLICY)
    ours = load_model(finished_run / POLICY)
    torch.manual_seed(0)
    tokens = theirs.generate(**tokenizer([PROMPT] * 4000, return_tensors="pt"))
    assert tokens.shape[1] == 28                        # prompt and response have 28 positions
    prompt = tokens[:1, :3]
    mine, _ = ours.sample(prompt, 4000, 25, torch.Generator().manual_seed(1))
    both = [statistics(ours, prompt, x) for x in (tokens[None, :, 3:], mine)]
    for one, two in zip(*both):
        error = ((one.var() + two.var()) / 4000).sqrt()
        assert abs(one.mean() - two.mean()) < 4 * error
    # a pipeline adds no settings that forbid a long prompt
    pipeline = transformers.pipeline("text-generation", model=str(finished_run / POLICY))
    assert pipeline("film " * 12)[0]["generated_text"].startswith("film " * 12)


def test_what_transformers_saves_is_a_model_to_start_from(finished_run, tmp_path):
    first = finished_run / POLICY
    folder = tmp_path / "theirs"
    tokenizer, model = load_both(first)
    tokenizer([PROMPT, "i"], padding=True)              # the file remembers that
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert_same_ids(folder, ODD)
    weights = load_model(folder).state_dict()
    for key, x in load_model(first).state_dict().items():
        assert torch.equal(weights[key], x), key
