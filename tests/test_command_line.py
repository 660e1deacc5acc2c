"""The command line: wrong usage, help, imports, results.jsonl, and plain terminals."""
import ast
import contextlib
import dataclasses
import io
import math
import os
import subprocess
import sys
import time

import pytest
import torch
from running import HERE, read_rows, run
from test_reward import write_vocabulary

import train
import vbon
from model import GPT, UnusableInput
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
    (["--data", "file"], "--data file: a file; give its folder"),
    (["--data", "only-prompts"], "with --reward, prompts.txt will do"),
    (["--prompt-tokens", "90"], "beginnings of 90 tokens, got 0; a shorter text has none"),
    (["--init", "small", "--length", "9"], "--length 9: the model of --init has room for 8"),
    (["--init", "nowhere"], "--init nowhere: no such folder"),
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
    args = train.parse_arguments([flag, str(smallest)])
    train.check_arguments(args, args.n)
    args = train.parse_arguments([flag, str(smallest - 1)])
    with pytest.raises(UnusableInput, match=f"{flag} {smallest - 1}: want at least {smallest}"):
        train.check_arguments(args, args.n)


def test_n_may_be_as_large_as_the_draws_of_the_evaluation():
    args = train.parse_arguments(["--quick"])
    settings = train.choose_settings(args, 64, None, None)
    train.check_settings(settings, args, 64)
    with pytest.raises(UnusableInput, match="--n 65"):
        train.check_settings(settings, args, 65)


def test_a_question_leaves_room_for_one_token_at_least():
    args = train.parse_arguments(["--quick"])
    settings = train.choose_settings(args, 2, None, None)
    text = train.make_text(None, None, settings, 0)
    longest = text.encoding.decode(text.encoding.encode_ordinary("film " * 99)[:27])
    assert train.encode_question(longest, text, settings, None).shape == (3, 27)
    with pytest.raises(UnusableInput, match="fewer than 28 tokens, got 28"):
        train.encode_question(longest + " film", text, settings, None)


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

# --------------------------------------------------------------------------------- what is printed

TABLE = '''
               reward     win rate     KL to ref     KL to BoN positive samples
reference      -0.123 0.500 ±0.001  0.000 ±0.000  1.600 ±0.020     0.25       1
best of 4        12.3 0.800 ±0.002  0.600 ±0.010  0.000 ±0.000     0.50       4
vBoN             11.1 0.790 ±0.003  0.610 ±0.011  0.050 ±0.006     0.75       1
theory, n = 4         0.733         0.464         0.000

In 50% of all pairs of reference responses, both have the same reward.
'''


def test_the_table_is_what_a_person_expects(capsys):
    metrics = ("reward", "win_rate", "win_rate_se", "kl_ref", "kl_ref_se", "kl_bon", "kl_bon_se",
               "positive", "samples_per_answer")
    values = {"ref": (-0.1234, 0.5, 0.001, 0.0, 0.0, 1.6, 0.02, 0.25, 1),
              "bon": (12.345, 0.8, 0.002, 0.6, 0.01, 0.0, 0.0, 0.5, 4),
              "vbon": (11.12, 0.79, 0.003, 0.61, 0.011, 0.05, 0.006, 0.75, 1)}
    rows = [{"method": method, "n": 4} | dict(zip(metrics, row)) for method, row in values.items()]
    # 3 right answers of 10, and 4 of 10: pairs that tie are (3·2 + 7·6) / 90 and (4·3 + 6·5) / 90
    held = torch.tensor([[1.0] * 3 + [0.0] * 7, [1.0] * 4 + [0.0] * 6])
    ties = (48 / 90 + 42 / 90) / 2
    assert train.share_of_ties(held) == pytest.approx(ties)
    # best of 4 is right with the probability 1 - .7⁴, 1 - .6⁴
    kls = []
    wins = []
    for p in (0.3, 0.4):
        right = 1 - (1 - p) ** 4
        kls.append(right * math.log(right / p) + (1 - right) * math.log((1 - right) / (1 - p)))
        wins.append(right * (1 - p / 2) + (1 - right) * (1 - p) / 2)
    assert (sum(wins) / 2, sum(kls) / 2) == pytest.approx((0.733, 0.464), abs=5e-4)
    train.print_table(rows, held)
    assert capsys.readouterr().out.startswith(TABLE)


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self):
        return True


def progress(file):
    with contextlib.redirect_stdout(file):
        for done in range(1, 91):
            train.show_progress("vBoN n=4", done, 90, time.time(), {"win_rate": 0.5})
    return file.getvalue()


