"""reward.py: the reward, a sentiment classifier; then the reviews it learns from, and their tokens.

A reward is a function of prompt (P, T) and response (P, K, L) that returns numbers (P, K). vBoN
needs no gradient of it, and sees only how it ranks responses. Here it is the logit of "positive" of
a classifier. The sections after the classifier make the experiment possible, but have nothing to do
with vBoN: skip them on a first reading.
"""
import json
import math
import random
import re
import sys
import traceback
import types
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import tiktoken
import torch
import torch.nn.functional as functional
from tiktoken_ext.openai_public import r50k_pat_str
from torch import Tensor, nn

from model import PRETRAINED, UnusableInput, read_json, response_mask

Review = tuple[str, int]                                # text, label: 1 positive, 0 negative

# ----------------------------------------------------------------------------------- the classifier

class Classifier(nn.Module):
    """Logistic regression on the tokens of a text.

    The logit is the sum of the tokens' weights plus a bias. The sum is divided by the square root
    of the number of tokens, so that it does not simply grow with the length.
    """

    def __init__(self, vocab_size: int):
        super().__init__()
        self.eot = vocab_size - 1
        self.weight = nn.Embedding(vocab_size, 1)
        self.bias = nn.Parameter(torch.zeros(1))
        nn.init.zeros_(self.weight.weight)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B,)
        """The logit of "positive" of each text; texts are padded with end-of-text."""
        counts = response_mask(tokens, self.eot)
        weight = self.weight(tokens)[..., 0]            # (B, T)
        total = (weight * counts).sum(1)
        return total / counts.sum(1).sqrt() + self.bias

    @torch.no_grad()
    def reward(self, prompt: Tensor, response: Tensor) -> Tensor:  # (P, T), (P, K, L) -> (P, K)
        """The logit of prompt and response together."""
        P, K, L = response.shape
        each_prompt = prompt.repeat_interleave(K, 0)
        each_response = response.view(P * K, L)
        text = torch.cat([each_prompt, each_response], 1)
        return self(text).view(P, K)


