"""Tokens: a byte-pair trainer, tiktoken's encoder, the tokenizer files of Hugging Face folders."""
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import tiktoken
import torch
from tiktoken_ext.openai_public import r50k_pat_str
from torch import Tensor

from support.files import UnusableInput, read_json, read_text
from support.huggingface import PRETRAINED

END = "<|endoftext|>"
# Words with their leading space, numbers, punctuation, white space. Every character belongs to one
# of these classes, so decoding the tokens of a string gives the same string.
PATTERN = r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"
PATTERNS = {"vbon": PATTERN, "gpt2": r50k_pat_str}


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tiktoken.Encoding:
    """Learn byte-pair merges (Sennrich et al. 2016, arXiv 1508.07909) and return an encoder.

    Ids 0..255 are the bytes. The merges follow in the order learned; each step merges the most
    frequent pair of adjacent tokens. End-of-text is last. The vocabulary is smaller than
    `vocab_size` if no pairs are left.
    """
    counts = Counter(word for text in texts for word in re.findall(PATTERN, text))
    # each distinct word as a list of tokens, which are its bytes at first
    words = []
    for word, count in counts.items():
        parts = [bytes([b]) for b in word.encode("utf-8")]
        words.append((parts, count))
    ranks = {bytes([b]): b for b in range(256)}
    # how often each pair of adjacent tokens occurs, and in which words
    pairs = Counter()
    where = defaultdict(set)
    for i in range(len(words)):
        _count_pairs(words[i], i, pairs, where)
    while len(ranks) < vocab_size - 1:
        best = max(pairs, key=pairs.get, default=None)
        if not pairs[best]:
            break
        # another pair may have made the same token before
        ranks.setdefault(best[0] + best[1], len(ranks))
        for i in where.pop(best):
            parts, count = words[i]
            for pair in zip(parts, parts[1:]):
                pairs[pair] -= count
            _merge(parts, best)
            _count_pairs(words[i], i, pairs, where)
    return make_encoding(ranks)


def _count_pairs(word: tuple[list[bytes], int], i: int, pairs: Counter, where: dict) -> None:
    """Add the pairs of word i to the counts."""
    parts, count = word
    for pair in zip(parts, parts[1:]):
        pairs[pair] += count
        where[pair].add(i)


def _merge(parts: list[bytes], pair: tuple[bytes, bytes]) -> None:
    """Merge each occurrence of the pair, from the left, in place."""
    j = 0
    while j < len(parts) - 1:
        if (parts[j], parts[j + 1]) == pair:
            parts[j:j + 2] = [pair[0] + pair[1]]
        j += 1


def make_encoding(ranks: dict[bytes, int], name: str = "vbon") -> tiktoken.Encoding:
    """Return an encoder from its tokens: bytes to id, where lower ids are merged first.

    End-of-text gets the last id. The name, "vbon" or "gpt2", chooses the pattern that splits a text
    into words.
    """
    return tiktoken.Encoding(name, pat_str=PATTERNS[name], mergeable_ranks=ranks,
                             special_tokens={END: len(ranks)})


def encode(encoding: tiktoken.Encoding, texts: Iterable[str], length: int) -> Tensor:
    """Return token ids (R, length): each text truncated to `length`, or padded with end-of-text."""
    return pad([encoding.encode_ordinary(text) for text in texts], length, encoding.eot_token)


def pad(rows: Iterable[list[int]], length: int, eot: int) -> Tensor:
    """Return token ids (R, length): each row truncated, or padded with end-of-text."""
    table = []
    for row in rows:
        row = row[:length]
        table.append(row + [eot] * (length - len(row)))
    return torch.tensor(table)


def decode(encoding: tiktoken.Encoding, ids: list[int]) -> str:
    """Return the text of token ids, without end-of-text."""
    return encoding.decode([i for i in ids if i != encoding.eot_token])

# --------------------------------------------------------------- tokenizers in Hugging Face folders

