"""The inputs that the command line names, read and checked before any work."""
import argparse
from pathlib import Path
from typing import NamedTuple

import tiktoken
import torch
from torch import Tensor

from model import GPT
from support import processes
from support.errors import UnusableInput
from support.huggingface import PRETRAINED
from support.options import check_arguments
from support.own_reward import RewardFile, load_reward
from support.results import check_folders, read_results
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


def read_inputs(args: argparse.Namespace, ns: list[int], folders: list[Path]) -> Inputs:
    """Check the command line, read what it names, and connect the processes.

    The run will write the models `folders`. Raises UnusableInput for anything wrong.
    """
    check_arguments(args, ns)
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        read_results(out)                               # if they are damaged, say so now
    except OSError as error:
        raise UnusableInput(f"--out {out}: {error.strerror}") from None
    check_folders(args, folders)
    device = processes.connect(args.device)
    processes.silence_others()
    processes.check_same_arguments(args)
    own_reward = load_reward(args.reward) if args.reward else None
    reviews = None
    if args.data:
        reviews = load_reviews(args.data, labelled=own_reward is None)
    return Inputs(device, reviews, own_reward, load_pretrained(args.init))


def load_pretrained(init: str | None) -> Pretrained | None:
    """Return the model and the tokenizer of --init."""
    if init is None:
        return None
    if init not in PRETRAINED and not Path(init).is_dir():
        raise UnusableInput(f"--init {init}: no such folder, and none of {', '.join(PRETRAINED)}")
    model = GPT.from_pretrained(init)
    encoding = pretrained_encoding(init)
    tokens = model.config["vocab_size"]
    if tokens != encoding.n_vocab:
        raise UnusableInput(f"--init {init}: the model has {tokens} tokens, its vocabulary "
                            f"{encoding.n_vocab}")
    return Pretrained(model, encoding)


def encode_prompt(sample: str | None, encoding: tiktoken.Encoding, block_size: int
                  ) -> Tensor | None:
    """Return the prompt of --sample three times (3, T), for three responses of each model."""
    if sample is None:
        return None
    ids = encoding.encode_ordinary(sample)
    if len(ids) >= block_size:
        raise UnusableInput(f"--sample: want fewer than {block_size} tokens, got {len(ids)}")
    return torch.tensor(ids).repeat(3, 1)
