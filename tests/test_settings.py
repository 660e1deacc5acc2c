"""Flags and settings: help, wrong usage, what text, model, N and --quick make of the sizes."""
import argparse
import os
import subprocess
import sys

import pytest
import torch
from running import HERE, run
from test_tokenizer import write_vocabulary

import train
from model import GPT
from support.files import UnusableInput
from support.huggingface import save_model
from support.inputs import Inputs, Pretrained
from support.options import make_parser
from support.settings import all_fields, change, choose_settings, flag, flat

DEFAULTS = train.Settings()

# -------------------------------------------------------------------------------------- wrong usage

WRONG = [
    (["--n", "0"], "argument --n: 0: want at least 1"),
    (["--n", "65"], "--n 65: want at most 64, the number of samples that best-of-N is evaluated"),
    (["--n", "2.5"], "argument --n: invalid positive_integer value: '2.5'"),
    (["--n"], "argument --n: expected one argument"),
    (["--seed", "x"], "argument --seed: invalid int value: 'x'"),
    (["--lr-scale", "nan"], "--lr-scale nan: want at least 0"),
    (["--lm-lr", "inf"], "--lm-lr inf: want at least 0"),
    (["--nonsense"], "unrecognized arguments: --nonsense"),
    (["--step", "3"], "unrecognized arguments: --step 3"),
    (["--width", "33"], "--width 33: want a multiple of --heads 2"),
    (["--device", "abacus"], "--device abacus: want cpu, cuda or mps"),
    (["--device", "cpu:x"], "--device cpu:x: Invalid device string"),
    (["--out", "file"], "--out file: "),
    (["--out", "held"], "--out held/cache: "),
    (["--out", "/proc/nowhere"], "--out /proc/nowhere: "),
    (["--data", "nowhere"], "--data nowhere: no such folder"),
    (["--reward", "nowhere.py"], "--reward nowhere.py: No such file or directory"),
    (["--prompt-tokens", "90"], "different prompts of 90 tokens, got 0; a shorter text has none"),
    (["--init", "nowhere"], "--init nowhere: no such folder, and none of gpt2, "),
    (["--init", "other-vocabulary"], "the model has 50 tokens, its vocabulary 258"),
    (["--init", "small", "--length", "9"], "has room for 8 tokens behind a prompt, want 9"),
    (["--init", "small", "--prompt-tokens", "12"], "has room for 0 tokens behind a prompt, want 1"),
    (["--init", "small", "--vocab", "258"], "--vocab: it is given by --data or --init"),
    (["--init", "small", "--width", "16"], "--width: it is given by --data or --init"),
    (["--init", "small", "--out", "."], "--init small: this run may overwrite it"),
    (["--sample", " "], "--sample is empty"),
    (["--data", ""], "--data is empty"),
    (["--out", ""], "--out is empty"),
    (["--sample", "i"], "--sample: out holds no finished run with --n 4 --seed 0 (policies there: "
     "none); train.py without --sample makes one"),
]


