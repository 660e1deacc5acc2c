"""Several processes that share one run, started by torchrun.

    torchrun --local_addr 127.0.0.1 --nproc_per_node 2 -- train.py --n 4

The processes share the prompts of each update, and all sampling. Only the first one reads and
writes finished stages and results, and prints. Without torchrun there is one process, and every
function here does nothing or returns its argument.
"""
import os
import sys
from collections.abc import Iterable

import torch
import torch.distributed
from torch import Tensor

from support.files import UnusableInput

TORCHRUN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def connect(device: str) -> torch.device:
    """Return the device of this process, after connecting it to the others, if there are others.

    Raises UnusableInput for a device that cannot be used, and for wrong variables of torchrun.
    """
    variables = {name: os.environ.get(name) for name in TORCHRUN}
    several = variables["WORLD_SIZE"] not in (None, "", "1")
    if several and not all(variables.values()):
        missing = ", ".join(name for name in TORCHRUN if not variables[name])
        raise UnusableInput(f"WORLD_SIZE = {variables['WORLD_SIZE']} announces several processes, "
                            f"but {missing} is not set; start them by torchrun, or unset "
                            f"WORLD_SIZE")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise UnusableInput(f"--device {device}: want cpu, cuda or mps")
    if device == "cuda" and several:
        device = f"cuda:{variables['LOCAL_RANK']}"
    try:
        chosen = torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:     # what PyTorch raises for a wrong device
        raise UnusableInput(f"--device {device}: {str(error).splitlines()[0]}") from None
    if chosen.type == "cuda":
        # TF32: on an H100, log-probabilities of GPT-2 are ten times as precise as with bfloat16,
        # and updates are faster than with float32
        torch.set_float32_matmul_precision("high")
    if several:
        _join_group(chosen)
    return chosen


def _join_group(device: torch.device) -> None:
    """Meet the other processes; this waits until all of them have arrived."""
    backend = "gloo"
    if device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    try:
        torch.distributed.init_process_group(backend)
    except (ValueError, RuntimeError) as error:         # what PyTorch raises for wrong numbers
        raise UnusableInput(f"torchrun's variables: {error}") from None


def world_size() -> int:
    """Return the number of processes."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def rank() -> int:
    """Return the rank of this process, from 0."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return 0


def silence_others() -> None:
    """Discard the standard output of all processes but the first, until they end."""
    if rank() != 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def check_same(what: str, value: object) -> None:
    """Raise UnusableInput if the processes have different values; waits for the others."""
    values = from_all_processes({rank(): value})
    for other, theirs in values.items():
        if theirs != values[0]:
            raise UnusableInput(f"process {other} has other {what} than process 0")


def my_share(rows: Tensor) -> Tensor:
    """Return this process's part of the rows. All parts have the same size."""
    size = len(rows) // world_size() * world_size()
    if size == 0:
        raise UnusableInput(f"{world_size()} processes cannot share {len(rows)} prompts")
    return rows[rank():size:world_size()]


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over all processes; waits for the others."""
    if world_size() == 1:
        return
    for p in parameters:
        torch.distributed.all_reduce(p.grad)
        p.grad /= world_size()


def from_first_process(content: bytes) -> bytes:
    """Return the first process's content; waits for the others."""
    box = [content]
    if world_size() > 1:
        torch.distributed.broadcast_object_list(box)
    return box[0]


def from_all_processes(mine: dict) -> dict:
    """Return the entries of all processes together; waits for the others."""
    boxes = [mine]
    if world_size() > 1:
        boxes = [{} for _ in range(world_size())]
        torch.distributed.all_gather_object(boxes, mine)
    together = {}
    for box in boxes:
        together |= box
    return together
