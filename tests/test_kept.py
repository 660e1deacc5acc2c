"""Kept stages: what an edit repeats, edited files, damaged files, stopped runs."""
import dataclasses
import os
import re
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

REWARDS = {"rewards-training", "rewards-held-out", "rewards-draws"}
SAMPLES = {"samples-training", "samples-held-out", "samples-draws"}
POLICY = {"policy-vbon-n2", "evaluation-vbon-n2"}
ALL = {"reference-model"} | SAMPLES | REWARDS | POLICY


def stages(folder):
    """The files in the cache without that for --sample, which is no stage."""
    return {path.name for path in folder.glob("out/cache/[!.]*")} - {"run-n2-seed0.pt"}

# --------------------------------------------------------------------- what an edit makes run again

EDITS = {
    "model": ALL,
    "support.sampling": ALL,
    "support.reference_model": {"reference-model"},     # it ends with the same weights
    "reward": REWARDS | POLICY,
    "support.own_reward": REWARDS | POLICY,
    "support.tokenizer": REWARDS | POLICY,
    "vbon": POLICY,
    "train": POLICY,
}


@pytest.mark.parametrize("edited", [*EDITS, "all others"])
def test_an_edit_of_a_module_repeats_the_stages_that_name_it(edited, copied_run, monkeypatch):
    for name in [edited] if edited in EDITS else kept.SOURCES.keys() - EDITS.keys():
        monkeypatch.setitem(kept.SOURCES, name, kept.SOURCES[name] + "\nEDITED = True\n")
    monkeypatch.setattr(inputs, "check_sources", lambda: None)
    monkeypatch.setattr(kept, "syntax", kept.syntax.__wrapped__)        # not what it was before
    before = stages(copied_run)
    assert run("--quick", "--n", 2, cwd=copied_run)[0] == 0
    repeated = {name.split("-seed")[0] for name in stages(copied_run) - before}
    assert repeated == EDITS.get(edited, set())
    # results of the new code stand beside those of the old
    assert len({row["code"] for row in read_rows(copied_run / "out")}) == 2


STORES = {"support.report", "support.kept", "support.files"}     # they make no numbers


@pytest.mark.parametrize("flags", [[], ["--reward", HERE / "experiments/rewards/length.py"]])
def test_a_stage_names_all_modules_whose_code_it_runs(flags, tmp_path, monkeypatch):
    """Each function of ours that is called inside a stage is of a module that the stage names."""
    forgotten = set()
    watched = set()

    def keep(cache, name, stage, *args, code, **other):
        called = set()

        def profiled(*given):
            sys.setprofile(lambda frame, *_: called.add(frame.f_code.co_filename))
            try:
                return stage(*given)
            finally:
                sys.setprofile(None)

        result = kept.keep(cache, name, profiled, *args, code=code, **other)
        for module in kept.SOURCES.keys() - {*code, *STORES}:
            if str(HERE / (module.replace(".", "/") + ".py")) in called:
                forgotten.add((stage.__name__, module))
        watched.add(stage.__name__)
        return result

    monkeypatch.setattr(train, "keep", keep)
    assert run("--quick", "--n", 2, *flags, cwd=tmp_path)[0] == 0
    assert len(watched) == 5
    assert forgotten == set()

# ------------------------------------------------------------------------------------ edited files

EDITS_IN_PYTHON = """
import importlib, pathlib
import train, vbon

def edit(old, new, name="vbon.py"):
    path = pathlib.Path(name)
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")

def says():
    # a run that is not refused for an edit is refused for what comes next
    try:
        train.main(["--device", "abacus"])
    except ValueError as error:
        print(error)

edit("(less + 1)", "(less + 1.5)")
says()                                          # refused, the file is edited
edit("(less + 1.5)", "(less + 1)")
says()
edit("(less + 1)", "(less + 1.5)")
importlib.reload(vbon)
edit("(less + 1.5)", "(less + 1)")
says()                                          # refused, the edited code is in memory
importlib.reload(vbon)
says()
"""
EDITS_IN_IPYTHON = """
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.push({"says": says})
edit("* (2 * progress", "* (3 * progress", "train.py")
shell.run_cell("%run train.py --device abacus")  # refused
edit("* (3 * progress", "* (2 * progress", "train.py")
shell.run_cell("%run train.py --device abacus")
shell.run_cell("%load_ext autoreload")
shell.run_cell("%autoreload 2")
edit("(less + 1)", "(less + 1.5)")
shell.run_cell("says()")                        # refused, the file is edited
edit("(less + 1.5)", "(less + 1)")
says()                                          # refused, the edited code is in memory
"""


