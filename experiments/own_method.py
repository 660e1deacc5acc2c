"""own_method.py: a method of your own, in one file: experiments.compare --method vbon FILE.py.

The file defines a target, log π(y) up to a constant for each prompt, which takes the place of
log π_bon in vBoN's update. For example, the highest win rate at its KL, π_ref · exp(5 · win rate):

    import vbon

    def target(rollout, ref_rewards, n):
        return rollout.ref_logprob + 5 * vbon.win_rate(rollout.reward, ref_rewards)

rollout has response (P, K, L), reward and ref_logprob (P, K); n grows to N as for vBoN. Instead of
a target, `gradient(policy, reference, reward_fn, batch, n, settings, generator)` may take the place
of train.vbon_gradient, with the same result: a dict of numbers.

The aim in tables and pictures is the target of M responses of the reference. Where this is not what
the method aims at, `weights(ref_rewards, n)` returns (P, M): π/π_ref of these responses, up to a
constant for each prompt.

A log target of -inf is refused, since its gradient is infinite. For a response that must not occur,
return rollout.ref_logprob - 30: it becomes e^30 times less probable than under the reference.
"""
import ast
import types
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

import vbon
from experiments import theory
from experiments.methods import target_gradient
from support.files import UnusableInput, read_text
from support.kept import digest
from support.own_reward import describe_fault
from train import Method, World


class OwnMethod:
    """A file with a function `target` or `gradient`.

    Raises UnusableInput, with the line of the file, for whatever goes wrong in it.
    """

    def __init__(self, path: str):
        self.path = path
        self.name = Path(path).stem
        self.source = read_text(Path(path))
        self.functions = vars(types.ModuleType(self.name))
        self.call(self.load)
        self.mark = digest(ast.dump(ast.parse(self.source)))    # comments and layout do not count
        if not {"target", "gradient"}.intersection(self.functions):
            raise UnusableInput(f"--method {path}: want a function target(rollout, ref_rewards, n) "
                                f"or gradient; experiments/own_method.py has an example")

    def load(self) -> None:
        """Run the file."""
        exec(compile(self.source, self.path, "exec"), self.functions)

    def call(self, function: Callable, *args: object):
        """Call a function; its exceptions become UnusableInput."""
        try:
            return function(*args)
        except (Exception, SystemExit) as error:
            fault = describe_fault(error, self.path, self.path)
            raise UnusableInput(f"--method {fault}") from None

    def choose_method(self, name: str, n: int, beta: None) -> Method:
        """Return it for train.fine_tune. Another code of the file is another method for `keep`."""
        return Method(f"{name} n={n}", (name, self.mark, n), self.gradient)

    def gradient(self, *args: object) -> dict[str, float]:
        """Call `gradient` of the file, or follow its target; arguments of train.vbon_gradient."""
        if "gradient" not in self.functions:
            return target_gradient(*args, target=self.target, beta=None)
        stats = self.call(self.functions["gradient"], *args)
        if not isinstance(stats, dict):
            raise UnusableInput(f"--method {self.path}: gradient: want a dict of numbers")
        return stats

    def target(self, rollout: vbon.Rollout, ref_rewards: Tensor, n: int, beta: None) -> Tensor:
        """Return the target (P, K) of the file, checked."""
        # rewards in float64 on the CPU, as ref_logprob is
        rollout = rollout._replace(reward=rollout.reward.cpu().double())
        found = self.call(self.functions["target"], rollout, ref_rewards.cpu().double(), n)
        return self.call(checked, "target", found, rollout.reward)

    def find_aim(self, world: World, n: int) -> dict[str, float]:
        """Return what it aims at, as theory.describe_aim; nothing if it is unknown."""
        held_out = world.held_out
        ref_rewards = held_out.reward.cpu().double()
        if "weights" in self.functions:
            weight = self.call(self.functions["weights"], ref_rewards, n)
            weight = self.call(checked, "weights", weight, ref_rewards)
            if weight.min() < 0 or weight.sum(-1).min() <= 0:
                raise UnusableInput(f"--method {self.path}: weights: want none below 0, not all 0")
            weight = weight / weight.sum(-1, keepdim=True)
        elif "target" in self.functions:
            ref_logprob = held_out.logprob.cpu().double()
            rollout = vbon.Rollout(held_out.response, ref_rewards, ref_logprob)
            weight = (self.target(rollout, ref_rewards, n, None) - ref_logprob).softmax(-1)
        else:
            return {}
        return theory.describe_aim(weight, ref_rewards, n)


def checked(name: str, found: object, like: Tensor) -> Tensor:
    """Return what a function has returned, in float64. Raises ValueError for what is unusable."""
    if not isinstance(found, Tensor) or found.shape != like.shape:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"{name}: want a tensor {tuple(like.shape)}, got {got}")
    found = found.detach().cpu().double()
    if not found.isfinite().all():
        raise ValueError(f"{name}: want finite numbers; as the target of a response that must not "
                         "occur, rollout.ref_logprob - 30")
    return found
