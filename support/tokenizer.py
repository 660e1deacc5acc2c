"""Tokens: a byte-pair trainer, tiktoken's encoder, the tokenizer files of Hugging Face folders."""
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import tiktoken
import torch
from tiktoken_ext.openai_public import r50k_pat_str
from torch import Tensor

from support.files import UnusableInput, read_json, read_text, write_json
from support.huggingface import PRETRAINED, check_values

END = "<|endoftext|>"
# Words with their leading space, numbers, punctuation, white space. Every character belongs to one
# of these classes, so decoding the tokens of a string gives the same string.
PATTERN = r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"
PATTERNS = {"vbon": PATTERN, "gpt2": r50k_pat_str}


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tiktoken.Encoding:
    """Learn byte-pair merges (Sennrich et al. 2016, arXiv 1508.07909) and return an encoder.

    Ids 0..255 are the bytes. The merges follow in the order learned; each step merges the most
    frequent pair of adjacent tokens, if any is left. End-of-text is last.
    """
    counts = Counter()
    for text in texts:
        counts.update(re.findall(PATTERN, text))
    # each distinct word as a list of tokens, which are its bytes at first
    words = []
    for word, count in counts.items():
        parts = [bytes([b]) for b in word.encode("utf-8")]
        words.append((parts, count))
    ranks = {bytes([b]): b for b in range(256)}
    # how often each pair of adjacent tokens occurs, and in which words
    pairs = Counter()
    where = defaultdict(set)
    changed = range(len(words))
    while True:
        for i in changed:
            parts, count = words[i]
            for pair in zip(parts, parts[1:]):
                pairs[pair] += count
                where[pair].add(i)
        best = max(pairs, key=pairs.get, default=None)
        if len(ranks) >= vocab_size - 1 or not pairs[best]:
            return make_encoding(ranks)
        ranks[best[0] + best[1]] = len(ranks)
        # only words with this pair change: take their old pairs out of the counts
        changed = where.pop(best)
        for i in changed:
            parts, count = words[i]
            for pair in zip(parts, parts[1:]):
                pairs[pair] -= count
            _merge(parts, best)


def _merge(parts: list[bytes], pair: tuple[bytes, bytes]) -> None:
    """Merge each occurrence of the pair, from the left, in place."""
    j = 0
    while j < len(parts) - 1:
        if (parts[j], parts[j + 1]) == pair:
            parts[j:j + 2] = [pair[0] + pair[1]]
        j += 1


def make_encoding(ranks: dict[bytes, int], name: str = "vbon") -> tiktoken.Encoding:
    """Return an encoder from its tokens: bytes to id, where lower ids are merged first.

    The name, "vbon" or "gpt2", chooses the pattern that splits a text into words.
    """
    return tiktoken.Encoding(name, pat_str=PATTERNS[name], mergeable_ranks=ranks,
                             special_tokens={END: len(ranks)})


def encode(encoding: tiktoken.Encoding, texts: Iterable[str], length: int) -> Tensor:
    """Return token ids (R, length): each text truncated to `length`, or padded with end-of-text."""
    return pad([encoding.encode_ordinary(text) for text in texts], length, encoding.eot_token)


def pad(rows: Iterable[list[int]], length: int, eot: int) -> Tensor:
    """Return token ids (R, length): each row truncated, or padded with end-of-text."""
    return torch.tensor([row[:length] + [eot] * (length - len(row)) for row in rows])


def decode(encoding: tiktoken.Encoding, ids: list[int]) -> str:
    """Return the text of token ids, without end-of-text."""
    return encoding.decode([i for i in ids if i != encoding.eot_token])

# GPT-2's files write a printable byte as itself, and the others as U+0100 and following
OTHERS = iter(range(256, 512))
LETTERS = [chr(b) if chr(b).isprintable() and b != 32 else chr(next(OTHERS)) for b in range(256)]
# how tokenizer.json splits a text into words; ByteLevel has GPT-2's pattern built in
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
SPLIT = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
WORDS = {
    "gpt2": BYTE_LEVEL | {"use_regex": True},
    "vbon": {"type": "Sequence", "pretokenizers": [SPLIT, BYTE_LEVEL | {"use_regex": False}]},
}
TEMPLATE = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}]}
# what we read: the parts of a tokenizer.json, and the settings of a tokenizer_config.json
KNOWN = {
    "added_tokens": [{END}],
    "model": [{"type": "BPE"}, {}],
    "padding": [{}, {"strategy": "BatchLongest"}],
    "post_processor": [{}, {"type": "ByteLevel"}, TEMPLATE],
    "pre_tokenizer": [*WORDS.values(), BYTE_LEVEL],
    **dict.fromkeys(["bos_token", "eos_token", "unk_token", "pad_token"], [None, END]),
    **dict.fromkeys(["normalizer", "add_prefix_space", "add_bos_token", "add_eos_token",
                     "do_lower_case", "extra_special_tokens", "additional_special_tokens"], [None]),
}
# fields of these parts that change no ids
NEUTRAL = ("vocab", "merges", "direction", "pad_id", "pad_type_id", "pad_token", "pair",
           "add_prefix_space", "trim_offsets", "use_regex")


