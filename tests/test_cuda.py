"""The program on a GPU: the same numbers as on the CPU. Skipped where there is none."""
import pytest
import torch
from running import read_rows, run
from test_model import small_gpt, some_tokens

from model import prompts_at_a_time
from support.inputs import choose_device

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@torch.no_grad()
def test_sampled_and_scored_logprobs_are_those_of_the_cpu():
    choose_device("cuda")                               # sets the precision of a run
    here = small_gpt()
    there = small_gpt().cuda()
    prompt = some_tokens()[:, :3]
    response, sampled = there.sample(prompt.cuda(), 400, 9, torch.Generator("cuda").manual_seed(0))
    assert (sampled - there.logprob(prompt.cuda(), response)).abs().max() < 0.03        # TF32
    assert (sampled.cpu() - here.logprob(prompt, response.cpu())).abs().max() < 0.03
    assert prompts_at_a_time(there, 8, 24) > prompts_at_a_time(here, 8, 24)


def test_a_quick_main_job_runs_on_the_gpu_and_resumes(tmp_path):
    args = ("--quick", "--n", 2, "--steps", 60, "--device", "cuda")
    assert run(*args, cwd=tmp_path)[0] == 0
    rows = read_rows(tmp_path / "out")
    assert {row["device"] for row in rows} == {"cuda"}
    assert rows[2]["win_rate"] > rows[0]["win_rate"] + 0.05
    # again: from the cache, with the same numbers
    _, printed, _ = run(*args, cwd=tmp_path)
    assert "vBoN n=2 60/60" not in printed
    assert read_rows(tmp_path / "out") == rows
