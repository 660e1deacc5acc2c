"""The reference model: a language model of the reviews, from random weights or from GPT-2's."""
import copy
import math
import time

import torch
from torch import Tensor

from model import GPT, lm_loss, response_mask
from support.code import read_source
from support.inputs import Inputs
from support.kept import model_content
from support.report import show_progress
from support.seeding import seeded_generator
from support.text import Text

read_source(__file__)


def initial_model(inputs: Inputs, text: Text, settings, seed: int) -> GPT:
    """Return the model of --init, or a GPT with random weights; settings: layers, heads, width."""
    if inputs.pretrained is not None:
        return inputs.pretrained.model
    return GPT(vocab_size=text.encoding.n_vocab, block_size=text.tokens.shape[1],
               n_layer=settings.layers, n_head=settings.heads, n_embd=settings.width,
               generator=seeded_generator("cpu", "weights", seed))


def train_reference(initial: GPT, tokens: Tensor, unseen_tokens: Tensor,
                    settings, seed: int) -> dict:
    """Train a language model on tokens (R, T) by maximum likelihood; a stage for `keep`.

    settings: lm_steps, lm_batch, lm_lr. Returns the model, and "nats", its mean cross-entropy per
    token on unseen_tokens (R', T).
    """
    device = initial.wte.weight.device
    model = copy.deepcopy(initial)
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
    return model_content(model) | {"nats": nats / count}