def pretrained_encoding(source: str | Path) -> tiktoken.Encoding:
    """Return GPT-2's tokenizer, downloaded by tiktoken, or that of a Hugging Face folder.

    A folder has tokenizer.json, or vocab.json and merges.txt. Raises UnusableInput if a text
    without "<|endoftext|>" would get other ids than in other libraries.
    """
    if str(source) in PRETRAINED:
        return tiktoken.get_encoding("gpt2")
    path = Path(source, "tokenizer.json")
    # where both are, other libraries read tokenizer.json
    if path.exists():
        content = read_json(path)
    else:
        path = Path(source, "vocab.json")
        # after a line with the version; the last line is empty
        merges = read_text(Path(source, "merges.txt")).split("\n")[1:-1]
        content = {"model": {"vocab": read_json(path), "merges": merges},
                   "added_tokens": [{"content": END}], "pre_tokenizer": WORDS["gpt2"]}
    settings = Path(source, "tokenizer_config.json")
    if settings.exists():
        content = read_json(settings) | content
    try:
        return _read_encoding(path, content)
    except (AttributeError, KeyError, TypeError) as error:
        raise UnusableInput(f"{path}: {type(error).__name__} {error}") from None


def _read_encoding(path: Path, content: dict) -> tiktoken.Encoding:
    """Return the encoder of a tokenizer.json and its settings, or raise UnusableInput."""
    found = {name: content.get(name) or None for name in KNOWN}
    added = [*content["added_tokens"], *content.get("added_tokens_decoder", {}).values()]
    found["added_tokens"] = {token["content"] for token in added}
    for name in ("model", "padding", "post_processor"):
        fields = (found[name] or {}).items()
        found[name] = {key: value for key, value in fields if value and key not in NEUTRAL}
    check_values(path.parent, found, KNOWN)

    vocabulary = content["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    ids = {token: i for i, token in enumerate(tokens)}
    bytes_first = set(tokens[:256]) == set("".join(tokens[:-1])) == set(LETTERS)
    if not bytes_first or tokens[-1] != END or vocabulary != ids:
        raise UnusableInput(f"{path}: want all ids: the 256 bytes first, {END} last")
    del ids[END]
    wanted = _find_merges(path, ids)
    merges = [tuple(x.split(" ") if isinstance(x, str) else x) for x in content["model"]["merges"]]
    if merges != wanted:
        raise UnusableInput(f"{path}: want a merge for each token, in order")
    ranks = {bytes(map(LETTERS.index, token)): i for token, i in ids.items()}
    return make_encoding(ranks, "vbon" if found["pre_tokenizer"] == WORDS["vbon"] else "gpt2")


def _find_merges(path: Path, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Return the merge of each token: the two parts that the tokens before it leave of its bytes.

    For example, ab and bc before abc: a b c -> ab c. Hugging Face merges listed pairs only,
    tiktoken any two neighbours that make a token. If each token has a merge, no other pair occurs,
    and both give the same ids. Raises UnusableInput if a token has none.
    """
    merges = []
    for token, i in ids.items():
        parts = list(token)
        while len(parts) > 2:
            ranks = [ids.get(a + b, i) for a, b in zip(parts, parts[1:])]
            first = min(ranks)
            if first >= i:
                raise UnusableInput(f"{path}: no two tokens before {token!r} make it")
            at = ranks.index(first)
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append(tuple(parts))
    return merges


def save_tokenizer(encoding: tiktoken.Encoding, folder: str | Path, max_length: int | None = None
                   ) -> None:
    """Write tokenizer.json, as transformers reads it, and GPT-2's two files for its pattern."""
    vocabulary = {}
    for i in range(encoding.eot_token):
        token = encoding.decode_single_token_bytes(i)
        vocabulary["".join(LETTERS[byte] for byte in token)] = i
    merges = _find_merges(Path(folder), vocabulary)
    vocabulary[END] = encoding.eot_token
    end = {"id": encoding.eot_token, "content": END, "special": True, "normalized": False,
           "single_word": False, "lstrip": False, "rstrip": False}
    content = {
        "version": "1.0",
        "added_tokens": [end],
        "pre_tokenizer": WORDS[encoding.name],
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END, "eos_token": END, "unk_token": END, "pad_token": END,
        "model_max_length": max_length,
        # prompts of a batch end together, so that responses begin together
        "padding_side": "left",
        # GPT-2 has no token types; if transformers 4 returned some, it would add their embeddings
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    write_json(Path(folder, "tokenizer.json"), content)
    write_json(Path(folder, "tokenizer_config.json"), settings)
    if encoding.name == "gpt2":
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        write_json(Path(folder, "vocab.json"), vocabulary)
        Path(folder, "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
