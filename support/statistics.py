"""The mean of a metric, and its error."""
import math

from torch import Tensor

from support.code import read_source

read_source(__file__)


def mean_and_error(x: Tensor) -> tuple[float, float]:  # (P, K) -> mean, standard error
    """Return the mean of a metric, and its standard error over prompts.

    Responses to one prompt are correlated. So each prompt counts as one observation, its mean.
    """
    per_prompt = x.double().mean(1)
    error = per_prompt.std() / math.sqrt(len(per_prompt))
    return per_prompt.mean().item(), error.item()
