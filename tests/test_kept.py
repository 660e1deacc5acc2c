"""Kept stages: what each depends on, what an edit repeats, and what a stopped run leaves."""
import contextlib
import dataclasses
import functools
import importlib
import io
import shutil
import subprocess
import sys
import time

import pytest
import torch
from running import HERE, read_rows, run

import train
from experiments import methods
from model import GPT
from support import kept
from support import leave as leave_file
from support.code import code_of_function
from support.digest import digest
from support.report import no_print
from support.seeding import seeded_generator
from support.tokenizer import train_tokenizer

REWARDS = {"rewards-training", "rewards-held-out", "rewards-draws"}
SAMPLES = {"samples-training", "samples-held-out", "samples-draws"} | REWARDS
EVALUATION = {"evaluation-vbon-n2"}
POLICY = {"policy-vbon-n2"} | EVALUATION
ALL = {"reference-model"} | SAMPLES | POLICY


RUNS = {f"run-n{n}-seed{seed}" for n in (2, 3) for seed in (0, 1)}     # for --sample alone


def cached(out):
    """The stages in the cache, such as "samples-held-out-seed0-0774be4f673f"."""
    return {path.stem for path in (out / "cache").glob("*.pt")} - RUNS


def stages(names):
    """The names without seed and code, such as "samples-held-out"."""
    return {name.split("-seed")[0] for name in names}

# ------------------------------------------------------------------- what an edit of a file repeats

ROOMS = ("vbon", "model", "reward", "train", "support")


