"""The command line: wrong usage, help, --sample, own reviews, plain terminals."""
import os
import subprocess
import sys

import pytest
import torch
from running import HERE, read_rows, run
from test_tokenizer import write_vocabulary

import train
from model import GPT
from support.huggingface import save_model
from support import kept, options
from support.files import UnusableInput
from support.inputs import encode_prompt
from support.reviews import builtin_reviews
from support.tokenizer import train_tokenizer


def write_reviews(folder, count):
    """The built-in reviews as a folder for --data."""
    folder.mkdir()
    for name, label in (("pos", 1), ("neg", 0)):
        texts = [text for text, y in builtin_reviews(count, 3) if y == label]
        (folder / f"{name}.txt").write_text("\n".join(texts), encoding="utf-8")


def write_gpt2(folder, tokens, positions=12):
    """A small GPT-2 of so many tokens, with a vocabulary of 258."""
    model = GPT(tokens, positions, n_embd=16, n_head=2, generator=torch.Generator().manual_seed(0))
    save_model(model, folder)
    write_vocabulary(folder, "ab")
    return model


def parse(*args):
    return options.make_parser("").parse_args([str(arg) for arg in args])

# -------------------------------------------------------------------------------------- wrong usage

WRONG = [
    (["--n", "0"], "--n 0: want at least 1"),
    (["--n", "65"], "--n 65: want at most 64"),
    (["--n", "2.5"], "argument --n: invalid int value: '2.5'"),
    (["--n"], "argument --n: expected one argument"),
    (["--seed", "x"], "argument --seed: invalid int value: 'x'"),
    (["--steps", "0"], "--steps 0: want at least 1"),
    (["--m", "0"], "--m 0: want at least 1"),
    (["--nonsense"], "unrecognized arguments: --nonsense"),
    (["--stat", "3"], "unrecognized arguments: --stat 3"),
    (["--device", "abacus"], "--device abacus: "),
    (["--out", "file"], "--out file: "),
    (["--data", "nowhere"], "--data nowhere: no such folder"),
    (["--data", "few"], "--data few: "),
    (["--data", "file"], "--data file: a file; want a folder with pos.txt"),
    (["--data", "only-prompts"], "with --reward, prompts.txt is enough"),
    (["--prompt-tokens", "90"], "different prompts of 90 tokens, got 0; a shorter text has none"),
    (["--init", "small", "--length", "9"], "--length 9: the model of --init has room for 8"),
    (["--init", "nowhere"], "--init nowhere: no such folder"),
    (["--init", "other-vocabulary"], "the model has 50 tokens, its vocabulary 258"),
    (["--init", "no-room"], "no room"),
    (["--sample", " "], "--sample is empty"),
    (["--data", ""], "--data is empty"),
    (["--reward", ""], "--reward is empty"),
    (["--init", ""], "--init is empty"),
    (["--out", ""], "--out is empty"),
    (["--device", ""], "--device is empty"),
    (["--out", "/proc/nowhere"], "--out /proc/nowhere: "),
    (["--sample", "words " * 99], "--sample: want fewer than 28 tokens"),
]


