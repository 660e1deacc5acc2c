"""--reward FILE.py: a reward function of the user's own, on texts."""
import importlib.util
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable
from pathlib import Path

import numpy
import tiktoken
import torch
from torch import Tensor

import ast
from support.kept import digest
from support.files import UnusableInput
from support.journal import Journal
from support.tokenizer import decode


BATCH = 1024                                            # texts in one call
LARGEST = 1e100                                         # reward
OURS = ("vbon", "model", "reward", "train", "support", "experiments")


class RewardFile:
    """A file that defines reward(prompts: list[str], responses: list[str]) -> numbers.

    Raises UnusableInput if the file does not run, with the line where it went wrong.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.source = self.path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UnusableInput(f"--reward {path}: not a Python file in UTF-8") from None
        except OSError as error:
            raise UnusableInput(f"--reward {path}: {error.strerror}") from None
        self.state = None                               # of the process, as the file has set it
        module = self._call(self._load)
        self.function = getattr(module, "reward", None)
        self.declared = getattr(module, "DEPENDS_ON", None)
        if not callable(self.function):
            raise UnusableInput(f"--reward {path}: want a function reward(prompts, responses)")

    def depends_on(self) -> list:
        """Return what rewards are kept under: the file's code without comments and docstrings, and
        its DEPENDS_ON, if it has one."""
        return [ast.dump(ast.parse(self.source)), repr(self.declared)]

    def __str__(self) -> str:
        """Return its path, and what it says it depends on."""
        if self.declared is None:
            return str(self.path)
        return f"{self.path} (depends on {self.declared})"

    def ask(self, prompts: list[str], responses: list[str]) -> list[float]:
        """Return the rewards of one batch, checked and converted to float."""
        found = self._call(self._ask, prompts, responses)
        if len(found) != len(responses):
            raise UnusableInput(f"--reward {self.path}: want {len(responses)} numbers, got "
                                f"{len(found)}")
        return [_number(self.path, x) for x in found]

    def _ask(self, prompts: list[str], responses: list[str]) -> list:
        found = self.function(list(prompts), list(responses))
        _check_sequence(found)
        return list(found)

    def _load(self) -> types.ModuleType:
        """Import the file."""
        # It may import files next to it. Processes that it starts import it by its name.
        sys.path.append(str(self.path.resolve().parent))
        name = self.path.stem
        if _is_taken(name, self.path):
            name = "reward_file"
            folder = tempfile.mkdtemp()
            shutil.copy(self.path, Path(folder, "reward_file.py"))
            sys.path.append(folder)
        module = types.ModuleType(name)
        module.__file__ = str(self.path)
        sys.modules[name] = module
        exec(compile(self.source, str(self.path), "exec"), module.__dict__)
        return module

    def _call(self, function: Callable, *args: object):
        """Call a function of the file, in the state of the process that the file has set.

        Afterwards the process is in our state again. Exceptions become UnusableInput.
        """
        ours = _state()
        if self.state is not None:
            _set_state(self.state)
        try:
            return function(*args)
        except (Exception, SystemExit) as error:
            raise _fault(self.path, error) from None
        finally:
            self.state = _state()
            _set_state(ours)


def _state() -> dict:
    """Return what a file may change for the whole process, and what our numbers depend on."""
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "folder": os.getcwd(),
        "torch": torch.get_rng_state(),
        "numpy": numpy.random.get_state(),
        "python": random.getstate(),
    }


def _set_state(state: dict) -> None:
    """Set what `_state` returned."""
    torch.set_default_dtype(state["dtype"])
    if torch.get_default_device() != state["device"]:       # to set it slows PyTorch down
        torch.set_default_device(state["device"])
    torch.set_grad_enabled(state["gradients"])
    if torch.get_num_threads() != state["threads"]:
        torch.set_num_threads(state["threads"])
    os.chdir(state["folder"])
    torch.set_rng_state(state["torch"])
    numpy.random.set_state(state["numpy"])
    random.setstate(state["python"])


def _is_taken(name: str, path: Path) -> bool:
    """True if importing this name would give another file than this one."""
    if not name.isidentifier():
        return True
    module = sys.modules.get(name)
    if module is not None:
        return getattr(module, "__file__", None) != str(path)
    spec = importlib.util.find_spec(name)
    return spec.origin is None or Path(spec.origin).resolve() != path.resolve()


def hidden_neighbours(path: Path) -> list[str]:
    """Return the files next to a reward file that have the name of a file of ours.

    If the reward file imports such a name, it gets ours.
    """
    folder = path.resolve().parent
    if folder == Path(__file__).parent.parent:
        return []
    return [f"{name}.py" for name in OURS if (folder / f"{name}.py").exists() and name != path.stem]


def try_reward(file: RewardFile, encoding: tiktoken.Encoding, tokens: Tensor, prompt_tokens: int
               ) -> float:
    """Ask for the rewards of a few texts (R, T), so that a fault shows before any work.

    Returns the seconds that one reward takes, without those of the first call.
    """
    for start, end in ((0, 2), (2, 8)):
        prompts = [decode(encoding, ids) for ids in tokens[start:end, :prompt_tokens].tolist()]
        responses = [decode(encoding, ids) for ids in tokens[start:end, prompt_tokens:].tolist()]
        began = time.perf_counter()
        file.ask(prompts, responses)
        seconds = time.perf_counter() - began
    return seconds / len(prompts)


class OwnReward:
    """The reward function of a file, as a function of token ids."""

    def __init__(self, file: RewardFile, encoding: tiktoken.Encoding, cache: Path):
        self.file = file
        self.encoding = encoding
        self.journal = Journal(cache / f"judged-{digest(file)}.bin")

    def try_out(self, tokens, prompt_tokens):
        try_reward(self.file, self.encoding, tokens, prompt_tokens)

    def depends_on(self) -> tuple:
        """Return what its rewards are kept under."""
        return self.file, self.encoding

    def __call__(self, prompt: Tensor, response: Tensor) -> Tensor:
        """Return the rewards (P, K), in float64, of prompts (P, T) and responses (P, K, L).

        The function gets at most 1,024 pairs of texts at a time, each pair once in a run.
        End-of-text is removed, and bytes that are not UTF-8 become U+FFFD.
        """
        P, K, L = response.shape
        prompts = [decode(self.encoding, ids) for ids in prompt.tolist() for _ in range(K)]
        responses = [decode(self.encoding, ids) for ids in response.reshape(P * K, L).tolist()]
        known = self.journal.find(prompts, responses)
        # each unknown pair once, in the order of their appearance
        missing = dict.fromkeys(pair for pair, reward in zip(zip(prompts, responses), known)
                                if reward is None)
        missing = list(missing)
        for start in range(0, len(missing), BATCH):
            part = missing[start:start + BATCH]
            some_prompts = [pair[0] for pair in part]
            some_responses = [pair[1] for pair in part]
            self.journal.add(some_prompts, some_responses,
                             self.file.ask(some_prompts, some_responses))
        rewards = self.journal.find(prompts, responses)
        return torch.tensor(rewards, dtype=torch.float64, device=response.device).view(P, K)


def _check_sequence(found: object) -> None:
    """Raise TypeError unless this is a sequence with one entry for each response."""
    # a dictionary, a set or a string can be iterated as well; iterating a table gives its columns
    iterable = hasattr(found, "__iter__") or hasattr(found, "__getitem__")
    if isinstance(found, (dict, set, str, bytes)) or not iterable or hasattr(found, "columns"):
        raise TypeError(f"want a sequence of numbers, got a {type(found).__name__}")
    dimensions = getattr(found, "ndim", 1)
    if dimensions != 1:
        raise TypeError(f"want one number for each response, got a {type(found).__name__} of shape "
                        f"{tuple(found.shape)}")
    # in a masked array, a missing value would be read as a number
    if numpy.ma.is_masked(found):
        raise TypeError("want one number for each response, got masked values")


def _number(path: Path, x: object) -> float:
    """Convert a bool, int, float or one-element tensor to float."""
    try:
        if getattr(x, "ndim", 0) == 0 and hasattr(x, "item") and not numpy.ma.is_masked(x):
            x = x.item()
    except (RuntimeError, ValueError):                  # a tensor without data
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
