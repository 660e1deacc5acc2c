"""Sampling and rewards of many responses: in parts, which several processes share."""
import time

import torch
from torch import Tensor

from model import GPT
from support import processes
from support.code import read_source
from support.report import show_progress
from support.seeding import seeded_generator

read_source(__file__)


def sample_responses(model: GPT, prompts: Tensor, k: int, length: int, name: str, seed: int
                     ) -> dict:
    """Sample k responses to each prompt (P, T); a stage for `keep`.

    About a thousand responses at a time. Each part has its own random numbers, so the processes can
    share the parts without changing the result.
    """
    device = model.wte.weight.device
    began = time.monotonic()
    parts = prompts.split(max(1, 1024 // k))
    mine = {}
    for i in range(processes.rank(), len(parts), processes.world_size()):
        prompt = parts[i].to(device)
        response, logprob = model.sample(prompt, k, length,
                                         seeded_generator(device, "draw", name, seed, i))
        mine[i] = (response.cpu(), logprob.cpu())
        show_progress(f"samples ({name})", i + 1, len(parts), began)
    done = processes.from_all_processes(mine)
    columns = zip(*[done[i] for i in range(len(parts))])
    response, logprob = [torch.cat(column) for column in columns]
    return {"response": response, "logprob": logprob, "seconds": time.monotonic() - began}


def compute_rewards(reward_fn, prompts: Tensor, response: Tensor, name: str, device: str) -> dict:
    """Compute the rewards of responses (P, K, L) to prompts (P, T); a stage for `keep`."""
    began = time.monotonic()
    size = max(1, 1024 // response.shape[1])
    parts = list(zip(prompts.split(size), response.split(size)))
    mine = {}
    for i in range(processes.rank(), len(parts), processes.world_size()):
        prompt, part = parts[i]
        mine[i] = reward_fn(prompt.to(device), part.to(device)).cpu()
        if time.monotonic() - began > 2:                # a classifier is faster
            show_progress(f"rewards ({name})", i + 1, len(parts), began)
    done = processes.from_all_processes(mine)
    reward = torch.cat([done[i] for i in range(len(parts))])
    return {"reward": reward, "seconds": time.monotonic() - began}
