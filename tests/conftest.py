"""One finished quick run, which many tests look at."""
import os
import shutil

import pytest
import torch
from running import run

# The tensors here are tiny: more threads would only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The folder of a finished `--quick --n 2`. Do not write into it."""
    folder = tmp_path_factory.mktemp("finished")
    status, _, error = run("--quick", "--n", 2, cwd=folder)
    assert (status, error) == (0, "")
    return folder


@pytest.fixture
def copied_run(finished_run, tmp_path):
    """A copy of it, to go on from."""
    return shutil.copytree(finished_run, tmp_path / "copy")
