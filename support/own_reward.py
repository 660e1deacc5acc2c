"""--reward FILE.py: a reward function of the user's own, on texts."""
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import tiktoken
import torch
from torch import Tensor

from support.code import read_source, syntax
from support.errors import UnusableInput
from support.tokenizer import decode

read_source(__file__)

BATCH = 1024                                            # texts in one call
LARGEST = 1e100                                         # reward


class RewardFile(NamedTuple):
    """A file that defines reward(prompts: list[str], responses: list[str]) -> numbers."""
    path: Path
    source: str                                         # as it was when it was loaded
    function: Callable

    def depends_on(self) -> str:
        """Return what rewards are kept under: the file's code, without comments and docstrings."""
        return syntax(self.source)


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
    sys.modules["reward_file"] = module                 # some libraries look up a class's module
    sys.path.append(str(path.parent))                   # it may import files next to it
    try:
        exec(compile(content, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise _fault(path, error) from None
    function = getattr(module, "reward", None)
    if not callable(function):
        raise UnusableInput(f"--reward {path}: want a function reward(prompts, responses)")
    return RewardFile(path, content.decode("utf-8", "replace"), function)


def try_reward(file: RewardFile, encoding: tiktoken.Encoding, tokens: Tensor, prompt_tokens: int
               ) -> None:
    """Ask for the rewards of the first two texts (R, T), so that a fault shows before any work."""
    prompt = tokens[:2, :prompt_tokens]
    response = tokens[:2, None, prompt_tokens:]
    reward_of_texts(file, encoding, prompt, response)


def reward_of_texts(file: RewardFile, encoding: tiktoken.Encoding, prompt: Tensor,
                    response: Tensor) -> Tensor:
    """Return the rewards (P, K), in float64, of token ids: prompts (P, T), responses (P, K, L).

    The function gets at most 1,024 pairs of texts at a time. End-of-text is removed, and bytes that
    are not UTF-8 become U+FFFD.
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
    """Return the rewards of one batch, checked and converted to float."""
    try:
        found = file.function(list(prompts), list(responses))
        # a dictionary, a set or a string can be iterated as well
        iterable = hasattr(found, "__iter__") or hasattr(found, "__getitem__")
        if isinstance(found, (dict, set, str, bytes)) or not iterable:
            raise TypeError(f"want a sequence of numbers, got a {type(found).__name__}")
        found = list(found)
    except (Exception, SystemExit) as error:
        raise _fault(file.path, error) from None
    if len(found) != len(responses):
        raise UnusableInput(f"--reward {file.path}: want {len(responses)} numbers, got "
                            f"{len(found)}")
    return [_number(file.path, x) for x in found]


def _number(path: Path, x: object) -> float:
    """Convert a bool, int, float or one-element tensor to float."""
    try:
        x = x.item() if hasattr(x, "item") else x
    except (RuntimeError, ValueError):                  # more than one number
        pass
    # not nan, not infinite, and small enough that its square is a finite float
    if isinstance(x, (bool, int, float)) and abs(x) <= LARGEST:
        return float(x)
    raise UnusableInput(f"--reward {path}: want finite numbers, got {str(x)[:60]!r}; the largest "
                        f"is {LARGEST:g}")


def _fault(path: Path, error: BaseException) -> UnusableInput:
    """Describe an exception in the file in one line, with the innermost line of that file."""
    line = getattr(error, "lineno", None)               # of a syntax error
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == str(path):
            line = frame.lineno
    place = path if line is None else f"{path}:{line}"
    text = " ".join(str(error).split())
    return UnusableInput(f"--reward: {type(error).__name__}: {text} ({place})")


def count_rewards(settings: dict, text, n: int) -> int:
    """Return how many responses a run judges in all, if no stage is finished yet."""
    prompts = len(text.prompts)
    held_out = len(text.held_prompts)
    tried = 2
    sampled = prompts * settings["m"] + 2 * held_out * settings["m_eval"]
    trained = settings["steps"] * min(settings["batch"], prompts) * settings["k"]
    evaluated = held_out * settings["k_eval"]
    shown = min(8, held_out) * (1 + n + 1)                      # in samples.txt
    return tried + sampled + trained + evaluated + shown