def test_progress_is_one_line_in_a_terminal_and_four_in_a_file():
    lines = progress(io.StringIO()).splitlines()
    assert [line.split()[2] for line in lines] == ["23/90", "45/90", "68/90", "90/90"]
    assert lines[0].startswith("  vBoN n=4 23/90  win_rate 0.50  0 of 0 s")
    changes = progress(Terminal())
    assert changes.count("\n") == 1
    assert changes.count("\r") == 89
    assert {len(line) for line in changes.replace("\n", "\r").split("\r")} == {0, 79}


def test_the_time_that_is_left_is_told(capsys):
    train.show_progress("drawing", 1, 4, time.time() - 10)
    assert capsys.readouterr().out == "  drawing 1/4  10 of 40 s\n"


def test_the_main_job_has_the_sizes_that_the_readme_tells():
    assert dataclasses.asdict(train.Settings()) == {
        "reviews": 12_000, "vocab": 768, "prompt_tokens": 4, "length": 24, "layers": 2, "heads": 2,
        "width": 64, "lm_steps": 1000, "lm_batch": 64, "lm_lr": 6e-3, "epochs": 4, "prompts": 512,
        "m": 64, "held_prompts": 64, "m_eval": 512, "steps": 90, "batch": 64, "k": 8, "rank": 4,
        "lr": 5e-3, "k_eval": 64}
    by_default = train.choose_settings(train.parse_arguments([]), 4, None, None)
    assert by_default == train.Settings()


def test_settings_follow_text_model_n_and_flags():
    data = [("a text", 0)] * 10_000
    settings = train.choose_settings(train.parse_arguments([]), 8, data, None)
    assert settings == dataclasses.replace(
        train.Settings(), reviews=10_000, vocab=2048, lm_steps=2000, lm_lr=3e-3, epochs=6, m=128,
        steps=600, lr=3e-3)
    settings = train.choose_settings(train.parse_arguments([]), 9, data[:1200], None)
    assert (settings.vocab, settings.lm_steps, settings.steps) == (512, 400, 1800)
    settings = train.choose_settings(train.parse_arguments([]), 9, data[:4003], None)
    assert (settings.vocab, settings.lm_steps) == (1000, 1334)
    assert type(settings.vocab) is type(settings.lm_steps) is int
    # a given model says how large it is, and what room it has
    given = train.Given(GPT(50, 12, n_layer=3, n_head=2, n_embd=16), None)
    settings = train.choose_settings(train.parse_arguments([]), 4, data[:6049], given)
    assert settings == dataclasses.replace(
        train.Settings(), reviews=6049, vocab=50, layers=3, heads=2, width=16, lm_steps=120,
        lm_lr=5e-5, epochs=6, prompts=256, held_prompts=32, steps=250, lr=3e-3, length=8)
    # GPT-2's logits are so many that an update takes its prompts three at a time
    large = GPT(50257, 12, n_layer=1, n_head=1, n_embd=1)
    assert train.prompts_at_a_time(large, train.Settings()) == 3
    assert train.prompts_at_a_time(large, train.Settings(k=1000)) == 1
    # all of it tiny
    settings = train.choose_settings(train.parse_arguments(["--quick"]), 4, None, None)
    assert settings == dataclasses.replace(
        train.Settings(), reviews=600, vocab=400, width=32, lm_steps=10, epochs=1, prompts=8, m=16,
        held_prompts=8, m_eval=64, steps=3, batch=4, k=4, k_eval=8)
    # what the command line says goes before everything
    args = train.parse_arguments(["--steps", "7", "--m", "5", "--lm-steps", "3", "--length", "9",
                                  "--prompt-tokens", "2", "--quick"])
    settings = train.choose_settings(args, 9, data, None)
    assert (settings.steps, settings.m, settings.lm_steps, settings.length,
            settings.prompt_tokens) == (7, 5, 3, 9, 2)

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


def test_a_row_takes_the_place_of_one_with_the_same_settings_in_any_order(tmp_path):
    row = {name: 1 for name in train.KEYS}
    train.add_results(tmp_path, [row, row | {"n": 2}])
    backwards = dict(reversed(row.items())) | {"reward": 7}
    train.add_results(tmp_path, [backwards])
    rows = [(r["n"], r["reward"]) for r in train.read_results(tmp_path)]
    assert rows == [(1, 7), (2, 1)]


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
