"""Whatever the program is started from: variables of notebooks and launchers, several at a time."""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from running import HERE, read_rows, run

from support import files, options, processes
from support.files import UnusableInput
from support.results import KEYS


def start(folder, *args, **variables):
    return subprocess.Popen([sys.executable, HERE / "train.py", "--quick", "--n", "2", "--out", "out", *args],
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


# ---------------------------------------------------------------------- streams, clocks and folders

def shell(command, folder):
    """What a command of the shell prints, and its status; `$TRAIN` starts the program."""
    program = f"{sys.executable} {HERE / 'train.py'} --quick --n 2 --out out"
    return subprocess.run(["bash", "-c", "set -o pipefail; " + command], cwd=folder, text=True,
                          capture_output=True, env=os.environ | {"TRAIN": program}, timeout=120)


@pytest.mark.parametrize("command", ["$TRAIN | head -1", "$TRAIN >&-", "$TRAIN > /dev/full"])
def test_the_work_is_done_although_nobody_reads_the_output(command, tmp_path):
    done = shell(command, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(read_rows(tmp_path / "out")) == 3


def test_a_clock_that_is_set_back_gives_no_negative_seconds(tmp_path, monkeypatch):
    clock = iter(range(10 ** 9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: next(clock))
    status, printed, _ = run("--quick", "--n", 2, cwd=tmp_path)
    assert status == 0
    assert not re.search(r"-\d+ (of|s)", printed)


def test_a_cache_on_another_disk_is_as_good(tmp_path):
    other = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        assert other.stat().st_dev != tmp_path.stat().st_dev
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "cache").symlink_to(other)
        assert run("--quick", "--n", 2, cwd=tmp_path)[0] == 0
        assert (tmp_path / "out" / "policy-n2-seed0" / "config.json").exists()
    finally:
        shutil.rmtree(other)


def test_a_model_folder_may_be_a_link(copied_run):
    folder = copied_run / "out" / "policy-n2-seed0"
    elsewhere = copied_run / "elsewhere"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    assert run("--quick", "--n", 2, "--steps", 4, cwd=copied_run)[0] == 0
    assert folder.is_symlink()
    settings = json.loads((elsewhere / "settings.json").read_text(encoding="utf-8"))
    assert settings["steps"] == 4
    assert not list(copied_run.glob(".*.part*"))


def test_a_lock_that_may_only_be_read_is_a_lock(tmp_path):
    path = tmp_path / "cache" / "results.lock"
    path.parent.mkdir()
    path.touch(0o444)
    order = []

    def second():
        with files.lock(tmp_path):
            order.append("second")

    thread = threading.Thread(target=second)
    with files.lock(tmp_path):
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


@pytest.mark.parametrize("place", ["out", "out/cache"])
def test_a_file_in_the_place_of_a_folder_is_said_at_the_start(place, tmp_path):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("", encoding="utf-8")
    status, printed, error = run("--quick", "--n", 2, cwd=tmp_path)
    assert (status, printed) == (2, "")
    assert f"--out {place}: " in error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("place", ["out", "out/cache"])
def test_a_folder_without_permission_is_said_at_the_start(place, tmp_path):
    (tmp_path / "out" / "cache").mkdir(parents=True)
    (tmp_path / place).chmod(0o555)
    status, printed, error = run("--quick", "--n", 2, cwd=tmp_path)
    assert (status, printed) == (2, "")
    assert "Permission denied" in error


def test_processes_with_other_inputs_are_refused(monkeypatch):
    """Another text under the same path, on another machine."""
    monkeypatch.setattr(processes, "from_all_processes", lambda mine: mine | {1: "other"})
    with pytest.raises(UnusableInput, match="process 1 has other inputs than process 0"):
        processes.check_same("inputs", "ours")
