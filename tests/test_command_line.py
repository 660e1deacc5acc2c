"""The command line: wrong usage, help, imports, results.jsonl, and plain terminals."""
import ast
import os
import subprocess
import sys

import pytest
import torch
from running import HERE, read_rows, run
from test_reward import write_vocabulary

import train
import vbon
from model import GPT
from reward import builtin_reviews

FILES = ("vbon", "model", "reward", "train")


def write_reviews(folder, count):
    """The built-in reviews as a folder for --data."""
    folder.mkdir()
    for name, label in (("pos", 1), ("neg", 0)):
        texts = [text for text, y in builtin_reviews(count, 3) if y == label]
        (folder / f"{name}.txt").write_text("\n".join(texts), encoding="utf-8")


def write_gpt2(folder, tokens, positions=12):
    """A small GPT-2 of so many tokens, with a vocabulary of 258."""
    model = GPT(tokens, positions, n_embd=16, n_head=2, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    write_vocabulary(folder, "ab")
    return model

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
    (["--init", "nowhere"], "nowhere/config.json: "),
    (["--init", "other-vocabulary"], "the model has 50 tokens, its vocabulary 258"),
    (["--init", "no-room"], "no room"),
    (["--sample", " "], "--sample: want some words"),
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


def test_a_bug_keeps_its_traceback(copied_run, monkeypatch):
    def broken(*_):
        raise RuntimeError("a bug")
    monkeypatch.setattr(vbon, "update", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run("--quick", "--n", 4, cwd=copied_run)


def test_ctrl_c_is_status_130(capsys):
    def stopped():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stop:
        train.run(stopped, "train.py")
    assert stop.value.code == 130
    assert "the same command goes on after" in capsys.readouterr().err

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


# ------------------------------------------------------------------------------------------ imports

ALLOWED = {
    "vbon": {"torch"},
    "model": {"torch"},
    "reward": {"torch", "tiktoken", "tiktoken_ext", "model"},
    "train": {"torch", "tiktoken", "matplotlib", "vbon", "model", "reward"},
}


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_what_it_may(file):
    found = set()
    for node in ast.walk(ast.parse((HERE / f"{file}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add(node.module.split(".")[0])
    assert found - set(sys.stdlib_module_names) <= ALLOWED[file]


def test_equations_are_numbered_from_1_to_7():
    """A citation such as (7) in vbon.py means one of those at its top."""
    top = vbon.__doc__
    for number in range(1, 8):
        assert f"    ({number})  " in top
    assert "(8)" not in (HERE / "vbon.py").read_text(encoding="utf-8")

# ----------------------------------------------------------------------------------------- --sample

def test_own_words_are_answered_three_times_by_each_of_the_three(copied_run):
    status, printed, error = run("--quick", "--n", 2, "--sample", "i watched this", cwd=copied_run)
    assert (status, error) == (0, "")
    lines = printed.splitlines()
    # nothing is trained again: at most one line comes before the answers
    start = lines.index("i watched this ...")
    assert start <= 1
    titles = [line.strip().split("  ")[0] for line in lines[start:]]
    assert titles == 3 * ["i watched this ...", "reference", "best of 2", "vBoN"]


def test_own_words_train_what_is_not_there(tmp_path):
    status, printed, _ = run("--quick", "--n", 2, "--sample", "i watched this", cwd=tmp_path)
    assert status == 0
    assert "vBoN n=2 3/3" in printed
    assert "i watched this ...\n" in printed
    assert not (tmp_path / "out" / "results.jsonl").exists()

# ----------------------------------------------------------------------------------- results.jsonl

def test_the_same_command_replaces_its_rows(copied_run, finished_run):
    assert run("--quick", "--n", 2, cwd=copied_run)[0] == 0
    assert read_rows(copied_run / "out") == read_rows(finished_run / "out")


@pytest.mark.parametrize("args", [["--n", 3], ["--m", 20], ["--seed", 1], ["--steps", 4]])
def test_another_setting_keeps_older_rows(args, copied_run):
    before = read_rows(copied_run / "out")
    assert run("--quick", "--n", 2, *args, cwd=copied_run)[0] == 0
    after = read_rows(copied_run / "out")
    assert after[:3] == before
    assert [row["method"] for row in after[3:]] == ["ref", "bon", "vbon"]


def test_each_row_has_all_keys_and_what_made_it(finished_run):
    for row in read_rows(finished_run / "out"):
        assert set(train.KEYS) - {"seconds"} <= row.keys()
        assert row["m"] == 16
        assert len(row["code"]) == 12


DAMAGED = [b"not json", b"{}", b"[1]", b"", b"\xff\xfe", b'{"method": "ref"']


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_is_refused_by_its_number_and_stays(line, copied_run):
    path = copied_run / "out" / "results.jsonl"
    content = path.read_bytes() + line + b"\n"
    path.write_bytes(content)
    status, printed, error = run("--quick", "--n", 2, cwd=copied_run)
    assert status == 2
    assert "results.jsonl, line 4: not a result" in error
    assert error.count("\n") == 1
    assert printed == ""
    assert path.read_bytes() == content

# ------------------------------------------------------------- own reviews, GPT-2, plain terminals

def test_settings_follow_the_amount_of_own_reviews():
    args = train.parse_arguments(["--data", "reviews", "--m", "7"])
    settings = train.choose_settings(args, 4, [("text", 1)] * 3000, None)
    assert (settings.reviews, settings.vocab, settings.lm_steps) == (3000, 750, 1000)
    assert (settings.steps, settings.m) == (600, 7)


def test_above_8_training_takes_three_times_the_steps():
    args = train.parse_arguments([])
    assert train.choose_settings(args, 8, None, None).steps == 90
    assert train.choose_settings(args, 9, None, None).steps == 270


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
    trained = train.load(path)["weights"]["wte.weight"]
    assert 0 < (trained - model.wte.weight).abs().max() < 0.01              # hardly moved


def test_the_program_runs_where_only_ascii_can_be_shown(tmp_path):
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    (tmp_path / "out").mkdir()
    done = subprocess.run([sys.executable, HERE / "train.py", "--quick", "--n", "2"], cwd=tmp_path,
                          capture_output=True, env=os.environ | plain, timeout=120)
    assert done.returncode == 0, done.stderr
    assert b"theory, n = 2" in done.stdout
    assert done.stdout.isascii()
    (tmp_path / "out" / "samples.txt").read_text(encoding="utf-8")
