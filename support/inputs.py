"""The inputs that the command line names, read and checked before any work."""
import argparse
from pathlib import Path
from typing import NamedTuple

import tiktoken
import torch
from torch import Tensor

from model import GPT
from support import processes
from support.digest import digest
from support.files import UnusableInput
from support.files import check_writable
from support.huggingface import load_model, PRETRAINED
from support.options import check_arguments
from support.own_reward import RewardFile
from support.results import check_folders, read_results
from support.reviews import load_reviews, normalise
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
    quick: bool = False             # --quick


def read_inputs(args: argparse.Namespace, ns: list[int], folders: list[Path]) -> Inputs:
    """Check the command line, read what it names, and connect the processes.

    The run will write the models `folders`. Raises UnusableInput for anything wrong.
    """
    check_arguments(args, ns)
    out = Path(args.out)
    try:
        check_writable(out)
        read_results(out)                               # if they are damaged, say so now
    except OSError as error:
        raise UnusableInput(f"--out {error.filename or out}: {error.strerror}") from None
    check_folders(args, folders)
    device = processes.connect(args.device)
    processes.silence_others()
    processes.check_same("arguments", vars(args))
    own_reward = None
    if args.reward is not None:
        own_reward = RewardFile(args.reward)
    reviews = None
    if args.data is not None:
        reviews = load_reviews(args.data, labelled=own_reward is None)
    pretrained = load_pretrained(args.init)
    # on several machines, the same path may lead to different contents
    processes.check_same("inputs", digest(reviews, own_reward, pretrained))
    return Inputs(device, reviews, own_reward, pretrained, args.quick)


def load_pretrained(init: str | None) -> Pretrained | None:
    """Return the model and the tokenizer of --init. Raises UnusableInput for anything wrong."""
    if init is None:
        return None
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
        finite = model(torch.tensor([encoding.encode_ordinary("the")])).isfinite().all()
    if not finite:
        raise UnusableInput(f"--init {init}: the logits of this model are not finite")
    return Pretrained(model, encoding)


def encode_prompt(sample: str | None, encoding: tiktoken.Encoding, block_size: int
                  ) -> Tensor | None:
    """Return the prompt of --sample three times (3, T), for three responses of each model."""
    if sample is None:
        return None
    ids = encoding.encode_ordinary(normalise(sample))
    if len(ids) >= block_size:
        raise UnusableInput(f"--sample: want fewer than {block_size} tokens, got {len(ids)}")
    return torch.tensor(ids).repeat(3, 1)