class Copy:
    """A copy of the program in a folder, with the results of a finished run."""

    def __init__(self, folder, finished_run):
        self.folder = folder
        for name in ("vbon", "model", "reward", "train"):
            shutil.copy(HERE / f"{name}.py", folder)
        shutil.copytree(HERE / "support", folder / "support",
                        ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(finished_run / "out", folder / "out")

    def edit(self, file, old, new):
        path = self.folder / file
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, (file, old)
        path.write_text(text.replace(old, new), encoding="utf-8")

    def import_program(self):
        """Import the program as it now is; returns train."""
        for name in list(sys.modules):
            if name.split(".")[0] in ROOMS:
                del sys.modules[name]
        importlib.invalidate_caches()
        return importlib.import_module("train")

    def run(self, n=2):
        """Run the program as it is imported: the stages that were made anew."""
        before = cached(self.folder / "out")
        with contextlib.redirect_stdout(io.StringIO()):
            sys.modules["train"].main(["--quick", "--n", str(n), "--out", str(self.folder / "out")])
        return stages(cached(self.folder / "out") - before)

    def rows(self):
        return read_rows(self.folder / "out")


@pytest.fixture
def program(tmp_path, finished_run, monkeypatch):
    """A copy of the program; at the end of the test, our own modules are back in their places."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)       # two edits may come in one second
    ours = {name: x for name, x in sys.modules.items() if name.split(".")[0] in ROOMS}
    yield Copy(tmp_path, finished_run)
    sys.modules.update(ours)


STATEMENTS = [
    ("vbon.py", "less = torch.searchsorted(ref_rewards, reward, right=False)",
     "less = torch.searchsorted(ref_rewards, reward, right=False) // 2", POLICY),
    ("train.py", "processes.average_gradients(trained)",
     "trained[0].grad *= 2; processes.average_gradients(trained)", POLICY),
    ("train.py", "(2 * progress - 1)", "(2 * progress - 1.1)", POLICY),
    ("support/sampling.py", "prompts.split(max(1, 1024 // k))", "prompts.split(2)",
     SAMPLES | POLICY),
    ("support/sampling.py", "size = max(1, 1024 // response.shape[1])", "size = 1",
     REWARDS | EVALUATION),
    ("train.py", 'f"evaluation of {name}"', 'f"an evaluation of {name}"', EVALUATION),
    ("reward.py", "return total / mask.sum(1).sqrt() + self.bias",
     "return 3 * total / mask.sum(1).sqrt() + self.bias", REWARDS | POLICY),
    ("reward.py", "lr=0.03", "lr=0.04", REWARDS | POLICY),
    ("model.py", "return self.ln_f(x)",
     "return 1.1 * self.ln_f(x)", ALL),
    ("support/reference_model.py", "(step + 1) / 20", "(step + 1) / 19", ALL),
    ("support/seeding.py", "[:12]", "[:11]", ALL),
    ("support/processes.py", "return rows[rank():size:world_size()]",
     "return rows[rank():size:world_size()].flip(0)", ALL),
    ("support/tokenizer.py", "while len(ranks) < vocab_size - 1:",
     "while len(ranks) < vocab_size - 2:", ALL),
]


@pytest.mark.parametrize("file, old, new, repeated", STATEMENTS)
def test_an_edit_of_a_statement_repeats_what_it_can_change(file, old, new, repeated, program):
    program.edit(file, old, new)
    program.import_program()
    assert program.run() == repeated
    # the edit was not in vain, and its results are not mixed up with the older ones
    rows = program.rows()
    assert len(rows) == 6
    assert rows[5]["code"] != rows[2]["code"]


HARMLESS = [
    ("vbon.py", "# (a) sample from the policy", "# a comment\n    # (a) sample from the policy"),
    ("vbon.py", '"""Return the baseline b of (6)', '"""The baseline'),
    ("vbon.py", "def win_rate(reward: Tensor, ref_rewards: Tensor) -> Tensor:",
     "def win_rate(reward, ref_rewards):"),
    ("model.py", "class MLP(nn.Module):", "\n\n# a comment\nclass MLP(nn.Module):"),
    ("reward.py", "model = Classifier(vocab_size)", "model = (\n        Classifier(vocab_size))"),
    ("train.py", "        optimizer.zero_grad()\n", "        optimizer.zero_grad()  # empty\n"),
    ("train.py", "    # ---- what stays", "    print()\n    # ---- what stays"),
    ("support/seeding.py", '"""Return a generator whose seed', '"""A generator whose seed'),
    ("support/options.py", "Print responses of the reference", "Responses of the reference"),
    ("support/report.py", "KLs in nats per response", "All KLs in nats"),
    ("support/report.py", "2, (11, 4.2))", "2, (11, 4.0))"),
    ("support/results.py", '"""Append rows to results.jsonl.', '"""Add rows.'),
]


def test_edits_that_change_no_number_repeat_nothing(program, finished_run):
    """All of them at once, in a copy of the program."""
    for file, old, new in HARMLESS:
        program.edit(file, old, new)
    program.import_program()
    assert program.run() == set()
    assert program.rows() == read_rows(finished_run / "out")


def test_code_that_was_not_reloaded_keeps_its_name(program):
    """In a notebook, a file may be edited after it was imported: the old code runs."""
    program.import_program()
    program.edit(*STATEMENTS[0][:3])
    assert program.run() == set()                       # what the old code makes is there
    assert program.run(n=3) == {"policy-vbon-n3", "evaluation-vbon-n3"}
    # a new process makes another policy, and does not take the old code's
    program.import_program()
    assert program.run(n=3) == {"policy-vbon-n3", "evaluation-vbon-n3"}


@pytest.mark.parametrize("file, old, new, repeated", [STATEMENTS[0], STATEMENTS[2]])
def test_reloaded_code_gets_a_new_name(file, old, new, repeated, program):
    program.import_program()
    program.edit(file, old, new)
    importlib.reload(sys.modules[file.removesuffix(".py")])
    assert program.run() == repeated


def test_an_old_class_of_a_reloaded_file_is_refused(program):
    """After a reload of model.py alone, train.py would go on with the old network."""
    program.import_program()
    importlib.reload(sys.modules["model"])
    with pytest.raises(ValueError, match="was loaded again, but .* restart Python"):
        program.run()

# -------------------------------------------------------------------------- what a setting repeats

@pytest.mark.parametrize("name, value, repeated", [
    ("k_eval", 9, EVALUATION),
    ("m_eval", 65, {"samples-held-out", "samples-draws", "rewards-held-out", "rewards-draws"}),
    ("steps", 4, POLICY),
    ("batch", 5, POLICY),
    ("k", 5, POLICY),
    ("rank", 3, POLICY),
    ("lr_scale", 0.1, POLICY),
    ("m", 17, {"samples-training", "rewards-training"} | POLICY),
    ("prompts", 9, {"samples-training", "rewards-training"} | POLICY),
    ("held_prompts", 9, SAMPLES | POLICY),
    ("epochs", 2, REWARDS | POLICY),
    ("lm_steps", 11, ALL),
    ("length", 25, ALL),
])
def test_a_setting_repeats_what_depends_on_it(name, value, repeated, copied_run, monkeypatch):
    choose = train.choose_settings
    monkeypatch.setattr(train, "choose_settings",
                        lambda *given: choose(*given).change(**{name: value}))
    monkeypatch.setattr(leave_file, "plot_run", no_print)
    before = cached(copied_run / "out")
    assert run("--quick", "--n", 2, cwd=copied_run)[0] == 0
    assert stages(cached(copied_run / "out") - before) == repeated


def test_another_n_needs_a_policy_and_nothing_else(copied_run):
    before = cached(copied_run / "out")
    assert run("--quick", "--n", 3, cwd=copied_run)[0] == 0
    made = stages(cached(copied_run / "out") - before)
    assert made == {"policy-vbon-n3", "evaluation-vbon-n3"}


def test_another_seed_repeats_everything(copied_run):
    before = cached(copied_run / "out")
    assert run("--quick", "--n", 2, "--seed", 1, cwd=copied_run)[0] == 0
    assert stages(cached(copied_run / "out") - before) == ALL


def test_a_run_does_not_depend_on_what_ran_before(copied_run, tmp_path):
    assert run("--quick", "--n", 3, cwd=copied_run)[0] == 0
    assert run("--quick", "--n", 3, "--out", "alone", cwd=tmp_path)[0] == 0
    assert read_rows(copied_run / "out")[3:] == read_rows(tmp_path / "alone")

# ----------------------------------------------------------------------------- files of the cache

@pytest.mark.parametrize("left", [0, 10, -100])
def test_a_damaged_file_of_the_cache_is_made_again(left, copied_run, finished_run):
    victim = next((copied_run / "out" / "cache").glob("samples-held-out-*"))
    whole = victim.read_bytes()
    victim.write_bytes(whole[:left])
    status, printed, _ = run("--quick", "--n", 2, cwd=copied_run)
    assert status == 0
    assert "samples (held-out) 1/1" in printed
    assert "samples (training) 1/1" not in printed
    if left != 0:
        assert victim.name in printed                   # it says so
    assert read_rows(copied_run / "out") == read_rows(finished_run / "out")


def test_nothing_but_finished_files_is_left(finished_run):
    names = {path.name for path in (finished_run / "out").iterdir()}
    assert names == {".gitignore", "cache", "held-out-prompts-seed0.jsonl", "history-n2-seed0.jsonl",
                     "policy-n2-seed0", "reference-seed0", "responses-policy-n2-seed0.jsonl",
                     "responses-reference-seed0.jsonl", "results.jsonl", "samples.txt", "vbon.png"}
    kept = {path.name for path in (finished_run / "out" / "cache").iterdir()}
    assert stages(kept - {"results.lock", "run-n2-seed0.pt"}) == ALL


def test_a_killed_run_ends_with_the_same_numbers(tmp_path):
    args = ["--quick", "--n", "2", "--steps", "30"]
    assert run(*args, "--out", "whole", cwd=tmp_path)[0] == 0
    killed = subprocess.Popen([sys.executable, HERE / "train.py", *args, "--out", "killed"],
                              cwd=tmp_path, stdout=subprocess.DEVNULL)
    while killed.poll() is None and not list(tmp_path.glob("killed/cache/*.checkpoint")):
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() != 0                           # it had not finished
    status, printed, _ = run(*args, "--out", "killed", cwd=tmp_path)
    assert status == 0
    assert "continuing after step" in printed
    assert read_rows(tmp_path / "killed") == read_rows(tmp_path / "whole")


def test_a_run_that_is_stopped_again_and_again_ends_with_the_same_numbers(tmp_path, monkeypatch):
    """Before and after each file that it writes into its cache."""
    args = ["--quick", "--n", "2", "--steps", "5", "--reward",
            str(HERE / "experiments" / "rewards" / "length.py")]
    assert run(*args, "--out", "whole", cwd=tmp_path)[0] == 0
    save = kept.save
    stops = 0
    while True:
        saved = []

        def stopping(*given):
            # the first run stops before its first file, the next after it, and so on
            if len(saved) == 1 - stops % 2:
                raise KeyboardInterrupt
            saved.append(given)
            save(*given)

        monkeypatch.setattr(kept, "save", stopping)
        status = run(*args, "--out", "stopped", cwd=tmp_path)[0]
        if status == 0:
            break
        assert status == 130
        stops += 1
        monkeypatch.setattr(kept, "save", save)
        if stops > 12:
            assert run(*args, "--out", "stopped", cwd=tmp_path)[0] == 0
            break
    assert stops > 10
    assert read_rows(tmp_path / "stopped") == read_rows(tmp_path / "whole")

# -------------------------------------------------------------------------------- names of contents

@dataclasses.dataclass(frozen=True)
class Sizes:
    """Two numbers."""
    a: int = 1
    b: int = 2


def one(x):
    return helper(x) + CONSTANT


def other(x):
    return helper(x) + CONSTANT + 1


def helper(x):
    """Used by the two functions above."""
    return 2 * x


CONSTANT = 3


def test_a_digest_names_the_content():
    assert len(digest(1, "a")) == 12
    contents = [
        None, 0, 1, 1.0, True, "1", b"1", [1], [1, 2], [[1], 2], {"a": 1}, {"a": 2}, {"b": 1},
        torch.zeros(2), torch.zeros(3), torch.zeros(2, 1), torch.zeros(2).double(),
        torch.tensor([0.0, 1.0]), Sizes(), Sizes(b=3), one, other, functools.partial(one, 3),
        functools.partial(one, x=3), GPT(4, 4), GPT(4, 4, n_head=2), GPT(4, 4, activation="relu"),
        train_tokenizer(["ab"], 300), train_tokenizer(["bc"], 300)]
    names = [digest(content) for content in contents]
    assert names == [digest(content) for content in contents]
    assert len(set(names)) == len(names)
    assert digest(1, 2) != digest(12)


def test_what_has_no_content_has_no_name():
    with pytest.raises(TypeError, match="the content of a object is unknown"):
        digest([1, object()])


def test_a_model_is_named_by_its_weights_and_its_config():
    g = torch.Generator()
    models = [GPT(4, 4, generator=g.manual_seed(0)) for _ in range(2)]
    assert digest(models[0]) == digest(models[1])
    models[1].ln_f.bias.data[0] += 1
    assert digest(models[0]) != digest(models[1])


def test_the_code_of_a_function_is_all_that_it_uses_of_its_file():
    code = code_of_function(one)
    for name in ("'one'", "'helper'", "'CONSTANT'"):
        assert name in code
    assert "'other'" not in code
    assert "Used by" not in code                        # no docstrings


CHANGED = """
import math
from math import sin as wave, cos
from pathlib import Path

A, B = 1, 2
C: int = 3
D = {}
D["a"] = 4
if A:
    E = 5
LEFT_OUT = 6


def stage(x, y: float = 1.0) -> float:
    total = A + C + D["a"] + E + wave(x)
    return inner(total)


def inner(x):
    return [y for y in range(x)]


def other(x):
    return LEFT_OUT
"""


def code_of(source, folder):
    """The code of `stage` in a file with this source."""
    path = folder / "changed.py"
    path.write_text(source, encoding="utf-8")
    sys.modules.pop("changed", None)
    importlib.invalidate_caches()
    return code_of_function(importlib.import_module("changed").stage)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    sys.modules.pop("changed", None)


@pytest.mark.parametrize("old, new", [
    ("A, B = 1, 2", "A, B = 9, 2"), ("C: int = 3", "C: int = 9"), ('D["a"] = 4', 'D["a"] = 9'),
    ("E = 5", "E = 9"), ("sin as wave", "tan as wave"), ("y: float = 1.0", "y: float = 9.0"),
    ("range(x)", "range(9)"), ("def inner(x):", "@str\ndef inner(x):")])
def test_a_change_of_what_a_stage_uses_changes_its_code(old, new, folder):
    assert CHANGED.count(old) == 1
    assert code_of(CHANGED, folder) != code_of(CHANGED.replace(old, new), folder)


@pytest.mark.parametrize("old, new", [
    ("LEFT_OUT = 6", "LEFT_OUT = 9"), (", cos\n", ", cos, exp\n"), ("import math\n", ""),
    ("y: float = 1.0", "y: int = 1.0"), ("return LEFT_OUT", "return 9"),
    ("    return inner(total)", "    # a comment\n    return inner(\n        total)")])
def test_a_change_of_anything_else_does_not(old, new, folder):
    assert CHANGED.count(old) == 1
    assert code_of(CHANGED, folder) == code_of(CHANGED.replace(old, new), folder)


def test_names_imported_from_train_are_followed_there():
    """methods.py uses train.watch: its code is a part of each of its methods."""
    assert "'win_rate'" in code_of_function(methods.target_gradient)


def test_decorators_are_seen_through(folder):
    with_decorator = CHANGED.replace("def stage", "import torch\n@torch.no_grad()\ndef stage")
    assert "no_grad" in code_of(with_decorator, folder)


def test_a_generator_has_the_seed_of_its_names():
    """These seeds must never change: results of all versions depend on them."""
    assert seeded_generator("cpu", "batch", 0, 1).initial_seed() == 0xc718f647209e
    assert seeded_generator("cpu", "batch", 1, 0).initial_seed() != 0xc718f647209e
    assert seeded_generator("cpu", "a", "b").initial_seed() != seeded_generator(
        "cpu", "ab").initial_seed()


def interrupted(checkpoint, x):
    """A stage that is stopped half way, the first time."""
    done = kept.load(checkpoint)
    if done is None:
        kept.save(checkpoint, {"sum": x})
        raise KeyboardInterrupt
    return {"sum": done["sum"] + x}


def test_a_resumable_stage_continues_from_its_checkpoint(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        kept.keep(tmp_path, "s", interrupted, 5, resumable=True)
    assert len(list(tmp_path.glob("s-*.checkpoint"))) == 1
    assert kept.keep(tmp_path, "s", interrupted, 5, resumable=True) == {"sum": 10}
    assert [path.suffix for path in tmp_path.iterdir()] == [".pt"]
    # and once more, from the file
    assert kept.keep(tmp_path, "s", interrupted, 5, resumable=True) == {"sum": 10}


def test_a_nested_function_cannot_be_a_stage(tmp_path):
    with pytest.raises(TypeError, match="at the top level of a file"):
        kept.keep(tmp_path, "s", lambda: {})