def pretrained_encoding(source: str | Path) -> tiktoken.Encoding:
    """Return GPT-2's tokenizer, downloaded by tiktoken, or that of a Hugging Face folder.

    A folder has vocab.json and merges.txt, with GPT-2's pattern, or tokenizer.json, with GPT-2's
    pattern or ours. Raises UnusableInput, which says what is wrong.
    """
    if str(source) in PRETRAINED:
        return tiktoken.get_encoding("gpt2")
    folder = Path(source)
    _check_tokenizer_config(folder / "tokenizer_config.json")
    # where both are, other libraries read tokenizer.json
    if (folder / "tokenizer.json").exists():
        return _read_tokenizer(folder / "tokenizer.json")
    vocabulary = read_json(folder / "vocab.json")
    lines = read_text(folder / "merges.txt").split("\n")
    if lines[0].startswith("#version"):
        lines = lines[1:]
    merges = [line.split() for line in lines if line.strip()]
    return make_encoding(_read_ranks(folder / "vocab.json", vocabulary, merges), "gpt2")


def _read_tokenizer(path: Path) -> tiktoken.Encoding:
    """Return the encoder of a tokenizer.json: byte-level BPE only, merges as strings or pairs."""
    try:
        content = read_json(path)
        model = content["model"]
        if model["type"] != "BPE":
            raise UnusableInput(f"{path}: want byte-level BPE, got {model['type']}")
        _check_plain(path, content)
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        vocabulary = dict(model["vocab"])
        for token in content["added_tokens"]:
            vocabulary[token["content"]] = token["id"]
        name = _name_of_pattern(content["pre_tokenizer"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UnusableInput(f"{path}: not as expected: {type(error).__name__} {error}") from None
    if name is None:
        raise UnusableInput(f"{path}: pre_tokenizer: an unknown pattern of words")
    return make_encoding(_read_ranks(path, vocabulary, merges), name)


def _name_of_pattern(words: dict) -> str | None:
    """Return the name of the pattern that a pre_tokenizer splits by, or None for an unknown one."""
    if words["type"] == "ByteLevel":
        return "gpt2" if words.get("use_regex", True) and not words["add_prefix_space"] else None
    parts = words["pretokenizers"]
    if [part["type"] for part in parts] != ["Split", "ByteLevel"]:
        return None
    split, byte_level = parts
    if split["behavior"] != "Isolated" or split["invert"]:
        return None
    if byte_level.get("use_regex", True) or byte_level["add_prefix_space"]:
        return None
    for name, pattern in PATTERNS.items():
        if split["pattern"].get("Regex") == pattern:
            return name
    return None


def _check_plain(path: Path, content: dict) -> None:
    """Raise UnusableInput for anything in a tokenizer.json that changes ids, and that we lack."""
    model = content["model"]
    for name in ("normalizer", "truncation", "padding"):
        if content.get(name) is not None:
            raise UnusableInput(f"{path}: {name}: want none, got {str(content[name])[:60]}")
    after = content.get("post_processor") or {"type": "ByteLevel"}
    for part in after.get("processors", [after]):
        is_plain = part["type"] == "TemplateProcessing" and part["special_tokens"] == {}
        if part["type"] != "ByteLevel" and not is_plain:
            raise UnusableInput(f"{path}: post_processor: {part['type']} adds tokens")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback",
                 "ignore_merges"):
        if model.get(name):
            raise UnusableInput(f"{path}: model: {name} = {model[name]!r} is not supported")


def _check_tokenizer_config(path: Path) -> None:
    """Raise UnusableInput for settings of tokenizer_config.json that change ids in other ways."""
    if not path.exists():
        return
    settings = read_json(path)
    for name in ("add_prefix_space", "add_bos_token", "add_eos_token", "do_lower_case"):
        if settings.get(name):
            raise UnusableInput(f"{path}: {name} = {settings[name]!r} is not supported")


def _read_ranks(path: Path, vocabulary: dict, merges: list) -> dict[bytes, int]:
    """Return token bytes to id, after checking the order: bytes, merges, end-of-text."""
    letters = _byte_letters()
    byte_ids = [vocabulary.get(letter) for letter in letters]
    if any(i not in byte_ids for i in range(256)):
        raise UnusableInput(f"{path}: want the ids 0 to 255 for the 256 bytes")
    if any(type(i) is not int for i in vocabulary.values()):
        raise UnusableInput(f"{path}: want integers as ids")
    following = 256
    for pair in merges:
        if len(pair) != 2 or not all(isinstance(token, str) for token in pair):
            raise UnusableInput(f"{path}: merges: want two tokens, got {pair}")
        token = pair[0] + pair[1]
        if not set(token) <= letters.keys():
            raise UnusableInput(f"{path}: {token!r} is no string of bytes")
        # several merges in a row may produce the same token
        if vocabulary.get(token) == following:
            following += 1
        elif vocabulary.get(token) != following - 1:
            raise UnusableInput(f"{path}: want the id {following} for the token {token!r}, as in "
                                f"the merges, got {vocabulary.get(token)}")
    if vocabulary.get(END) != following:
        raise UnusableInput(f"{path}: want {END} as the last token, with the id {following}, got "
                            f"{vocabulary.get(END)}")
    if len(vocabulary) != following + 1:
        raise UnusableInput(f"{path}: {len(vocabulary)} tokens, but the merges make "
                            f"{following + 1}")
    ranks = {}
    for token, rank in vocabulary.items():
        if token != END:
            ranks[bytes(letters[letter] for letter in token)] = rank
    return ranks


def save_tokenizer(encoding: tiktoken.Encoding, folder: str | Path, max_length: int | None = None
                   ) -> None:
    """Write tokenizer.json, as transformers reads it; for GPT-2's pattern also its two old files.

    max_length is the largest number of tokens of the model.

    tiktoken merges any two adjacent tokens whose joint bytes are a token. Hugging Face merges only
    listed pairs. So we list all splits of each token into two tokens, in the order of its id.
    """
    letter_of = {byte: letter for letter, byte in _byte_letters().items()}
    vocabulary = {}
    for token in sorted(encoding.token_byte_values(), key=encoding.encode_single_token):
        text = "".join(letter_of[byte] for byte in token)
        vocabulary[text] = encoding.encode_single_token(token)
    merges = []
    for text in vocabulary:
        for cut in range(1, len(text)):
            if text[:cut] in vocabulary and text[cut:] in vocabulary:
                merges.append([text[:cut], text[cut:]])
    vocabulary[END] = encoding.eot_token
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PATTERNS[encoding.name]},
             "behavior": "Isolated", "invert": False}
    content = {
        "version": "1.0",
        "added_tokens": [{"id": encoding.eot_token, "content": END, "single_word": False,
                          "lstrip": False, "rstrip": False, "normalized": False,
                          "special": True}],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END, "eos_token": END, "unk_token": END, "pad_token": END,
        # prompts of a batch end together, so that responses begin together
        "padding_side": "left",
        # GPT-2 has no token types; if transformers 4 returned some, it would add their embeddings
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    if max_length is not None:
        settings["model_max_length"] = max_length
    files = {"tokenizer.json": json.dumps(content), "tokenizer_config.json": json.dumps(settings)}
    if encoding.name == "gpt2":
        # these files hold one merge for each token
        one = {left + right: f"{left} {right}" for left, right in reversed(merges)}
        lines = [one[token] for token in vocabulary if token in one]
        files["vocab.json"] = json.dumps(vocabulary)
        files["merges.txt"] = "\n".join(["#version: 0.2", *lines]) + "\n"
    for name, text in files.items():
        Path(folder, name).write_text(text, encoding="utf-8")


def _byte_letters() -> dict[str, int]:
    """Return the characters that GPT-2's files use for the 256 bytes, and the byte of each.

    Printable bytes stand for themselves, the others are written as U+0100 and following.
    """
    letters = {}
    others = 0
    for byte in range(256):
        if chr(byte).isprintable() and chr(byte) != " ":
            letters[chr(byte)] = byte
        else:
            letters[chr(256 + others)] = byte
            others += 1
    return letters