@pytest.fixture(scope="module")
def odd_files(tmp_path_factory):
    """What the wrong command lines above speak of."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "file").write_text("", encoding="utf-8")
    (folder / "held").mkdir()
    (folder / "held" / "cache").write_text("", encoding="utf-8")
    for name, tokens in (("small", 258), ("other-vocabulary", 50)):
        save_model(GPT(tokens, 12, n_embd=16, n_head=2), folder / name)
        write_vocabulary(folder / name, "ab")
    return folder


@pytest.mark.parametrize("args, message", WRONG)
def test_wrong_usage_is_status_2_and_one_line(args, message, odd_files):
    status, printed, error = run("--quick", *args, cwd=odd_files)
    assert status == 2
    assert error.startswith("train.py: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert printed == ""


def test_help_explains_each_flag_within_100_columns_and_needs_no_matplotlib():
    program = ("import sys; sys.modules['matplotlib'] = None; sys.argv = ['train.py', '--help']; "
               "import runpy; runpy.run_path('train.py', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE, text=True, check=True,
                          capture_output=True, env=os.environ | {"COLUMNS": "100"})
    assert max(len(line) for line in done.stdout.splitlines()) <= 100
    found = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("  --")}
    settings = {flag(field.name) for field in all_fields(DEFAULTS)}
    assert found == settings | {"--n", "--seed", "--sample", "--out", "--device", "--quick",
                                "--data", "--reward", "--init"}
    assert all(field.metadata["help"] for field in all_fields(DEFAULTS))

# ----------------------------------------------------------------------------------------- settings

def parse(*flags, several=False):
    return make_parser("", DEFAULTS, several).parse_args([str(flag) for flag in flags])


def choose(n=4, reviews=None, pretrained=None, flags=()):
    """The settings for flags and inputs."""
    inputs = Inputs(torch.device("cpu"), reviews, None, pretrained)
    return choose_settings(DEFAULTS, parse(*flags), n, inputs)


@pytest.mark.parametrize("field", all_fields(DEFAULTS), ids=lambda field: field.name)
def test_each_setting_is_a_flag_that_takes_its_least_value_and_no_smaller_one(field):
    least = field.metadata["least"]
    found = choose(1, flags=["--heads", 1, flag(field.name), least])
    assert flat(found) == flat(change(DEFAULTS, heads=1)) | {field.name: least}
    with pytest.raises(UnusableInput, match=f"{flag(field.name)} .*: want at least {least}$"):
        choose(1, flags=[flag(field.name), least - 1])


def test_the_main_job_has_the_sizes_that_the_readme_states():
    assert flat(choose()) == {
        "reviews": 12_000, "vocab": 768, "prompt_tokens": 4, "length": 24, "layers": 2, "heads": 2,
        "width": 64, "lm_steps": 1000, "lm_batch": 64, "lm_lr": 6e-3, "epochs": 4, "prompts": 512,
        "m": 64, "held_prompts": 64, "m_eval": 512, "steps": 90, "batch": 64, "k": 8, "rank": 4,
        "lr_scale": 0.54, "k_eval": 64}


QUICK = dict(lm_steps=10, epochs=1, prompts=8, m=16, held_prompts=8, m_eval=64, steps=3, batch=4,
             k=4, k_eval=8)
DATA = dict(lm_lr=3e-3, epochs=6, m=128, steps=600, length=0)
INIT = dict(vocab=50, layers=3, heads=2, width=16, lm_lr=5e-5, prompts=256, m=64, held_prompts=32,
            steps=250)
TEXTS = [("a text", 0)] * 10_000
SMALL = Pretrained(GPT(50, 12, n_layer=3, n_head=2, n_embd=16), None)


@pytest.mark.parametrize("given, changed", [
    (dict(n=8), {}),
    (dict(n=9), dict(steps=270)),                       # above 8, three times the updates
    (dict(n=8, reviews=TEXTS), DATA | dict(reviews=10_000, vocab=2048, lm_steps=2000)),
    (dict(n=9, reviews=TEXTS[:1200]),
     DATA | dict(reviews=1200, vocab=512, lm_steps=400, steps=1800)),
    (dict(reviews=TEXTS[:4003]), DATA | dict(reviews=4003, vocab=1000, lm_steps=1334)),
    (dict(pretrained=SMALL), INIT | dict(lm_steps=150, length=8)),      # as much as has room
    (dict(reviews=TEXTS[:6049], pretrained=SMALL),
     DATA | INIT | dict(reviews=6049, lm_steps=120)),
    (dict(flags=["--quick"]), QUICK | dict(reviews=600, vocab=400, width=32)),
    (dict(flags=["--quick"], reviews=TEXTS[:900], pretrained=SMALL),
     DATA | INIT | QUICK | dict(reviews=900)),
    # what the command line gives goes before everything
    (dict(n=9, reviews=TEXTS, flags=["--quick", "--steps", 7, "--m", 5, "--length", 9]),
     DATA | QUICK | dict(reviews=10_000, vocab=400, width=32, steps=7, m=5, length=9)),
    (dict(pretrained=SMALL, flags=["--prompt-tokens", 2]),
     INIT | dict(lm_steps=150, prompt_tokens=2, length=10)),
])
def test_text_model_n_and_flags_change_these_settings_and_no_others(given, changed):
    assert flat(choose(**given)) == flat(DEFAULTS) | changed


def test_a_setting_that_does_not_exist_is_refused():
    with pytest.raises(TypeError, match="no such settings: lenght"):
        change(DEFAULTS, lenght=7)


def test_defaults_of_flags_with_one_value_and_with_several():
    one = parse()
    assert (one.n, one.seed, one.out, one.sample, one.device) == (4, 0, "out", None, "auto")
    assert parse("--quick").out == "out-quick"
    several = parse("--n", 2, 3, several=True)
    assert (several.n, several.seed, type(several)) == ([2, 3], [0], argparse.Namespace)
