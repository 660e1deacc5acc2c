"""The program on a GPU: the same numbers as on the CPU. Skipped where there is none."""
import copy
import json
import math

import pytest
import torch
from running import run
from test_model import small_gpt, some_tokens

import train
from model import add_adapters, prompts_at_a_time

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def precision():
    """As support/processes.py sets it."""
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def on_both():
    """The same policy, reference and prompts on CPU and GPU."""
    policy = small_gpt()
    policy.untie_head()
    add_adapters(policy, 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    here = (policy, small_gpt(), some_tokens()[:, :3])
    return here, tuple(copy.deepcopy(x).cuda() for x in here)


@torch.no_grad()
def test_sampled_and_scored_logprobs_agree():
    _, (policy, _, prompt) = on_both()
    g = torch.Generator("cuda").manual_seed(0)
    response, sampled = policy.sample(prompt, 400, 9, g)
    assert (sampled - policy.logprob(prompt, response)).abs().max() < 0.03      # TF32
    (here, _, prompt), _ = on_both()
    assert (sampled.cpu() - here.logprob(prompt, response.cpu())).abs().max() < 0.03


@torch.no_grad()
def test_samples_have_the_distribution_of_the_cpu():
    (here, _, prompt), (policy, _, _) = on_both()
    one, _ = here.sample(prompt, 8000, 9, torch.Generator().manual_seed(0))
    two, _ = policy.sample(prompt.cuda(), 8000, 9, torch.Generator("cuda").manual_seed(0))
    for statistic in (lambda y: here.logprob(prompt, y), lambda y: (y != 19).sum(-1).double(),
                      lambda y: y[..., 0].double()):
        a = statistic(one).flatten()
        b = statistic(two.cpu()).flatten()
        assert abs(a.mean() - b.mean()) < 4 * ((a.var() + b.var()) / len(a)).sqrt()


def test_the_gradient_is_that_of_the_cpu():
    gradients = []
    response, _ = small_gpt().sample(some_tokens()[:, :3], 6, 9, torch.Generator().manual_seed(0))
    log_target = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).double()
    for policy, _, prompt in on_both():
        train.vbon.reinforce(policy, prompt, response.to(prompt.device), log_target, 2)
        trained = [p.grad.cpu() for p in policy.parameters() if p.requires_grad]
        gradients.append(torch.cat([x.flatten() for x in trained]))
    assert (gradients[0] - gradients[1]).norm() < 0.01 * gradients[0].norm()


def test_more_is_scored_together_on_a_gpu():
    (here, _, _), (there, _, _) = on_both()
    assert prompts_at_a_time(there, 8, 24) > prompts_at_a_time(here, 8, 24)


def test_a_quick_main_job_runs_on_the_gpu_and_resumes(tmp_path):
    args = ("--quick", "--n", 2, "--steps", 60, "--device", "cuda")
    status, printed, error = run(*args, cwd=tmp_path)
    assert (status, error) == (0, "")
    rows = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert {row["device"] for row in rows} == {"cuda"}
    assert rows[2]["win_rate"] > rows[0]["win_rate"] + 0.05
    assert all(math.isfinite(row["kl_bon"]) for row in rows)
    # again: from the cache, with the same numbers
    status, printed, _ = run(*args, cwd=tmp_path)
    assert "vBoN n=2 60/60" not in printed
    again = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert again == rows
