"""Kept stages: what an edit or a setting repeats, edited files, damaged files, stopped runs."""
import dataclasses
import os
import shutil
import subprocess
import sys

import pytest
import torch
from running import HERE, read_rows, run

import train
from model import GPT
from support import inputs, kept
from support.kept import digest
from support.tokenizer import train_tokenizer

REFERENCE = {"reference-model"}
REWARDS = {"rewards-training", "rewards-held-out", "rewards-draws"}
SAMPLES = {"samples-training", "samples-held-out", "samples-draws"}
EVALUATION = {"evaluation-vbon-n2"}
POLICY = {"policy-vbon-n2"} | EVALUATION
ALL = REFERENCE | SAMPLES | REWARDS | POLICY


def stages(out):
    """The stages in the cache with the hashes of what they depend on; the files of --sample are
    no stages."""
    return {path.stem for path in (out / "cache").glob("*.pt") if not path.stem.startswith("run-")}


def repeated(folder, *flags):
    """Run again with these flags: the names of the stages that were made anew."""
    before = stages(folder / "out")
    assert run("--quick", "--n", 2, *flags, cwd=folder)[0] == 0
    return {name.split("-seed")[0] for name in stages(folder / "out") - before}

# -------------------------------------------------------- what an edit and a setting make run again

EDITS = [
    (["model"], ALL),
    (["support.sampling"], ALL),
    (["support.reference_model"], REFERENCE),           # it ends with the same weights
    (["reward"], REWARDS | POLICY),
    (["support.own_reward"], REWARDS | POLICY),
    (["support.tokenizer"], REWARDS | POLICY),
    (["vbon"], POLICY),
    (["train"], POLICY),
]
OTHERS = sorted(kept.SOURCES.keys() - {name for names, _ in EDITS for name in names})


@pytest.mark.parametrize("names, wanted", [*EDITS, (OTHERS, set())])
def test_an_edit_of_a_module_repeats_the_stages_that_name_it(names, wanted, copied_run, monkeypatch):
    for name in names:
        monkeypatch.setitem(kept.SOURCES, name, kept.SOURCES[name] + "\nEDITED = True\n")
    monkeypatch.setattr(inputs, "check_sources", lambda: None)
    kept.syntax.cache_clear()
    assert repeated(copied_run) == wanted
    kept.syntax.cache_clear()
    # results of the new code stand beside those of the old
    rows = read_rows(copied_run / "out")
    assert len(rows) == 6
    assert rows[5]["code"] != rows[2]["code"]


def test_comments_and_layout_do_not_count(monkeypatch):
    before = kept.syntax("vbon")
    monkeypatch.setitem(kept.SOURCES, "vbon", "# a comment\n\n" + kept.SOURCES["vbon"])
    kept.syntax.cache_clear()
    assert kept.syntax("vbon") == before


@pytest.mark.parametrize("flags, wanted", [
    (["--k-eval", 9], EVALUATION),
    (["--steps", 4], POLICY),
    (["--m", 17], {"samples-training", "rewards-training"} | POLICY),
    (["--epochs", 2], REWARDS | POLICY),
    (["--lm-steps", 11], ALL),
    (["--seed", 1], ALL),
    (["--n", 3], {"policy-vbon-n3", "evaluation-vbon-n3"}),
    ([], set()),
])
def test_a_setting_repeats_what_depends_on_it(flags, wanted, copied_run):
    assert repeated(copied_run, *flags) == wanted


STORES = {"support.report", "support.kept", "support.files", "support.journal"}     # no numbers


@pytest.mark.parametrize("flags", [[], ["--reward", HERE / "experiments/rewards/length.py"]])
def test_a_stage_names_all_modules_whose_code_it_runs(flags, tmp_path, monkeypatch):
    """Each function of ours that is called inside a stage is of a module that the stage names."""
    forgotten = set()
    watched = []

    def keep(cache, name, stage, *args, code, **other):
        called = set()

        def note(frame, event, argument):
            called.add(frame.f_code.co_filename)

        def profiled(*given):
            sys.setprofile(note)
            try:
                return stage(*given)
            finally:
                sys.setprofile(None)

        result = kept.keep(cache, name, profiled, *args, code=code, **other)
        for module in kept.SOURCES:
            path = str(HERE / (module.replace(".", "/") + ".py"))
            if path in called and module not in {*code, *STORES}:
                forgotten.add((stage.__name__, module))
        watched.append(stage.__name__)
        return result

    monkeypatch.setattr(train, "keep", keep)
    assert run("--quick", "--n", 2, *flags, cwd=tmp_path)[0] == 0
    assert set(watched) == {"train_reference", "sample_responses", "compute_rewards", "fine_tune",
                            "evaluate"}
    assert forgotten == set()

# ------------------------------------------------------------------------------------ edited files

SAYS = """
import importlib, os, pathlib, sys
sys.path.insert(0, "")
import train, vbon

def write(name, old, new):
    # an editor's save: with a later time, and another size
    path = pathlib.Path(name)
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    times.append(times[-1] + 10)
    os.utime(path, (times[-1], times[-1]))

def edit():
    write("vbon.py", "(less + 1)", "(less + 1.5)")

def restore():
    write("vbon.py", "(less + 1.5)", "(less + 1)")

def says():
    # a run that is not refused for an edit is refused for what comes next
    try:
        train.main(["--data", "nowhere"])
    except ValueError as error:
        print(error)

times = [os.stat("vbon.py").st_mtime]
"""
PYTHON = """
says()                  # 1
edit()
says()                  # 2: refused, the file is edited
restore()
says()                  # 3
edit()
importlib.reload(vbon)
restore()
says()                  # 4: refused, the edited code is in memory
importlib.reload(vbon)
says()                  # 5
"""
IPYTHON = """
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.push({"says": says})
shell.run_cell("%run train.py --data nowhere")  # 1
write("train.py", "* (2 * progress", "* (3 * progress")
shell.run_cell("%run train.py --data nowhere")  # 2: refused, the file is edited
write("train.py", "* (3 * progress", "* (2 * progress")
shell.run_cell("%run train.py --data nowhere")  # 3
shell.run_cell("%load_ext autoreload")
shell.run_cell("%autoreload 2")
edit()
shell.run_cell("says()")                        # 4: refused, the file is edited
shell.run_cell("%autoreload 0")
restore()
shell.run_cell("says()")                        # 5: refused, the edited code is in memory
"""
NOWHERE = "--data nowhere: no such folder"
REFUSED = "vbon.py was edited after its import: restart Python"


