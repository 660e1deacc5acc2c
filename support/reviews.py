"""Reviews: the built-in ones, made by a grammar, and your own, read from a folder."""
import math
import random
import re
from pathlib import Path

from support.files import UnusableInput, read_text

Review = tuple[str, int]                                # text, label: 1 positive, 0 negative

MIN_REVIEWS = 100                                       # of each label in a folder
LONGEST = 2000                                          # characters of a review that are used
LINE_BREAK = re.compile(r"<\s*/?\s*br\b[^>]*>", re.IGNORECASE)      # <br>, <BR clear="all">, ...

# the grammar of the built-in reviews
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
# words of praise and complaint by their strength, from +3 to -3
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
    """Return short film reviews, made by a small grammar that was written for this project.

    Its mood makes praise or complaint more probable in each comment of a review; most mix both. The
    label is 1 with log-odds 1.2 · strength, the sum over the comments, so it is a little noisy.
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
    """Return one review and its strength: an opening, then two comments."""
    mood = rng.choice([-1.0, -0.4, 0.0, 0.4, 1.0])
    opening = rng.random()
    before = 0.0                                        # strength of the previous part
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
    """Return a random word or phrase of each list, joined by spaces."""
    return " ".join(rng.choice(part) for part in parts)


def _comment(rng: random.Random, mood: float) -> tuple[str, float]:
    """Return one comment and its strength."""
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
    """Return a phrase of the table and its strength; a good mood prefers strong praise."""
    phrases = []
    weights = []
    for strength, group in table.items():
        for phrase in group.split("|"):
            phrases.append((phrase, strength))
            weights.append(math.exp(mood * strength / 1.5))
    return rng.choices(phrases, weights)[0]


def load_reviews(folder: str | Path, labelled: bool = True) -> list[Review]:
    """Return the reviews of a folder, each once: pos.txt and neg.txt with one review a line, or
    pos/*.txt and neg/*.txt with one review a file (the layout of IMDB's train folder).

    Without labels, texts.txt with one text a line is enough. Raises UnusableInput.
    """
    root = Path(folder)
    labels = {"pos": 1, "neg": 0}
    for name in ("prompts", "texts"):                   # the first is an old name
        if not labelled and (root / f"{name}.txt").exists():
            labels = {name: 0}
    reviews = {}                                        # by what repeated texts have in common
    for name, label in labels.items():
        before = len(reviews)
        for text in _read_texts(root, name):
            reviews.setdefault(text.casefold(), (text, label))
        count = len(reviews) - before
        if count < MIN_REVIEWS:
            raise UnusableInput(f"--data {folder}: want at least {MIN_REVIEWS} different texts in "
                                f"{name}, got {count}")
    return list(reviews.values())


def _read_texts(root: Path, name: str) -> list[str]:
    """Return the texts of one label, none of them empty."""
    lines = list(root.glob(f"{name}.txt"))
    files = sorted(root.glob(f"{name}/[!.]*.txt"))      # without hidden files
    if bool(lines) == bool(files):
        raise UnusableInput(f"--data {root}: want a folder with either {name}.txt, a text a line, "
                            f"or {name}/*.txt, a text a file; with --reward, texts.txt is enough")
    texts = [read_text(file) for file in files]
    if lines:
        # not splitlines: it also splits at form feeds, and at other characters within a line
        texts = read_text(lines[0]).split("\n")
    texts = [normalise(text)[:LONGEST] for text in texts]
    return [text for text in texts if text]


def normalise(text: str) -> str:
    """Replace HTML line breaks and white space by single spaces, without any at the ends."""
    return " ".join(LINE_BREAK.sub(" ", text).split())