def train_classifier(tokens: Tensor, labels: Tensor, vocab_size: int, epochs: int,
                     generator: torch.Generator) -> Classifier:
    """Fit a classifier to texts (R, T), padded with end-of-text, and labels (R,), 0 or 1."""
    model = Classifier(vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03, weight_decay=0.1)
    for _ in range(epochs):
        order = torch.randperm(len(tokens), generator=generator)
        for rows in order.split(256):
            logit = model(tokens[rows])
            loss = functional.binary_cross_entropy_with_logits(logit, labels[rows].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model

# ----------------------------------------------------------------------------- the built-in reviews

WHO = "i|we|my sister|my brother|my wife|my husband|our film club|the whole family".split("|")
DID = "watched|saw|rented|caught|finished".split("|")
FILM = "this|this film|this movie|it|the film".split("|")
WHEN = ("last night|on a plane|at home|on tv|with friends|in one sitting|twice|on a rainy day|"
        "at a festival|by accident|after work|on a train|late at night|with my parents").split("|")
KIND = ("this film|this movie|this drama|this comedy|this thriller|this western|the sequel|"
        "the remake").split("|")
PLOT = "is about|follows|tells of".split("|")
HERO = ("a boxer|a nurse|two brothers|a small town|a lost dog|a bank robbery|a retired spy|"
        "a school band|a lonely king|a young cook|a ghost|a wedding").split("|")
ASPECT = ("acting|script|plot|story|music|score|ending|pacing|camera work|dialogue|lead actor|cast|"
          "humour|villain|romance|final scene|hero|opening|editing|mood|setting|twist|direction|"
          "suspense").split("|")
SEEMED = "is|was|felt|seemed|proved|remained".split("|")
DEGREE = {"": 1.0, "really ": 1.3, "very ": 1.3, "quite ": 0.8, "a bit ": 0.5}
# words of praise and complaint under their strength, from +3 to -3
QUALITY = {3: "flawless|superb|wonderful|brilliant",
           2: "moving|great|charming|funny|gripping|clever", 1: "good|solid|decent|pleasant",
           -1: "slow|thin|uneven|flat", -2: "weak|bad|dull|clumsy|tired|boring",
           -3: "terrible|awful|dreadful|painful"}
FEELING = {3: "loved|adored", 2: "enjoyed", 1: "liked", -1: "did not get", -2: "disliked",
           -3: "hated|could not stand"}
VERDICT = {3: "a joy from start to finish|worth every minute",
           2: "i would see it again|go and see it", 1: "i smiled a lot|not bad at all",
           -1: "i expected more|nobody laughed", -2: "i nearly fell asleep|not worth a ticket",
           -3: "what a waste of time|save your money"}


def builtin_reviews(count: int, seed: int) -> list[Review]:
    """Short film reviews from a small grammar, written for this project.

    Each review has a mood, which tilts every choice between praise and complaint: most reviews mix
    both. The label is a coin whose log-odds are 1.2 times the review's strength: a little noisy.
    """
    rng = random.Random(f"reviews/{seed}")
    reviews = []
    for _ in range(count):
        text, strength = _review(rng)
        chance = 1 / (1 + math.exp(-1.2 * strength))
        label = int(rng.random() < chance)
        reviews.append((text, label))
    return reviews


def _review(rng: random.Random) -> tuple[str, float]:
    """One review and its strength: an opening, then two comments."""
    mood = rng.choice([-1.0, -0.4, 0.0, 0.4, 1.0])
    opening = rng.random()
    before = 0.0                                        # strength of the part before
    if opening < 0.5:
        text = _phrase(rng, WHO, DID, FILM, WHEN)
    elif opening < 0.75:
        text = _phrase(rng, KIND, PLOT, HERO)
    else:
        text, before = _comment(rng, mood)
    total = before
    for _ in range(2):
        comment, strength = _comment(rng, mood)
        if before == 0 or rng.random() < 0.5:
            text += " . "
        elif strength * before > 0:
            text += " and "
        else:
            text += " but "
        text += comment
        total += strength
        before = strength
    return text + " .", total


def _phrase(rng: random.Random, *parts: list[str]) -> str:
    """One word or phrase of each list."""
    return " ".join(rng.choice(part) for part in parts)


def _comment(rng: random.Random, mood: float) -> tuple[str, float]:
    """One comment and its strength."""
    kind = rng.random()
    if kind < 0.62:
        degree = rng.choices(list(DEGREE), [3, 1, 1, 1, 1])[0]
        word, strength = _graded(rng, QUALITY, mood)
        text = f"the {_phrase(rng, ASPECT, SEEMED)} {degree}{word}"
        return text, strength * DEGREE[degree]
    if kind < 0.82:
        word, strength = _graded(rng, FEELING, mood)
        return f"i {word} the {rng.choice(ASPECT)}", strength
    return _graded(rng, VERDICT, mood)


def _graded(rng: random.Random, table: dict[int, str], mood: float) -> tuple[str, float]:
    """A phrase of the table and its strength; a bright mood prefers strong praise."""
    phrases = []
    weights = []
    for strength, group in table.items():
        for phrase in group.split("|"):
            phrases.append((phrase, strength))
            weights.append(math.exp(mood * strength / 1.5))
    return rng.choices(phrases, weights)[0]

# --------------------------------------------------------------------------------- your own reviews

MIN_REVIEWS = 100                                       # of each label
LONGEST = 2000                                          # characters of a review that are used
LINE_BREAK = re.compile(r"<\s*/?\s*br\s*/?\s*>", re.IGNORECASE)


def load_reviews(folder: str | Path, labelled: bool = True) -> list[Review]:
    """The reviews of a folder, in UTF-8: pos.txt and neg.txt with one review a line, or pos/*.txt
    and neg/*.txt with one review a file (the layout of IMDB's train folder).

    Repeated reviews and HTML line breaks are removed. A text that has both labels is dropped. If no
    labels are needed, prompts.txt will do, one text a line; then all labels are 0.
    Raises UnusableInput, which says what is wanted.
    """
    root = Path(folder)
    if root.is_file():
        raise UnusableInput(f"--data {folder}: a file; give its folder")
    if not root.is_dir():
        raise UnusableInput(f"--data {folder}: no such folder")
    if not labelled and (root / "prompts.txt").is_file():
        texts = list(_read_texts(root, "prompts").values())
        if len(texts) < MIN_REVIEWS:
            raise UnusableInput(f"--data {folder}: {len(texts)} different texts in prompts.txt, "
                                f"want at least {MIN_REVIEWS}")
        return [(text, 0) for text in texts]
    positive = _read_texts(root, "pos")
    negative = _read_texts(root, "neg")
    both = positive.keys() & negative.keys()
    if both:
        print(f"  {len(both)} texts have both labels and are dropped")
    reviews = []
    for name, texts, label in (("pos", positive, 1), ("neg", negative, 0)):
        kept = [text for key, text in texts.items() if key not in both]
        if len(kept) < MIN_REVIEWS:
            raise UnusableInput(f"--data {folder}: {len(kept)} different {name} reviews, "
                                f"want at least {MIN_REVIEWS}")
        reviews += [(text, label) for text in kept]
    return reviews


def _read_texts(root: Path, name: str) -> dict[str, str]:
    """The texts of one label, under the key that makes two of them the same."""
    texts = {}
    one_file = root / f"{name}.txt"
    files = [file for file in sorted((root / name).glob("*.txt")) if file.name[0] != "."]
    if not files and not one_file.is_file():
        raise UnusableInput(f"--data {root}: want {name}.txt, one review a line, or {name}/*.txt, "
                            f"one review a file; with --reward, prompts.txt will do")
    if files:
        found = [_read_text(file) for file in files]
    else:
        found = _read_text(one_file).split("\n")
    for text in found:
        text = LINE_BREAK.sub(" ", text)
        text = " ".join(text.split())[:LONGEST]
        if text:
            texts.setdefault(text.casefold(), text)
    return texts


def _read_text(path: Path) -> str:
    """A text file in UTF-8, without the mark that some editors put at its beginning."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnusableInput(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UnusableInput(f"{path}: {error.strerror}") from None

# ------------------------------------------------------------------- a reward of your own, on texts

BATCH = 1024                                            # texts in one call
LARGEST = 1e100                                         # reward


class RewardFile(NamedTuple):
    """A file that defines reward(prompts: list[str], responses: list[str]) -> numbers."""
    path: Path
    content: bytes                                      # as it was when it was loaded
    function: Callable


def load_reward(path: str | Path) -> RewardFile:
    """Run a file of --reward, and find its function.

    Raises UnusableInput for anything wrong, with the line of the file where it went wrong.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UnusableInput(f"--reward {path}: {error.strerror}") from None
    module = types.ModuleType("reward_file")
    module.__file__ = str(path)
    sys.modules["reward_file"] = module                 # some libraries look a class's module up
    sys.path.append(str(path.parent))                   # it may import its neighbours
    try:
        exec(compile(content, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise _fault(path, error) from None
    function = getattr(module, "reward", None)
    if not callable(function):
        raise UnusableInput(f"--reward {path}: want a function reward(prompts, responses)")
    return RewardFile(path, content, function)


def try_reward(file: RewardFile, encoding: tiktoken.Encoding, tokens: Tensor, prompt_tokens: int
               ) -> None:
    """Ask for the rewards of the first two texts (R, T), so that a fault shows before any work."""
    prompt = tokens[:2, :prompt_tokens]
    response = tokens[:2, None, prompt_tokens:]
    reward_of_texts(file, encoding, prompt, response)


def reward_of_texts(file: RewardFile, encoding: tiktoken.Encoding, prompt: Tensor,
                    response: Tensor) -> Tensor:
    """The rewards (P, K), in float64, of token ids: prompts (P, T), responses (P, K, L).

    The function is given at most 1,024 pairs of texts at a time. End-of-text is removed, and bytes
    that are no text become U+FFFD.
    """
    P, K, L = response.shape
    prompts = [decode(encoding, ids) for ids in prompt.tolist() for _ in range(K)]
    responses = [decode(encoding, ids) for ids in response.view(P * K, L).tolist()]
    numbers = []
    for start in range(0, P * K, BATCH):
        end = start + BATCH
        numbers += _ask(file, prompts[start:end], responses[start:end])
    return torch.tensor(numbers, dtype=torch.float64, device=response.device).view(P, K)


def _ask(file: RewardFile, prompts: list[str], responses: list[str]) -> list[float]:
    """The rewards of one batch, checked: here they become float, whatever they were."""
    try:
        given = file.function(list(prompts), list(responses))
        # a dictionary, a set or a string can be walked through as well
        walkable = hasattr(given, "__iter__") or hasattr(given, "__getitem__")
        if isinstance(given, (dict, set, str, bytes)) or not walkable:
            raise TypeError(f"want a sequence of numbers, got a {type(given).__name__}")
        given = list(given)
    except (Exception, SystemExit) as error:
        raise _fault(file.path, error) from None
    if len(given) != len(responses):
        raise UnusableInput(f"--reward {file.path}: want {len(responses)} numbers, got "
                            f"{len(given)}")
    return [_number(file.path, x) for x in given]


def _number(path: Path, x: object) -> float:
    """A bool, an int, a float, or what holds one, such as a tensor, as a float."""
    try:
        x = x.item() if hasattr(x, "item") else x
    except (RuntimeError, ValueError):                  # more than one number
        pass
    # not nan, not infinite, and so that its square is still a float
    if isinstance(x, (bool, int, float)) and abs(x) <= LARGEST:
        return float(x)
    raise UnusableInput(f"--reward {path}: want finite numbers, got {str(x)[:60]!r}; the largest "
                        f"is {LARGEST:g}")


def _fault(path: Path, error: Exception) -> UnusableInput:
    """An exception in the file, as one line with the innermost line of that file."""
    line = getattr(error, "lineno", None)               # of a syntax error
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == str(path):
            line = frame.lineno
    place = path if line is None else f"{path}:{line}"
    text = " ".join(str(error).split())
    return UnusableInput(f"--reward: {type(error).__name__}: {text} ({place})")

# ---------------------------------------------------------------------------------------- tokenizer

END = "<|endoftext|>"
# Words with their leading space, numbers, punctuation, white space. The classes complement each
# other, so that every string is covered and comes back from its tokens unchanged.
PATTERN = r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"
PATTERNS = {"vbon": PATTERN, "gpt2": r50k_pat_str}


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tiktoken.Encoding:
    """Learn byte-pair merges (Sennrich et al. 2016, arXiv 1508.07909) and return an encoder.

    Ids 0..255 are the bytes. Then come the merges in the order learned: always the most frequent
    pair of neighbours. Then end-of-text. Fewer than `vocab_size` if the text runs out of pairs.
    """
    counts = Counter(word for text in texts for word in re.findall(PATTERN, text))
    # each different word as a list of tokens, at first its bytes
    words = []
    for word, count in counts.items():
        parts = [bytes([b]) for b in word.encode("utf-8")]
        words.append((parts, count))
    ranks = {bytes([b]): b for b in range(256)}
    # how often each pair of neighbours occurs, and in which words
    pairs = Counter()
    where = defaultdict(set)
    for i in range(len(words)):
        _count_pairs(words[i], i, pairs, where)
    while len(ranks) < vocab_size - 1:
        best = max(pairs, key=pairs.get, default=None)
        if not pairs[best]:
            break
        ranks.setdefault(best[0] + best[1], len(ranks))     # known, if made another way too
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
    """Join each occurrence of the pair, from the left, in place."""
    j = 0
    while j < len(parts) - 1:
        if (parts[j], parts[j + 1]) == pair:
            parts[j:j + 2] = [pair[0] + pair[1]]
        j += 1


def make_encoding(ranks: dict[bytes, int], name: str = "vbon") -> tiktoken.Encoding:
    """An encoder from its merges (bytes to id, lower ids are merged first); end-of-text is last.

    The name, "vbon" or "gpt2", says by which pattern a text is cut into words.
    """
    return tiktoken.Encoding(name, pat_str=PATTERNS[name], mergeable_ranks=ranks,
                             special_tokens={END: len(ranks)})


def encode(encoding: tiktoken.Encoding, texts: Iterable[str], length: int) -> Tensor:
    """Ids (R, length): each text cut to `length` tokens, or filled up with end-of-text."""
    table = []
    for text in texts:
        row = encoding.encode_ordinary(text)[:length]
        padding = [encoding.eot_token] * (length - len(row))
        table.append(row + padding)
    return torch.tensor(table)


def decode(encoding: tiktoken.Encoding, ids: list[int]) -> str:
    """The text of ids, without end-of-text."""
    return encoding.decode([i for i in ids if i != encoding.eot_token])

# --------------------------------------------------------------- tokenizers in Hugging Face folders

def pretrained_encoding(source: str | Path) -> tiktoken.Encoding:
    """GPT-2's tokenizer, downloaded by tiktoken, or that of a folder.

    A folder has vocab.json and merges.txt, with GPT-2's pattern, or tokenizer.json, with GPT-2's or
    ours. Raises UnusableInput, which says what is wrong.
    """
    if str(source) in PRETRAINED:
        return tiktoken.get_encoding("gpt2")
    folder = Path(source)
    if not (folder / "vocab.json").exists() and (folder / "tokenizer.json").exists():
        return _read_tokenizer(folder / "tokenizer.json")
    vocabulary = read_json(folder / "vocab.json")
    lines = _read_text(folder / "merges.txt").split("\n")
    if lines[0].startswith("#version"):
        lines = lines[1:]
    merges = [line.split() for line in lines if line.strip()]
    return make_encoding(_read_ranks(folder / "vocab.json", vocabulary, merges), "gpt2")


def _read_tokenizer(path: Path) -> tiktoken.Encoding:
    """The encoder of a tokenizer.json: byte-level BPE only, merges as strings or as pairs."""
    try:
        content = read_json(path)
        model = content["model"]
        if model["type"] != "BPE":
            raise UnusableInput(f"{path}: want byte-level BPE, got {model['type']}")
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        vocabulary = dict(model["vocab"])
        for token in content["added_tokens"]:
            vocabulary[token["content"]] = token["id"]
        words = content["pre_tokenizer"]
        name = None
        if words["type"] == "ByteLevel" and words.get("use_regex", True):
            name = "gpt2"
        for part in words.get("pretokenizers", []):
            for known, pattern in PATTERNS.items():
                if part["type"] == "Split" and part["pattern"].get("Regex") == pattern:
                    name = known
    except (KeyError, TypeError, AttributeError) as error:
        raise UnusableInput(f"{path}: not as expected: {type(error).__name__} {error}") from None
    if name is None:
        raise UnusableInput(f"{path}: pre_tokenizer: an unknown pattern of words")
    return make_encoding(_read_ranks(path, vocabulary, merges), name)


def _read_ranks(path: Path, vocabulary: dict, merges: list) -> dict[bytes, int]:
    """Token bytes to id, checked: first the bytes, then the merges in their order, then the end."""
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
        # several merges in a row may make the same token
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


def save_tokenizer(encoding: tiktoken.Encoding, folder: str | Path) -> None:
    """Write tokenizer.json, as transformers reads it; for GPT-2's pattern also its two old files.

    tiktoken merges any two neighbours whose joint bytes are a token. Hugging Face merges only pairs
    that are listed. So list all splits of each token into two tokens, in the order of its id.
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
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END,
                "clean_up_tokenization_spaces": False}
    files = {"tokenizer.json": json.dumps(content), "tokenizer_config.json": json.dumps(settings)}
    if encoding.name == "gpt2":
        # one merge for each token is what these files hold
        one = {left + right: f"{left} {right}" for left, right in reversed(merges)}
        lines = [one[token] for token in vocabulary if token in one]
        files["vocab.json"] = json.dumps(vocabulary)
        files["merges.txt"] = "\n".join(["#version: 0.2", *lines]) + "\n"
    for name, text in files.items():
        Path(folder, name).write_text(text, encoding="utf-8")


def _byte_letters() -> dict[str, int]:
    """How GPT-2's files write the 256 bytes: printable ones as themselves, others as U+0100 on."""
    letters = {}
    others = 0
    for byte in range(256):
        if chr(byte).isprintable() and chr(byte) != " ":
            letters[chr(byte)] = byte
        else:
            letters[chr(256 + others)] = byte
            others += 1
    return letters
