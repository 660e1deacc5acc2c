"""reward.py: labelled reviews, their tokens, and a classifier whose logit is the reward.

A reward is anything that maps responses to numbers: a function of prompt (P, T0) and response
(P, K, L) that returns (P, K). vBoN needs no gradient of it, and sees only how it ranks responses.
"""
import math
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import tiktoken
import torch
import torch.nn.functional as F
from tiktoken_ext.openai_public import r50k_pat_str
from torch import Tensor, nn

from model import PRETRAINED
from vbon import response_mask

Review = tuple[str, int]                                    # text, label: 1 positive, 0 negative
MIN_REVIEWS = 100                                           # of each label
LONGEST = 2000                                              # characters of a review that are used

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

    A mood, drawn per review, tilts every choice between praise and complaint, so that most reviews
    mix both. The label is a coin whose log-odds are 1.2 times the total strength: a little noisy.
    """
    rng = random.Random(f"reviews/{seed}")
    reviews = []
    for _ in range(count):
        text, strength = _review(rng)
        reviews.append((text, int(rng.random() < 1 / (1 + math.exp(-1.2 * strength)))))
    return reviews


def _review(rng: random.Random) -> tuple[str, float]:
    """One review and its total strength."""
    mood = rng.choice([-1.0, -0.4, 0.0, 0.4, 1.0])
    opening = rng.random()
    if opening < 0.5:
        text, before = " ".join(map(rng.choice, (WHO, DID, FILM, WHEN))), 0.0
    elif opening < 0.75:
        text, before = " ".join(map(rng.choice, (KIND, PLOT, HERO))), 0.0
    else:
        text, before = _comment(rng, mood)
    total = before
    for _ in range(2):
        comment, strength = _comment(rng, mood)
        agree = " and" if strength * before > 0 else " but"
        text += (" ." if before == 0 or rng.random() < 0.5 else agree) + " " + comment
        before = strength
        total += strength
    return text + " .", total


def _comment(rng: random.Random, mood: float) -> tuple[str, float]:
    """One comment and its strength."""
    kind = rng.random()
    if kind < 0.62:
        degree = rng.choices(list(DEGREE), [3, 1, 1, 1, 1])[0]
        word, strength = _graded(rng, QUALITY, mood)
        return (f"the {rng.choice(ASPECT)} {rng.choice(SEEMED)} {degree}{word}",
                strength * DEGREE[degree])
    if kind < 0.82:
        word, strength = _graded(rng, FEELING, mood)
        return f"i {word} the {rng.choice(ASPECT)}", strength
    return _graded(rng, VERDICT, mood)


def _graded(rng: random.Random, table: dict[int, str], mood: float) -> tuple[str, float]:
    """A phrase of the table and its strength; a bright mood prefers the strong praise."""
    words = [(word, s) for s, group in table.items() for word in group.split("|")]
    return rng.choices(words, [math.exp(mood * s / 1.5) for _, s in words])[0]

# --------------------------------------------------------------------------------- your own reviews

def load_reviews(folder: str) -> list[Review]:
    """The reviews in `folder`, duplicates removed: pos.txt and neg.txt with one review a line, or
    pos/*.txt and neg/*.txt with one review a file (the layout of IMDB's train folder). UTF-8.
    Raises ValueError for anything that cannot be used, and says what is wanted.
    """
    root, reviews = Path(folder), {}
    if not root.is_dir():
        raise ValueError(f"--data {folder}: no such folder")
    for name, label in (("pos", 1), ("neg", 0)):
        files = sorted((root / name).glob("*.txt")) or [root / f"{name}.txt"]
        if not files[0].is_file():
            raise ValueError(f"--data {folder}: want {name}.txt, one review a line, "
                             f"or {name}/*.txt, one review a file")
        before = len(reviews)
        for file in files:
            try:
                text = file.read_text(encoding="utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}: not UTF-8 text (byte {error.start})") from None
            for line in text.split("\n") if file.parent == root else [text]:
                line = " ".join(re.sub(r"<br\s*/?>", " ", line).split())[:LONGEST]
                if line:
                    reviews.setdefault(line.casefold(), (line, label))
        if len(reviews) - before < MIN_REVIEWS:
            raise ValueError(f"--data {folder}: {len(reviews) - before} different {name} reviews, "
                             f"want at least {MIN_REVIEWS}")
    return list(reviews.values())

# ---------------------------------------------------------------------------------------- tokenizer

