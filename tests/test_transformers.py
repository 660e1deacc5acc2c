"""What a run leaves, in the transformers library: the same model, the same tokenizer."""
import random

import pytest
import torch
from running import run

from model import GPT
from support.tokenizer import pretrained_encoding

transformers = pytest.importorskip("transformers", reason="needs the transformers library")

ODD = ["", " ", "a film", "naïve café", "日本語の映画", "🎬🍿", "tabs\t\n\n  and\r\n",
       "'s don't 12_3__ !?", "\x00\u2028é", "x" * 50, "  two  spaces ", "a\u00a0b", "ǅ ʰ ² ½ Ⅷ",
       "मराठी ไทย", "e\u0301", "_", "'S 'T", "1٢3", "\u200d\u200b"]
LETTERS = [chr(i) for i in [*range(32, 127), 9, 10, 13, 0xa0, 0xe9, 0x2019, 0x20ac, 0x4e2d, 0x1f600,
                            0x661, 0x300, 0x2028]]


def odd_strings(count):
    rng = random.Random(0)
    return ODD + ["".join(rng.choices(LETTERS, k=rng.randint(1, 40))) for _ in range(count)]


@pytest.mark.parametrize("name", ["policy-n2-seed0", "reference-seed0"])
def test_transformers_loads_what_a_run_leaves(name, finished_run):
    folder = finished_run / "out" / name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    encoding = pretrained_encoding(folder)
    ours = GPT.from_pretrained(folder)
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
    assert tokenizer.eos_token_id == encoding.eot_token


def test_what_transformers_saves_is_a_model_to_start_from(finished_run, tmp_path):
    first = finished_run / "out" / "policy-n2-seed0"
    folder = tmp_path / "theirs"
    transformers.AutoModelForCausalLM.from_pretrained(first).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(first).save_pretrained(folder)
    weights = GPT.from_pretrained(folder).state_dict()
    for key, x in GPT.from_pretrained(first).state_dict().items():
        assert torch.equal(weights[key], x), key
    args = ("--quick", "--n", 2, "--init", "theirs", "--lm-steps", 0)
    status, _, error = run(*args, cwd=tmp_path)
    assert (status, error) == (0, "")