@pytest.mark.parametrize("program, wanted", [
    (PYTHON, [NOWHERE, REFUSED, NOWHERE, REFUSED, NOWHERE]),
    (IPYTHON, [NOWHERE, REFUSED.replace("vbon", "train"), NOWHERE, REFUSED, REFUSED])],
    ids=["python", "ipython"])
def test_an_edited_file_is_refused_until_the_edit_is_taken_back(program, wanted, tmp_path):
    if program == IPYTHON:
        pytest.importorskip("IPython", reason="needs IPython")
    for name in ("vbon", "model", "reward", "train"):
        shutil.copy(HERE / f"{name}.py", tmp_path)
    shutil.copytree(HERE / "support", tmp_path / "support")
    variables = {"PYTHONDONTWRITEBYTECODE": "1", "IPYTHONDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", SAYS + program], cwd=tmp_path, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120,
                          env=os.environ | variables)
    lines = [line.removeprefix("train.py: error: ") for line in done.stdout.splitlines()]
    found = [line for line in lines if line.startswith("--data nowhere") or "edited" in line]
    assert found == wanted, done.stdout

# ------------------------------------------------------------------- files of the cache, stopped runs

@pytest.mark.parametrize("left", [0, 10, -100])
def test_a_damaged_file_of_the_cache_is_made_again(left, copied_run, finished_run):
    victim = next((copied_run / "out" / "cache").glob("samples-held-out-*"))
    victim.write_bytes(victim.read_bytes()[:left])
    status, printed, _ = run("--quick", "--n", 2, cwd=copied_run)
    assert status == 0
    assert "samples (held-out) 1/1" in printed
    assert "samples (training) 1/1" not in printed
    assert f"damaged, made again: {victim.relative_to(copied_run)}" in printed
    assert read_rows(copied_run / "out") == read_rows(finished_run / "out")


def test_a_run_that_is_stopped_after_each_update_ends_with_the_same_numbers(tmp_path, monkeypatch):
    args = ("--quick", "--n", 2, "--steps", 5)
    assert run(*args, "--out", "whole", cwd=tmp_path)[0] == 0
    save = train.save_checkpoint

    def stopping(*given):
        save(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_checkpoint", stopping)
    for step in range(5):
        status, printed, error = run(*args, cwd=tmp_path)
        assert status == 130
        assert "the same command continues after" in error
        assert f"continuing after step {step}" in printed or step == 0
    monkeypatch.undo()
    assert run(*args, cwd=tmp_path)[0] == 0
    assert read_rows(tmp_path / "out") == read_rows(tmp_path / "whole")
    for name in ("history-n2-seed0.jsonl", "policy-n2-seed0/model.safetensors"):
        stopped, whole = [(tmp_path / out / name).read_bytes() for out in ("out", "whole")]
        assert stopped == whole
    # nothing but finished stages is left
    names = {path.name.split("-seed")[0] for path in (tmp_path / "out" / "cache").iterdir()}
    assert names == ALL | {"run-n2"}


def test_a_run_does_not_depend_on_what_ran_before(copied_run, tmp_path):
    assert run("--quick", "--n", 3, cwd=copied_run)[0] == 0
    assert run("--quick", "--n", 3, "--out", "alone", cwd=tmp_path)[0] == 0
    assert read_rows(copied_run / "out")[3:] == read_rows(tmp_path / "alone")

# -------------------------------------------------------------------------------- names of contents

@dataclasses.dataclass(frozen=True)
class Sizes:
    """Two numbers."""
    a: int = 1
    b: int = 2


def test_a_digest_names_the_content():
    g = torch.Generator()
    model = GPT(4, 4, generator=g.manual_seed(0))
    moved = GPT(4, 4, generator=g.manual_seed(0))
    assert digest(model) == digest(moved)
    moved.ln_f.bias.data[0] += 1
    contents = [
        None, 0, 1, 1.0, True, "1", b"1", [1], [1, 2], [[1], 2], {"a": 1}, {"a": 2}, {"b": 1},
        torch.zeros(2), torch.zeros(3), torch.zeros(2, 1), torch.zeros(2).double(),
        torch.tensor([0.0, 1.0]), Sizes(), Sizes(b=3), model, moved, GPT(4, 4, n_head=2),
        GPT(4, 4, activation="relu"), model.sample, model.logprob, train.Method("x", ("a",), None),
        train.Method("x", ("b",), None), train_tokenizer(["ab"], 300),
        train_tokenizer(["bc"], 300)]
    names = [digest(content) for content in contents]
    assert names == [digest(content) for content in contents]
    assert len(set(names)) == len(names)
    # in another process, and ever after, the name is the same; the label of a method does not count
    assert digest(1, "a", [2.5, None]) == "0c2603d9f242"
    assert digest(1, 2) != digest(12)
    assert digest(train.Method("y", ("a",), len)) == digest(train.Method("x", ("a",), None))
    with pytest.raises(TypeError, match="the content of a object is unknown"):
        digest([1, object()])