END = "<|endoftext|>"
# Words with their leading space, numbers, punctuation, white space. The classes complement each
# other, so that every string is covered and comes back from its tokens unchanged.
PATTERN = r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tiktoken.Encoding:
    """Learn byte-pair merges (Sennrich et al. 2016, arXiv 1508.07909) and return an encoder: ids
    0..255 are the bytes, then come the merges in the order learned, then end-of-text; fewer than
    `vocab_size` in all when the text runs out of pairs."""
    counts = Counter(word for text in texts for word in re.findall(PATTERN, text))
    words = [([bytes([b]) for b in word.encode()], count) for word, count in counts.items()]
    ranks = {bytes([b]): b for b in range(256)}
    pairs, where, changed = Counter(), defaultdict(set), range(len(words))
    while True:
        for i in changed:                                  # at first all, then those just merged
            for pair in zip(words[i][0], words[i][0][1:]):
                pairs[pair] += words[i][1]
                where[pair].add(i)
        best = max(pairs, key=pairs.get, default=None)
        if len(ranks) >= vocab_size - 1 or not pairs[best]:
            return make_encoding(ranks)
        ranks.setdefault(b"".join(best), len(ranks))     # known, if made another way too
        changed = where.pop(best)
        for i in changed:
            parts, count = words[i]
            for pair in zip(parts, parts[1:]):
                pairs[pair] -= count
            for j in range(len(parts) - 1):
                if tuple(parts[j:j + 2]) == best:
                    parts[j:j + 2] = [b"".join(best)]


def make_encoding(ranks: dict[bytes, int], pattern: str = PATTERN) -> tiktoken.Encoding:
    """An encoder from its merges: token bytes to id, lower ids merged first."""
    return tiktoken.Encoding("vbon", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={END: len(ranks)})


def pretrained_encoding(source: str) -> tiktoken.Encoding:
    """GPT-2's tokenizer: tiktoken's own, or from merges.txt and vocab.json of a folder."""
    if source in PRETRAINED:
        return tiktoken.get_encoding("gpt2")
    os.environ["TIKTOKEN_CACHE_DIR"] = ""    # else tiktoken may return another folder's files
    try:
        files = [str(Path(source, name)) for name in ("merges.txt", "vocab.json")]
        return make_encoding(tiktoken.load.data_gym_to_mergeable_bpe_ranks(*files), r50k_pat_str)
    except (OSError, ValueError, KeyError, AssertionError) as error:
        raise ValueError(f"{source}: no GPT-2 vocabulary in merges.txt and vocab.json: "
                         f"{type(error).__name__}") from None


def encode(encoding: tiktoken.Encoding, texts: Iterable[str], length: int) -> Tensor:
    """Ids (R, length): each text cut to `length` tokens or filled up with end-of-text."""
    rows = [encoding.encode_ordinary(text)[:length] for text in texts]
    eot = encoding.eot_token
    return torch.tensor([row + [eot] * (length - len(row)) for row in rows])

# ----------------------------------------------------------------------------------- the classifier

class Classifier(nn.Module):
    """Logistic regression on the tokens, the logit of "positive": the sum of their weights over the
    square root of their number, plus a bias. Pairs of tokens would be right some points more often,
    but most that a model writes are in no review: noise to the reward, which no policy can learn.
    """

    def __init__(self, vocab_size: int):
        super().__init__()
        self.eot = vocab_size - 1
        self.weight = nn.Embedding(vocab_size, 1)
        self.bias = nn.Parameter(torch.zeros(1))
        nn.init.zeros_(self.weight.weight)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B,)
        """The logit of each text, padded with end-of-text."""
        mask = response_mask(tokens, self.eot)
        return (self.weight(tokens)[..., 0] * mask).sum(1) / mask.sum(1).sqrt() + self.bias

    @torch.no_grad()
    def reward(self, prompt: Tensor, response: Tensor) -> Tensor:  # (P, T0), (P, K, L) -> (P, K)
        """The logit on prompt and response together, end-of-text included."""
        P, K, _ = response.shape
        tokens = torch.cat([prompt[:, None].expand(P, K, -1), response], -1)
        return self(tokens.flatten(0, 1)).view(P, K)


def train_classifier(tokens: Tensor, labels: Tensor, vocab_size: int, epochs: Iterable[int],
                     generator: torch.Generator) -> Classifier:
    """Fit to reviews (R, T), padded with end-of-text, and labels (R,) in {0, 1}."""
    model = Classifier(vocab_size).to(tokens.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03, weight_decay=0.1)
    for _ in epochs:
        for rows in torch.randperm(len(tokens), generator=generator).split(256):
            rows = rows.to(tokens.device)
            loss = F.binary_cross_entropy_with_logits(model(tokens[rows]), labels[rows].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model
