"""Random numbers for each purpose; samples, rewards and scores of many responses, in parts."""
import hashlib
import time

import torch
from torch import Tensor

from model import GPT, prompts_at_a_time, token_kl
from support.report import show_progress

RESPONSES = 1024                                        # in a part


def seeded_generator(device: torch.device | str, *names: object) -> torch.Generator:
    """Return a generator whose seed is derived from the names, such as ("batch", seed, step).

    With its own generator, each purpose gets the same numbers whatever was sampled before.
    """
    text = "".join(f"{name!r};" for name in names)
    seed = int(hashlib.sha256(text.encode("utf-8")).hexdigest()[:12], 16)
    return torch.Generator(device).manual_seed(seed)


def sample_responses(model: GPT, prompts: Tensor, k: int, length: int, name: str, seed: int
                     ) -> dict:
    """Sample k responses to each prompt (P, T); a stage for `keep`."""
    device = model.wte.weight.device
    began = time.monotonic()
    parts = prompts.split(max(1, RESPONSES // k))
    response = []
    logprob = []
    for i, prompt in enumerate(parts):
        generator = seeded_generator(device, "draw", name, seed, i)
        y, log_p = model.sample(prompt.to(device), k, length, generator)
        response.append(y.cpu())
        logprob.append(log_p.cpu())
        show_progress(f"samples ({name})", i + 1, len(parts), began)
    return {"response": torch.cat(response), "logprob": torch.cat(logprob),
            "seconds": time.monotonic() - began}


def compute_rewards(reward_fn, prompts: Tensor, response: Tensor, name: str, device: str) -> dict:
    """Compute the rewards of responses (P, K, L) to prompts (P, T); a stage for `keep`."""
    began = time.monotonic()
    size = max(1, RESPONSES // response.shape[1])
    parts = list(zip(prompts.split(size), response.split(size)))
    reward = []
    for x, y in parts:
        reward.append(reward_fn(x.to(device), y.to(device)).cpu())
        if time.monotonic() - began > 2:                # a classifier is faster
            show_progress(f"rewards ({name})", len(reward), len(parts), began)
    return {"reward": torch.cat(reward), "seconds": time.monotonic() - began}


@torch.no_grad()
def score_responses(policy: GPT, reference: GPT, prompts: Tensor, response: Tensor) -> dict:
    """Return log π_ref(y) and `token_kl` (P, K) of a policy's responses (P, K, L)."""
    device = policy.wte.weight.device
    part = prompts_at_a_time(policy, *response.shape[1:])
    ref_logprob = []
    kl_ref = []
    for x, y in zip(prompts.split(part), response.split(part)):
        x = x.to(device)
        y = y.to(device)
        ref_logprob.append(reference.logprob(x, y).cpu())
        kl_ref.append(token_kl(policy, reference, x, y).cpu())
    return {"ref_logprob": torch.cat(ref_logprob), "token_kl": torch.cat(kl_ref)}
