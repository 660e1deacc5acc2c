"""Whatever the program is started from: variables of notebooks and launchers, several at a time."""
import json
import os
import subprocess
import sys

import pytest

from running import HERE, read_rows

from support import options, processes
from support.errors import UnusableInput
from support.results import KEYS


def start(folder, *args, **variables):
    return subprocess.Popen([sys.executable, HERE / "train.py", "--quick", "--n", "2", *args],
                            cwd=folder, env=os.environ | variables, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_variables_of_a_notebook_do_no_harm(tmp_path):
    # a font that is not there, and text by a program that is not
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.family: none\nbackend: TkAgg\n",
                                           encoding="utf-8")
    done = start(tmp_path, MPLBACKEND="module://matplotlib_inline.backend_inline", RANK="3",
                 LOCAL_RANK="x", WORLD_SIZE="1", MASTER_PORT="none")
    _, error = done.communicate()
    assert (done.returncode, error) == (0, "")
    assert len(read_rows(tmp_path / "out")) == 3


@pytest.mark.parametrize("name", processes.TORCHRUN[1:])
def test_a_launcher_half_announced_is_refused(name, monkeypatch):
    for other in processes.TORCHRUN:
        monkeypatch.setenv(other, "2")
    monkeypatch.delenv(name)
    with pytest.raises(UnusableInput, match=f"{name} is not set"):
        processes.connect("cpu")


@pytest.mark.parametrize("size", ["two", "-1", "0"])
def test_an_odd_number_of_processes_is_refused(size, monkeypatch):
    for other in processes.TORCHRUN:
        monkeypatch.setenv(other, "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UnusableInput, match="torchrun"):
        processes.connect("cpu")


def test_processes_with_other_arguments_are_refused(monkeypatch):
    parser = options.make_parser("")
    other = vars(parser.parse_args(["--n", "8"]))
    monkeypatch.setattr(processes, "from_all_processes", lambda mine: mine | {1: other})
    with pytest.raises(UnusableInput, match="process 1 has other arguments"):
        processes.check_same("arguments", vars(parser.parse_args([])))


ADD = """
import json, sys
from pathlib import Path
from support import results
row = json.loads(sys.argv[1])
for i in range(20):
    results.add_results(Path("out"), [row | {"seed": int(sys.argv[2]) + i}])
"""


def test_two_processes_with_one_folder_lose_no_row(tmp_path):
    row = {name: 0 for name in KEYS}
    env = os.environ | {"PYTHONPATH": str(HERE)}
    both = [subprocess.Popen([sys.executable, "-c", ADD, json.dumps(row), first], cwd=tmp_path,
                             env=env) for first in ("0", "100")]
    assert [process.wait() for process in both] == [0, 0]
    seeds = sorted(row["seed"] for row in read_rows(tmp_path / "out"))
    assert seeds == [*range(20), *range(100, 120)]
