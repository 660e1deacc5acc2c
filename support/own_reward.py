"""--reward FILE.py: a reward function of the user's own, on texts."""
import ast
import contextlib
import importlib
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

import numpy
import tiktoken
import torch
from torch import Tensor

from support.files import UnusableInput, read_text
from support.kept import digest
from support.tokenizer import decode

BATCH = 1024                                            # pairs of texts in one call
LARGEST = 1e100                                         # absolute value; its square is finite
MODULE = "own_reward_file"                              # the name under which a file is imported
# functions that return what a file must leave as it is, and those that set it
STATE = {torch.get_default_dtype: torch.set_default_dtype,
         torch.get_default_device: torch.set_default_device,
         torch.is_grad_enabled: torch.set_grad_enabled,
         os.getcwd: os.chdir}


class RewardFile:
    """A file that defines reward(prompts: list[str], responses: list[str]) -> numbers."""

    def __init__(self, path: str | Path):
        """Import the file. Raises UnusableInput, one line, for whatever goes wrong in it."""
        self.path = Path(path)
        self.absolute_path = str(self.path.resolve())
        self.source = read_text(self.path)
        # Processes that the file starts import it by its name, which may be taken, or be no name of
        # a module. So the file is imported as another module, which runs the source as it was read.
        self.folder = tempfile.TemporaryDirectory()
        code = (f"__file__ = {self.absolute_path!r}\n"
                f"exec(compile({self.source!r}, __file__, 'exec'))\n")
        Path(self.folder.name, f"{MODULE}.py").write_text(code, encoding="utf-8")
        sys.path.insert(0, self.folder.name)
        sys.path.append(os.path.dirname(self.absolute_path))        # for files next to it
        sys.modules.pop(MODULE, None)
        with self._guard():
            module = importlib.import_module(MODULE)
        self.function = getattr(module, "reward", None)
        self.declared = getattr(module, "DEPENDS_ON", None)
        if not callable(self.function):
            raise UnusableInput(f"--reward {path}: want a function reward(prompts, responses)")

    def depends_on(self) -> list:
        """Return what rewards are kept under: the code of the file, and its DEPENDS_ON, if any."""
        return [ast.dump(ast.parse(self.source)), repr(self.declared)]

    def ask(self, prompts: list[str], responses: list[str]) -> list[float]:
        """Return the rewards of one batch. Raises UnusableInput as above."""
        with self._guard():
            return _floats(self.function(list(prompts), list(responses)), len(responses))

    @contextlib.contextmanager
    def _guard(self):
        """Raise UnusableInput for exceptions of the file. Undo and refuse changes of STATE."""
        before = {get: get() for get in STATE}
        try:
            yield
        except (Exception, SystemExit) as error:
            fault = describe_fault(error, self.path, self.absolute_path)
            raise UnusableInput(f"--reward {fault}") from None
        finally:
            changed = [get for get in STATE if get() != before[get]]
            for get in changed:
                STATE[get](before[get])
        if changed:
            name = STATE[changed[0]].__name__
            raise UnusableInput(f"--reward {self.path}: it calls {name} and does not undo it")


def describe_fault(error: BaseException, path: str | Path, filename: str) -> str:
    """Return an exception in one line, with the innermost line of a file that was compiled under
    this filename."""
    place = path
    if isinstance(error, SyntaxError):
        place = f"{path}:{error.lineno}"
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == filename:
            place = f"{path}:{frame.lineno}"
    text = " ".join(str(error).split())
    return f"{place}: {type(error).__name__}: {text}"


def _floats(found: object, count: int) -> list[float]:
    """Return what a reward function returned as floats. Raises TypeError or ValueError."""
    # arrays, tensors and columns of tables become lists; a masked value becomes None
    if hasattr(found, "tolist"):
        found = found.tolist()
    if isinstance(found, (list, tuple)):
        found = [x.item() if isinstance(x, Tensor) else x for x in found]
    numbers = numpy.array(found)
    # a dictionary, a set or None is one object for numpy, of shape ()
    if numbers.shape != (count,) or numbers.dtype.kind not in "biufO":
        raise TypeError(f"want {count} numbers, got shape {numbers.shape}: {str(found)[:60]}")
    numbers = numbers.astype(float)
    wrong = numbers[~(abs(numbers) <= LARGEST)]         # also nan
    if len(wrong) > 0:
        raise ValueError(f"want finite numbers up to {LARGEST:g}, got {wrong[0]}")
    return numbers.tolist()


class OwnReward:
    """The reward function of a file, as a function of token ids."""

    def __init__(self, file: RewardFile, encoding: tiktoken.Encoding, cache: Path):
        self.file = file
        self.encoding = encoding
        # Each reward is written down at once: the next one may fail after hours.
        self.journal = cache / f"judged-{digest(file)}.jsonl"
        self.journal.touch()
        self.known = {}
        for line in self.journal.read_bytes().split(b"\n"):
            # a process that was killed may have left a part of a line
            with contextlib.suppress(ValueError):
                prompt, response, reward = json.loads(line)
                self.known[prompt, response] = reward

    def depends_on(self) -> tuple:
        """Return what its rewards are kept under."""
        return self.file, self.encoding

    def try_out(self, tokens: Tensor, prompt_tokens: int) -> None:
        """Ask for rewards of a few texts (R, T), so that a fault shows before any work."""
        self(tokens[:8, :prompt_tokens], tokens[:8, None, prompt_tokens:])

    def __call__(self, prompt: Tensor, response: Tensor) -> Tensor:  # (P, T), (P, K, L) -> (P, K)
        """Return the rewards, in float64. Bytes that are not UTF-8 become U+FFFD in the texts."""
        K = response.shape[1]
        prompts = [decode(self.encoding, ids) for ids in prompt.repeat_interleave(K, 0).tolist()]
        responses = [decode(self.encoding, ids) for ids in response.flatten(0, 1).tolist()]
        pairs = list(zip(prompts, responses))
        unknown = [pair for pair in dict.fromkeys(pairs) if pair not in self.known]
        for start in range(0, len(unknown), BATCH):
            part = unknown[start:start + BATCH]
            rewards = self.file.ask([pair[0] for pair in part], [pair[1] for pair in part])
            self.known.update(zip(part, rewards))
            # in one piece, and on a new line, since the last one may lack its end
            lines = [f"\n{json.dumps([*pair, self.known[pair]])}" for pair in part]
            with open(self.journal, "a", encoding="utf-8") as journal:
                journal.write("".join(lines))
        rewards = [self.known[pair] for pair in pairs]
        return torch.tensor(rewards, dtype=torch.float64, device=response.device).view(-1, K)
