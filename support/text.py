"""The text of a run: reviews as tokens, and the prompts, which are the first tokens of reviews."""
import random
from typing import NamedTuple

import tiktoken
import torch
from torch import Tensor

from support.files import UnusableInput
from support.inputs import Pretrained
from support.reviews import builtin_reviews
from support.tokenizer import pad, train_tokenizer

LONGEST = 64                        # tokens of a response, unless --length is given


class Text(NamedTuple):
    """Tokenized reviews, truncated or padded with end-of-text, and prompts."""
    encoding: tiktoken.Encoding
    length: int                     # largest number of tokens in a response
    tokens: Tensor                  # (R, T) reviews to train on
    labels: Tensor                  # (R,) 1 positive, 0 negative
    unseen_tokens: Tensor           # (R', T) held-out reviews: perplexity, accuracy
    unseen_labels: Tensor           # (R',)
    prompts: Tensor                 # (P, T0) to train on
    held_prompts: Tensor            # (P', T0) held out: vBoN is not trained on any of them


def make_text(reviews: list | None, pretrained: Pretrained | None, settings, seed: int) -> Text:
    """Return the reviews, or the built-in ones, as tokens, and the prompts; print what they are.

    A length of 0 is chosen here: it cuts a tenth of the reviews, but it is at most LONGEST, and at
    most what a model of --init has room for. Raises UnusableInput for too few different prompts.
    """
    reviews = list(reviews or builtin_reviews(settings.reviews, seed))
    random.Random(seed).shuffle(reviews)
    texts = [text for text, _ in reviews]
    labels = torch.tensor([label for _, label in reviews])
    room = LONGEST
    if pretrained is not None:
        encoding = pretrained.encoding
        room = min(room, pretrained.model.config["block_size"] - settings.prompt_tokens)
    else:
        encoding = train_tokenizer(texts[:2000], settings.vocab)
    rows = [encoding.encode_ordinary(text) for text in texts]

    # how many tokens follow the prompt, with end-of-text
    following = torch.tensor([len(row) + 1 - settings.prompt_tokens for row in rows])
    enough = max(1, int(following.double().quantile(0.9).ceil()))
    length = settings.length or min(enough, room)
    cut = (following > length).double().mean().item()
    tokens = pad(rows, settings.prompt_tokens + length, encoding.eot_token)

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
    text = Text(encoding, length, tokens[unseen:], labels[unseen:], tokens[:unseen],
                labels[:unseen], prompts[held:last], prompts[:held])
    found = len(text.prompts)
    print(f"text: {len(reviews)} reviews; {found} training prompts and {held} held-out ones")
    if found < min(64, settings.prompts):
        print("note: so few prompts may not carry over to others; raise --prompt-tokens")
    if cut > 0.1:
        print(f"note: {cut:.0%} of the texts are cut; with --length {enough}, 10% would be")
    return text


def is_prompt(encoding: tiktoken.Encoding, ids: list[int]) -> bool:
    """True if these tokens are the start of a longer text, and end with a complete character."""
    if encoding.eot_token in ids:
        return False
    try:
        encoding.decode_bytes(ids).decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
