"""Two processes of torchrun: they sample what one samples, and share each batch."""
import os
import subprocess
import sys

import pytest
import torch
from running import HERE, read_rows, run

from support import kept, processes
from support.files import UnusableInput
from support.results import ALWAYS

SAMPLES = ("samples-training", "samples-held-out", "samples-draws")

TWO = """
# The main job, watched; then its group of processes put to the test.
import sys
import torch
import torch.distributed
import train
from support import processes

seen = []
roll_out = train.vbon.roll_out


def watched(*args):
    prompt, generator = args[3], args[6]
    seen.append((prompt.tolist(), generator.initial_seed()))
    return roll_out(*args)


train.vbon.roll_out = watched
train.main(sys.argv[1:])

both = [None, None]
torch.distributed.all_gather_object(both, seen)
first, second = both
seeds = []
for (rows, seed), (other_rows, other_seed) in zip(first, second, strict=True):
    # two halves of one batch of four different prompts
    assert len(rows) == len(other_rows) == 2
    assert len({tuple(row) for row in rows + other_rows}) == 4
    seeds += [seed, other_seed]
assert first[0][0] != first[1][0], "each update has another batch"
assert len(seeds) == len(set(seeds)) == 4, "each process and update has its own random numbers"

p = torch.nn.Parameter(torch.zeros(2))
p.grad = torch.full((2,), processes.rank() + 1.0)
processes.average_gradients([p])
assert p.grad.tolist() == [1.5, 1.5], "gradients are averaged"
print("all is well", file=sys.stderr)
"""


def test_two_processes_sample_what_one_samples_and_share_each_batch(tmp_path):
    (tmp_path / "two.py").write_text(TWO, encoding="utf-8")
    args = ["--quick", "--n", "2", "--steps", "2", "--m", "400", "--out"]    # several parts to sample
    assert run(*args, "one", cwd=tmp_path)[0] == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr",
                "127.0.0.1", "--nproc_per_node=2", "--"]
    done = subprocess.run([*torchrun, "two.py", *args, "two"], cwd=tmp_path, text=True,
                          capture_output=True, timeout=300,
                          env=os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("all is well") == 2
    assert done.stdout.count("theory") == 1             # one of them prints
    for name in SAMPLES:
        path, = (tmp_path / "one" / "cache").glob(f"{name}-*")
        one = kept.load(path)
        two = kept.load(tmp_path / "two" / "cache" / path.name)
        assert (one["response"] == two["response"]).double().mean() > 0.99
    ours = read_rows(tmp_path / "one")
    theirs = read_rows(tmp_path / "two")
    assert [row["processes"] for row in ours + theirs] == [1, 1, 1, 2, 2, 2]
    for one, two in zip(ours[:2], theirs[:2]):          # those that are not trained
        for key in ALWAYS[:-1]:
            assert one[key] == pytest.approx(two[key], abs=1e-3), key


def test_more_processes_than_prompts_are_refused(monkeypatch):
    monkeypatch.setattr(processes, "world_size", lambda: 3)
    assert processes.my_share(torch.arange(7)).tolist() == [0, 3]
    with pytest.raises(UnusableInput, match="3 processes cannot share 2 prompts"):
        processes.my_share(torch.arange(2))
