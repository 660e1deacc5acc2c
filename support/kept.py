"""Finished stages, kept in files. A stage runs again only if something that it depends on changed.

A file's name is made from the arguments of its stage and the code that computes its numbers. So a
run that was killed continues after the last finished stage, or after the last update of
fine-tuning. After an edit, only the stages run again whose numbers the edit can change.
"""
import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import torch

from model import GPT
from support import seeding, tokenizer                  # noqa: F401 (their code is in each name)
from support.code import code_of_module, read_sources
from support.digest import digest
from support.files import write_whole
from support.processes import from_first_process, rank

# modules whose code makes numbers in every stage
ALWAYS = ("model", "support.processes", "support.seeding", "support.tokenizer")
read_sources(*ALWAYS)


def keep(cache: Path, name: str, stage: Callable[..., dict], *args: object,
         code: tuple[str, ...] = (), resumable: bool = False) -> dict:
    """Return stage(*args), from a file in the folder `cache` if it was made before.

    The file is named after the arguments, the code of the function `stage` with all that it uses of
    its own file, the modules in `code`, and those in ALWAYS. A resumable stage gets one more
    argument, before the others: the path of a checkpoint, from which it may continue. The
    checkpoint is removed at the end.
    """
    modules = [code_of_module(module) for module in (*code, *ALWAYS)]
    key = digest(torch.__version__, stage, modules, args)
    path = cache / f"{name}-{key}.pt"
    checkpoint = path.with_suffix(".checkpoint")
    content = load(path)
    if content is None:
        if resumable:
            args = (checkpoint, *args)
        save(path, stage(*args))
        content = load(path)                            # so that new and kept ones are the same
    if rank() == 0:
        checkpoint.unlink(missing_ok=True)
    return content


def save(path: Path, content: dict) -> None:
    """Write tensors, numbers, and lists and dictionaries of them, with a checksum in front."""
    if rank() != 0:
        return
    buffer = io.BytesIO()
    torch.save(content, buffer)
    checksum = hashlib.sha256(buffer.getbuffer()).digest()
    write_whole(path, checksum + buffer.getvalue())


def load(path: Path) -> dict | None:
    """Return what `save` wrote, or None if it is missing or damaged.

    The first process reads the file and sends it to the others.
    """
    content = b""
    if rank() == 0 and path.exists():
        content = path.read_bytes()
    content = from_first_process(content)
    checksum = content[:32]
    data = content[32:]
    if hashlib.sha256(data).digest() == checksum:
        return torch.load(io.BytesIO(data), "cpu", weights_only=True)
    if content:
        print(f"  damaged, made again: {path}", flush=True)
    return None


def save_checkpoint(path: Path, step: int, trained: list, optimizer: torch.optim.Optimizer,
                    history: list[dict], seconds: float) -> None:
    """Write all that the next updates of fine-tuning need."""
    save(path, {"step": step, "trained": [p.detach() for p in trained],
                "optimizer": optimizer.state_dict(), "history": history, "seconds": seconds})


def resume(path: Path, trained: list, optimizer: torch.optim.Optimizer
           ) -> tuple[int, list[dict], float]:
    """Continue from a checkpoint, if there is one.

    Sets the trained parameters and the optimizer. Returns the number of finished steps, the history
    and the seconds that they took: 0, [] and 0 without a checkpoint.
    """
    saved = load(path)
    if saved is None:
        return 0, [], 0.0
    for p, x in zip(trained, saved["trained"], strict=True):
        p.data.copy_(x)
    optimizer.load_state_dict(saved["optimizer"])
    print(f"  continuing after step {saved['step']}", flush=True)
    return saved["step"], saved["history"], saved["seconds"]


def model_content(model: GPT) -> dict:
    """Return what a model is rebuilt from, in a form that `save` can write."""
    return {"config": model.config, "weights": model.state_dict()}


def rebuild_model(content: dict, device: torch.device) -> GPT:
    """Return the model that `model_content` described."""
    model = GPT(**content["config"])
    model.load_state_dict(content["weights"])
    return model.to(device)
