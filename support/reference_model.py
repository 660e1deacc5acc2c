"""The reference model: a language model of the reviews, from random weights or from GPT-2's."""
import copy
import math
import time

import torch
import torch.nn.functional as functional
from torch import Tensor

from model import GPT, response_mask
from support.report import show_progress
from support.sampling import seeded_generator


def train_reference(initial: GPT | None, vocab_size: int, tokens: Tensor, unseen_tokens: Tensor,
                    settings, seed: int, device: str) -> dict:
    """Train a language model on tokens (R, T) by maximum likelihood; a stage for `keep`.

    It starts from a copy of `initial`, or from random weights. Returns the model, and "nats", its
    mean cross-entropy per token on unseen_tokens (R', T).
    """
    if initial is not None:
        model = copy.deepcopy(initial)
    else:
        model = GPT(vocab_size, tokens.shape[1], settings.layers, settings.heads, settings.width,
                    generator=seeded_generator("cpu", "weights", seed))
    model = model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lm_lr, betas=(0.9, 0.95),
                                  weight_decay=0.01, fused=True)
    order = seeded_generator("cpu", "reviews", seed)
    began = time.monotonic()
    for step in range(settings.lm_steps):
        # the learning rate rises for 20 steps, then falls along a cosine
        warmup = (step + 1) / 20
        cosine = 0.5 * (1 + math.cos(math.pi * step / settings.lm_steps))
        optimizer.param_groups[0]["lr"] = settings.lm_lr * min(warmup, cosine)
        rows = torch.randint(len(tokens), (settings.lm_batch,), generator=order)
        loss = lm_loss(model, tokens[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        show_progress("reference model", step + 1, settings.lm_steps, began)
    nats = 0.0
    count = 0
    with torch.no_grad():
        for part in unseen_tokens.split(64):
            # each part counts by its number of tokens
            predicted = response_mask(part, model.eot)[:, 1:].sum().item()
            nats += predicted * lm_loss(model, part.to(device)).item()
            count += predicted
    # The policy will be a copy of this model. So far, input embedding and output head share their
    # weights. The policy's head must be able to change without changing the embedding.
    model.untie_head()
    return {"model": model, "nats": nats / count}


def lm_loss(model: GPT, tokens: Tensor) -> Tensor:  # (B, T) -> ()
    """Return the mean cross-entropy, in nats, of tokens 2, 3, ... and the first end-of-text."""
    mask = response_mask(tokens, model.eot)[:, 1:]
    states = model.states(tokens[:, :-1])
    return functional.cross_entropy(model.lm_head(states[mask]), tokens[:, 1:][mask])
