"""own_method.py: a method of your own, in one file: experiments.compare --method vbon FILE.py.

The file defines a target, log π(y) up to a constant for each prompt, which takes the place of
log π_bon in vBoN's update. For example, the highest win rate at its KL, π_ref · exp(5 · win rate):

    import vbon

    def target(rollout, ref_rewards, n):
        return rollout.ref_logprob + 5 * vbon.win_rate(rollout.reward, ref_rewards)

    def weights(ref_rewards, n):
        return (5 * vbon.win_rate(ref_rewards, ref_rewards)).exp()

rollout has response (P, K, L), reward and ref_logprob (P, K); n grows to N as for vBoN. weights is
optional: the aim, as weights (P, M) of M reference responses with the rewards ref_rewards; they
need not sum to 1. Instead of a target, `gradient(policy, reference, reward_fn, batch, n, settings,
generator)` may take the place of train.vbon_gradient, with the same result: a dict of numbers.

A log target of -inf is refused: its gradient is infinite. For a response that must not occur, return
rollout.ref_logprob - 30: then it is e^30 times less probable than under the reference.
"""
import ast
import traceback
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import vbon
from experiments.methods import target_gradient
from support.kept import digest
from support.files import UnusableInput, read_text
from train import Method


class OwnMethod:
    """A file with a function `target` or `gradient`, and perhaps `weights`.

    Raises UnusableInput, with the line of the file, for whatever goes wrong in it.
    """

    def __init__(self, path: str):
        self.path = path
        self.name = Path(path).stem
        self.source = read_text(Path(path))
        self.module = types.ModuleType(self.name)
        self.call(self.load)
        self.mark = digest(ast.dump(ast.parse(self.source)))    # comments and layout do not count
        if not hasattr(self.module, "target") and not hasattr(self.module, "gradient"):
            raise UnusableInput(f"--method {path}: want a function target(rollout, ref_rewards, n), "
                                f"or gradient; experiments/own_method.py has an example")

    def load(self) -> None:
        """Run the file."""
        exec(compile(self.source, self.path, "exec"), self.module.__dict__)

    def call(self, function: Callable, *args: object):
        """Call a function of the file; its exceptions become UnusableInput."""
        try:
            return function(*args)
        except (Exception, SystemExit) as error:
            line = getattr(error, "lineno", None)               # of a syntax error
            for frame in traceback.extract_tb(error.__traceback__):
                if frame.filename == self.path:
                    line = frame.lineno
            raise UnusableInput(f"--method {self.path}:{line}: {type(error).__name__}: "
                                f"{error}") from None

    def method(self, n: int) -> Method:
        """Return it for train.fine_tune. Another code of the file is another method for `keep`."""
        return Method(f"{self.name} n={n}", (self.name, self.mark, n), self.gradient)

    def gradient(self, *args: object) -> dict[str, float]:
        """Call `gradient` of the file, or follow its target; arguments of train.vbon_gradient."""
        if hasattr(self.module, "gradient"):
            stats = self.call(self.module.gradient, *args)
            if not isinstance(stats, dict):
                raise UnusableInput(f"--method {self.path}: gradient: want a dict of numbers")
            return stats
        return target_gradient(*args, target=self.target, beta=None)

    def target(self, rollout: vbon.Rollout, ref_rewards: Tensor, n: int, beta: None) -> Tensor:
        """Return the target (P, K) of the file, checked."""
        found = self.call(self.module.target, rollout, ref_rewards, n)
        found = self.check("target", found, rollout.reward.shape)
        if not found.isfinite().all():
            raise UnusableInput(f"--method {self.path}: target: want finite log-probabilities; for "
                                f"a response that must not occur, give rollout.ref_logprob - 30")
        return found

    def weights(self, ref_rewards: Tensor, n: int) -> Tensor | None:
        """Return the aim as weights (P, M) that sum to 1 for each prompt; None if unknown."""
        if not hasattr(self.module, "weights"):
            return None
        found = self.check("weights", self.call(self.module.weights, ref_rewards, n),
                           ref_rewards.shape)
        total = found.sum(-1, keepdim=True)
        if not (found >= 0).all() or not (total > 0).all() or not total.isfinite().all():
            raise UnusableInput(f"--method {self.path}: weights: want numbers >= 0, not all 0")
        return found / total

    def check(self, name: str, found: object, shape: torch.Size) -> Tensor:
        """Return what a function of the file has returned in float64, if it has this shape."""
        if not isinstance(found, Tensor) or found.shape != shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UnusableInput(f"--method {self.path}: {name}: want a tensor {tuple(shape)}, got "
                                f"{got}")
        return found.detach().cpu().double()