@pytest.mark.parametrize("program, wanted", [
    (EDITS_IN_PYTHON, ["vbon.py", "", "vbon.py", ""]),
    (EDITS_IN_PYTHON + EDITS_IN_IPYTHON,
     ["vbon.py", "", "vbon.py", "", "train.py", "", "vbon.py", "vbon.py"])],
    ids=["python", "ipython"])
def test_an_edited_file_is_refused_until_the_edit_is_taken_back(program, wanted, tmp_path):
    if "IPython" in program:
        pytest.importorskip("IPython")
    for name in ("vbon", "model", "reward", "train"):
        shutil.copy(HERE / f"{name}.py", tmp_path)
    shutil.copytree(HERE / "support", tmp_path / "support", ignore=shutil.ignore_patterns("*.pyc"))
    variables = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1",
                 "IPYTHONDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, text=True, timeout=120,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=os.environ | variables)
    assert wanted == re.findall(
        r"(\w+.py) was edited after its import: restart Python|abacus: want", done.stdout)

# ----------------------------------------------------------------- files of the cache, stopped runs

@pytest.mark.parametrize("left", [0, 10, -100])
def test_a_damaged_file_of_the_cache_is_made_again(left, copied_run, finished_run):
    victim = next((copied_run / "out" / "cache").glob("samples-held-out-*"))
    victim.write_bytes(victim.read_bytes()[:left])
    _, printed, _ = run("--quick", "--n", 2, cwd=copied_run)
    assert re.findall(r"samples \((.*)\) 1/1", printed) == ["held-out"]
    assert f"damaged, made again: {victim.relative_to(copied_run)}" in printed
    assert read_rows(copied_run / "out") == read_rows(finished_run / "out")


def test_a_run_stopped_after_each_update_ends_with_the_same_numbers(tmp_path, monkeypatch):
    args = ("--quick", "--n", 2, "--steps", 5)
    assert run(*args, "--out", "whole", cwd=tmp_path)[0] == 0
    save = train.save_checkpoint

    def stopping(*given):
        save(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_checkpoint", stopping)
    for step in range(5):
        status, printed, _ = run(*args, cwd=tmp_path)
        assert status == 130
        assert f"continuing after step {step}" in printed or step == 0
    monkeypatch.undo()
    assert run(*args, cwd=tmp_path)[0] == 0
    assert read_rows(tmp_path / "out") == read_rows(tmp_path / "whole")
    # no checkpoint is left
    assert {name.split("-seed")[0] for name in stages(tmp_path)} == ALL

# -------------------------------------------------------------------------------- names of contents

def test_a_digest_names_the_content():
    settings = train.TuningSettings()
    model, same, moved = [GPT(4, 4, generator=torch.Generator().manual_seed(0)) for _ in range(3)]
    moved.ln_f.bias.data[0] += 1
    method, renamed, other = [train.Method(*x, None) for x in (("x", "a"), ("y", "a"), ("x", "b"))]
    contents = [
        None, 0, 1, 1.0, True, "1", b"1", [1], [1, 2], [[1], 2], {"a": 1}, {"a": 2}, {"b": 1},
        torch.zeros(2), torch.zeros(2, 1), torch.zeros(2).double(), torch.tensor([0.0, 1.0]),
        settings, dataclasses.replace(settings, k=9), model, moved, GPT(4, 4, n_head=2),
        model.sample, model.logprob, moved.logprob, method, other,
        train_tokenizer(["ab"], 300), train_tokenizer(["c"], 300)]
    assert len({digest(content) for content in contents}) == len(contents)
    assert (digest(same), digest(renamed)) == (digest(model), digest(method))
    # in another process, and ever after, the name is the same
    assert digest(1, "a", [2.5, None]) == "0c2603d9f242"
    with pytest.raises(TypeError, match="the content of a object is unknown"):
        digest([1, object()])