@pytest.fixture(scope="module")
def odd_files(tmp_path_factory):
    """What the wrong command lines above speak of."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "file").write_text("", encoding="utf-8")
    (folder / "few").mkdir()
    (folder / "few" / "pos.txt").write_text("good\n", encoding="utf-8")
    (folder / "few" / "neg.txt").write_text("bad\n", encoding="utf-8")
    (folder / "only-prompts").mkdir()
    (folder / "only-prompts" / "prompts.txt").write_text("text\n", encoding="utf-8")
    write_gpt2(folder / "small", 258)
    write_gpt2(folder / "other-vocabulary", 50)
    write_gpt2(folder / "no-room", 258, positions=4)
    return folder


@pytest.mark.parametrize("args, message", WRONG)
def test_wrong_usage_is_status_2_and_one_line(args, message, odd_files):
    status, printed, error = run("--quick", *args, cwd=odd_files)
    assert status == 2
    assert error.startswith("train.py: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert printed == ""


@pytest.mark.parametrize("flag, smallest", [
    ("--n", 1), ("--lm-steps", 0), ("--prompt-tokens", 1), ("--length", 1), ("--steps", 1),
    ("--m", 1)])
def test_the_smallest_number_is_accepted_and_no_smaller_one(flag, smallest):
    args = parse(flag, smallest)
    options.check_arguments(args, [args.n])
    args = parse(flag, smallest - 1)
    with pytest.raises(UnusableInput, match=f"{flag} {smallest - 1}: want at least {smallest}"):
        options.check_arguments(args, [args.n])


def test_a_bug_keeps_its_traceback(copied_run, monkeypatch):
    def broken(*_):
        raise RuntimeError("a bug")
    monkeypatch.setattr(train.vbon, "reinforce", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run("--quick", "--n", 4, cwd=copied_run)


def test_ctrl_c_is_status_130(capsys):
    def stopped():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stop:
        options.run(stopped, "train.py")
    assert stop.value.code == 130
    assert "the same command continues after" in capsys.readouterr().err

# ------------------------------------------------------------------------------------------- help

WITHOUT = """
import runpy, sys
sys.modules["matplotlib"] = None                        # importing it is an error
sys.path.insert(0, sys.argv[1])
program = sys.argv[1] + "/train.py"
sys.argv = ["train.py", "--help"]
runpy.run_path(program, run_name="__main__")
"""


def test_help_needs_no_matplotlib_and_explains_each_flag_in_full_sentences():
    done = subprocess.run([sys.executable, "-c", WITHOUT, HERE], text=True, capture_output=True,
                          env=os.environ | {"COLUMNS": "10000"}, check=True)
    flags = [line.strip() for line in done.stdout.splitlines() if line.startswith("  --")]
    assert len(flags) == 14
    for line in flags:
        name, _, text = line.partition("  ")
        text = text.strip()
        assert text[0].isupper(), line
        assert text[-1] == ".", line
        assert len(text.split()) >= 5, line

# ----------------------------------------------------------------------------------------- --sample

def test_an_own_prompt_gets_three_responses_of_each_of_the_three(copied_run):
    status, printed, error = run("--quick", "--n", 2, "--sample", "i watched this", cwd=copied_run)
    assert (status, error) == (0, "")
    lines = printed.splitlines()
    # nothing is trained again: at most one line comes before the responses
    start = lines.index("i watched this ...")
    assert start <= 1
    titles = [line.strip().split("  ")[0] for line in lines[start:]]
    assert titles == 3 * ["i watched this ...", "reference", "best of 2", "vBoN"]


def test_an_own_prompt_trains_what_is_missing(tmp_path):
    status, printed, _ = run("--quick", "--n", 2, "--sample", "i watched this", cwd=tmp_path)
    assert status == 0
    assert "vBoN n=2 3/3" in printed
    assert "i watched this ...\n" in printed
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_an_own_prompt_is_normalised_as_the_texts_are():
    encoding = train_tokenizer([], 257)                 # a token for each byte
    ids = encode_prompt("  i\n watched<br />this ", encoding, 28)[0].tolist()
    assert encoding.decode(ids) == "i watched this"


def test_an_own_prompt_leaves_room_for_one_token_at_least():
    encoding = train_tokenizer([], 257)                 # a token for each byte
    assert encode_prompt("a" * 27, encoding, 28).shape == (3, 27)
    with pytest.raises(UnusableInput, match="--sample: want fewer than 28 tokens, got 28"):
        encode_prompt("a" * 28, encoding, 28)

# ------------------------------------------------------------- own reviews, GPT-2, plain terminals

def test_own_reviews_are_used(tmp_path):
    write_reviews(tmp_path / "reviews", 600)
    status, printed, error = run("--quick", "--n", 2, "--data", "reviews", cwd=tmp_path)
    assert (status, error) == (0, "")
    assert "text: 600 reviews" in printed
    assert all(row["data"] for row in read_rows(tmp_path / "out"))


def test_a_gpt2_of_a_folder_is_used(tmp_path):
    model = write_gpt2(tmp_path / "mine", 258)
    status, _, error = run("--quick", "--n", 2, "--init", "mine", "--steps", 2, cwd=tmp_path)
    assert (status, error) == (0, "")
    assert {row["length"] for row in read_rows(tmp_path / "out")} == {8}    # as much as has room
    path, = (tmp_path / "out" / "cache").glob("reference-model-*")
    trained = kept.load(path)["weights"]["wte.weight"]
    assert 0 < (trained - model.wte.weight).abs().max() < 0.01              # hardly moved


def test_the_program_runs_where_only_ascii_can_be_shown(tmp_path):
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    (tmp_path / "out").mkdir()
    done = subprocess.run([sys.executable, HERE / "train.py", "--quick", "--n", "2", "--out", "out"], cwd=tmp_path,
                          capture_output=True, env=os.environ | plain, timeout=120)
    assert done.returncode == 0, done.stderr
    assert b"theory, n = 2" in done.stdout
    assert done.stdout.isascii()
    (tmp_path / "out" / "samples.txt").read_text(encoding="utf-8")
