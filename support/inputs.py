"""What the command line names, read and checked before any work."""
import argparse
from pathlib import Path
from typing import NamedTuple

import tiktoken
import torch

from model import GPT
from support.files import UnusableInput, check_writable
from support.huggingface import PRETRAINED, load_model
from support.kept import check_sources
from support.own_reward import RewardFile
from support.reviews import load_reviews
from support.tokenizer import pretrained_encoding


class Pretrained(NamedTuple):
    """The model and the tokenizer of --init."""
    model: GPT
    encoding: tiktoken.Encoding


class Inputs(NamedTuple):
    """The inputs of a run; None where the built-in ones are used."""
    device: torch.device
    reviews: list | None            # of --data
    own_reward: RewardFile | None   # of --reward
    pretrained: Pretrained | None   # of --init


def read_inputs(args: argparse.Namespace) -> Inputs:
    """Read what the command line names. Raises UnusableInput for anything wrong."""
    check_sources()
    out = Path(args.out)
    check_writable(out)
    device = choose_device(args.device)
    own_reward = RewardFile(args.reward) if args.reward is not None else None
    reviews = None
    pretrained = None
    if args.data is not None:
        reviews = load_reviews(args.data, labelled=own_reward is None)
    if args.init is not None:
        if Path(args.init).resolve().parent == out.resolve():
            raise UnusableInput(f"--init {args.init}: this run may overwrite it; change --out")
        pretrained = load_pretrained(args.init)
    return Inputs(device, reviews, own_reward, pretrained)


def choose_device(name: str) -> torch.device:
    """Return the device of --device, or raise UnusableInput."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise UnusableInput(f"--device {name}: want cpu, cuda or mps")
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:     # what PyTorch raises for a wrong device
        raise UnusableInput(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        # TF32: ten times as precise as bfloat16 for GPT-2's log-probabilities, faster than float32
        torch.set_float32_matmul_precision("high")
    return device


def load_pretrained(init: str) -> Pretrained:
    """Return the model and the tokenizer of --init. Raises UnusableInput for anything wrong."""
    if init not in PRETRAINED and not Path(init).is_dir():
        raise UnusableInput(f"--init {init}: no such folder, and none of {', '.join(PRETRAINED)}")
    model = load_model(init)
    encoding = pretrained_encoding(init)
    tokens = model.config["vocab_size"]
    if tokens != encoding.n_vocab:
        raise UnusableInput(f"--init {init}: the model has {tokens} tokens, its vocabulary "
                            f"{encoding.n_vocab}")
    # weights may be finite, and still so large that the logits are not
    with torch.no_grad():
        finite = model(torch.tensor([[0]])).isfinite().all()
    if not finite:
        raise UnusableInput(f"--init {init}: the logits of this model are not finite")
    return Pretrained(model, encoding)
