"""The program on a GPU: the same numbers as on the CPU. Skipped where there is none."""
import copy

import pytest
import torch
from running import read_rows, run
from test_model import small_gpt, some_tokens

import vbon
from model import add_adapters, prompts_at_a_time
from support.inputs import choose_device

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_both():
    """The same policy and prompts on CPU and GPU."""
    choose_device("cuda")                               # sets the precision of a run
    policy = small_gpt()
    policy.untie_head()
    add_adapters(policy, 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    here = (policy, some_tokens()[:, :3])
    return here, tuple(copy.deepcopy(x).cuda() for x in here)


@torch.no_grad()
def test_sampled_and_scored_logprobs_agree():
    (here, some), (there, prompt) = on_both()
    response, sampled = there.sample(prompt, 400, 9, torch.Generator("cuda").manual_seed(0))
    assert (sampled - there.logprob(prompt, response)).abs().max() < 0.03       # TF32
    assert (sampled.cpu() - here.logprob(some, response.cpu())).abs().max() < 0.03
    assert prompts_at_a_time(there, 8, 24) > prompts_at_a_time(here, 8, 24)


def test_the_gradient_is_that_of_the_cpu():
    gradients = []
    response, _ = small_gpt().sample(some_tokens()[:, :3], 6, 9, torch.Generator().manual_seed(0))
    log_target = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).double()
    for policy, prompt in on_both():
        vbon.reinforce(policy, prompt, response.to(prompt.device), log_target, 2)
        trained = [p.grad.cpu() for p in policy.parameters() if p.requires_grad]
        gradients.append(torch.cat([x.flatten() for x in trained]))
    assert (gradients[0] - gradients[1]).norm() < 0.01 * gradients[0].norm()


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
