"""The text of a run: reviews as tokens, and the prompts, which are the first tokens of reviews."""
import random
from typing import NamedTuple

import tiktoken
import torch
from torch import Tensor

from support.errors import UnusableInput
from support.inputs import Inputs
from support.reviews import builtin_reviews
from support.tokenizer import encode, train_tokenizer


class Text(NamedTuple):
    """Tokenized reviews, padded with end-of-text, and prompts."""
    encoding: tiktoken.Encoding
    tokens: Tensor                  # (R, T) reviews to train on
    labels: Tensor                  # (R,) 1 positive, 0 negative
    unseen_tokens: Tensor           # (R', T) held-out reviews: perplexity, accuracy
    unseen_labels: Tensor           # (R',)
    prompts: Tensor                 # (P, T0) to train on
    held_prompts: Tensor            # (P', T0) held out: vBoN is not trained on any of them


def make_text(inputs: Inputs, settings, seed: int) -> Text:
    """Return the reviews as tokens, and the prompts.

    settings: reviews, vocab, prompt_tokens, length, prompts, held_prompts. Raises UnusableInput if
    the text has too few different prompts.
    """
    reviews = list(inputs.reviews or builtin_reviews(settings.reviews, seed))
    random.Random(seed).shuffle(reviews)
    texts = [text for text, _ in reviews]
    labels = torch.tensor([label for _, label in reviews])
    if inputs.pretrained is not None:
        encoding = inputs.pretrained.encoding
    else:
        encoding = train_tokenizer(texts[:2000], settings.vocab)
    tokens = encode(encoding, texts, settings.prompt_tokens + settings.length)

    # the prompts of all reviews, each once, in the order of the reviews
    starts = tokens[:, :settings.prompt_tokens].tolist()
    distinct = dict.fromkeys(tuple(ids) for ids in starts if is_prompt(encoding, ids))
    prompts = torch.tensor(list(distinct))
    held = min(settings.held_prompts, len(prompts) // 4)
    if held < 2:
        raise UnusableInput(f"want at least 8 different prompts of {settings.prompt_tokens} "
                            f"tokens, got {len(prompts)}; a shorter text has none")
    last = held + settings.prompts
    unseen = max(16, len(reviews) // 20)
    return Text(encoding, tokens[unseen:], labels[unseen:], tokens[:unseen], labels[:unseen],
                prompts[held:last], prompts[:held])


def is_prompt(encoding: tiktoken.Encoding, ids: list[int]) -> bool:
    """True if these tokens are the start of a longer text, and end with a complete character."""
    if encoding.eot_token in ids:
        return False
    try:
        encoding.decode_bytes(ids).decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
