"""One finished quick run, which many tests look at."""
import os
import shutil

import pytest
import torch
from running import run

from support import results

# The tensors here are tiny: more threads would only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The folder of a finished `--quick --n 2`, with its picture. Do not write into it."""
    folder = tmp_path_factory.mktemp("finished")
    status, _, error = run("--quick", "--n", 2, cwd=folder)
    assert (status, error) == (0, "")
    return folder


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Runs inside a test draw no picture: it takes as long as the rest."""
    monkeypatch.setattr(results, "plot_run", lambda *args: None)


@pytest.fixture
def copied_run(finished_run, tmp_path):
    """A copy of it, to go on from."""
    return shutil.copytree(finished_run, tmp_path / "copy")
