"""Flags and settings: wrong usage, help, what text, model, N and --quick make of the sizes."""
import os
import subprocess
import sys

import pytest
import torch
from running import HERE, run

import train
from model import GPT
from support.files import UnusableInput
from support.huggingface import save_model
from support.inputs import Inputs, Pretrained
from support.options import make_parser
from support.settings import all_fields, choose_settings, flag, flat
from support.tokenizer import save_tokenizer, train_tokenizer

DEFAULTS = train.Settings()


@pytest.fixture(scope="module")
def odd_files(tmp_path_factory):
    """What the wrong command lines below speak of: models of 257 tokens, but one has 50."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "file").write_text("", encoding="utf-8")
    for name, tokens in (("small", 257), ("other-size", 50)):
        save_model(GPT(tokens, 12, n_embd=16, n_head=2), folder / name)
        save_tokenizer(train_tokenizer([], 257), folder / name, 12)
    return folder


@pytest.mark.parametrize("args, message", [
    (["--n", "0"], "--n 0: want at least 1"),
    (["--n", "65"], "--n 65: want at most 64, the number of samples that best-of-N is evaluated"),
    (["--lr-scale", "nan"], "--lr-scale nan: want at least 0"),
    (["--lr-scale", "inf"], "--lr-scale inf: want at least 0"),
    (["--step", "3"], "unrecognized arguments: --step 3"),
    (["--width", "33"], "--width 33: want a multiple of --heads 2"),
    (["--device", "abacus"], "--device abacus: want cpu, cuda or mps"),
    (["--device", "cpu:x"], "--device cpu:x: Invalid device string"),
    (["--out", "file"], "--out file/cache: Not a directory"),
    (["--prompt-tokens", "90"], "different prompts of 90 tokens, got 0; a shorter text has none"),
    (["--init", "nowhere"], "--init nowhere: no such folder, and none of gpt2, "),
    (["--init", "other-size"], "the model has 50 tokens, its vocabulary 257"),
    (["--init", "small", "--length", "9"], "has room for 8 tokens behind a prompt, want 9"),
    (["--init", "small", "--prompt-tokens", "12"], "has room for 0 tokens behind a prompt, want 1"),
    (["--init", "small", "--width", "16"], "--width: it is given by --data or --init"),
    (["--init", "small", "--out", "."], "--init small: this run may overwrite it"),
    (["--data", " "], "--data is empty"),
    (["--sample", "i"], "--sample: out has no finished run with --n 4 --seed 0 (policies: "
     "none); train.py without it makes one")])
def test_wrong_usage_is_status_2_and_one_line(args, message, odd_files):
    status, printed, error = run("--quick", *args, cwd=odd_files)
    assert (status, printed) == (2, "")
    assert error.startswith("train.py: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_help_fits_100_columns_and_needs_no_matplotlib():
    program = ("import sys; sys.modules['matplotlib'] = None; sys.argv = ['train.py', '--help']; "
               "import runpy; runpy.run_path('train.py', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE, text=True, check=True,
                          capture_output=True, env=os.environ | {"COLUMNS": "100"})
    lines = done.stdout.splitlines()
    assert max(len(line) for line in lines) <= 100
    assert len([line for line in lines if line.startswith("  --")]) == 9 + len(all_fields(DEFAULTS))

# ----------------------------------------------------------------------------------------- settings

def choose(n=4, reviews=None, pretrained=None, flags=()):
    """The settings for flags and inputs."""
    args = make_parser("", DEFAULTS).parse_args([str(flag) for flag in flags])
    assert args.out == ("out-quick" if args.quick else "out")
    inputs = Inputs(torch.device("cpu"), reviews, None, pretrained)
    return choose_settings(DEFAULTS, args, n, inputs)


@pytest.mark.parametrize("field", all_fields(DEFAULTS), ids=lambda field: field.name)
def test_each_setting_is_a_flag_that_takes_its_least_value_and_no_smaller_one(field):
    least = field.metadata["least"]
    found = choose(1, flags=["--heads", 1, flag(field.name), least])
    assert flat(found) == flat(DEFAULTS) | {"heads": 1, field.name: least}
    with pytest.raises(UnusableInput, match=f"{flag(field.name)} .*: want at least {least}$"):
        choose(1, flags=[flag(field.name), least - 1])


TEXTS = [("a text", 0)] * 10_000
SMALL = Pretrained(GPT(50, 12, n_layer=3, n_head=2, n_embd=16), None)


@pytest.mark.parametrize("given, wanted", [
    (dict(n=8), dict(steps=90)),
    (dict(n=9), dict(steps=270)),                       # three times the updates
    (dict(n=9, reviews=TEXTS), dict(reviews=10_000, vocab=2048, lm_steps=2000, steps=1800)),
    (dict(reviews=TEXTS[:1200]), dict(reviews=1200, vocab=512, lm_steps=400, steps=600)),
    (dict(reviews=TEXTS[:4003]), dict(vocab=1000, lm_steps=1334, length=0)),
    # a given model has its sizes, and its room
    (dict(pretrained=SMALL), dict(vocab=50, layers=3, heads=2, width=16, lm_steps=150, length=8)),
    (dict(reviews=TEXTS[:6049], pretrained=SMALL), dict(vocab=50, lm_steps=120, length=0)),
    (dict(flags=["--quick"]), dict(steps=3, reviews=600, vocab=400, width=32)),
    (dict(flags=["--quick"], reviews=TEXTS, pretrained=SMALL), dict(reviews=10_000, vocab=50)),
    # what the command line gives goes before everything
    (dict(n=9, reviews=TEXTS, flags=["--quick", "--steps", 7, "--length", 9]),
     dict(steps=7, length=9))])
def test_settings_follow_text_model_n_and_flags(given, wanted):
    found = flat(choose(**given))
    assert found == found | wanted
    assert {type(x) for x in found.values()} == {int, float}


def test_fewer_reference_samples_than_n_are_noted(capsys):
    choose(9, flags=["--m", 9])
    assert capsys.readouterr().out == ""
    choose(9, flags=["--m", 8])
    assert capsys.readouterr().out == "note: 8 reference samples are few for n = 9; raise --m\n"
