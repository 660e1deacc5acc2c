"""Short names for contents: the same content has the same name, today and in another process."""
import dataclasses
import functools
import hashlib
import sys
import types

import tiktoken
import torch
from torch import Tensor

from support.code import code_of_function, code_of_module
from support.files import UnusableInput


def digest(*parts: object) -> str:
    """Return 12 hexadecimal digits that name these contents.

    A tensor counts by its type, shape and values; a model by the code of its class, its config, its
    weights and the type of its device; a tokenizer by its tokens; a function by its code; a tuple,
    list, dictionary or dataclass by what it holds. Raises TypeError for anything whose content is
    unknown.
    """
    total = hashlib.sha256()
    for part in parts:
        _add(total, part)
    return total.hexdigest()[:12]


def weights(model: torch.nn.Module) -> list[Tensor]:
    """Return all weights of a model."""
    return list(model.state_dict().values())


def _add(total, part: object) -> None:
    """Add one content to a sum."""
    if part is None or isinstance(part, (bool, int, float, str, bytes)):
        total.update(repr(part).encode("utf-8") + b";")
    elif isinstance(part, Tensor):
        total.update(f"{part.dtype} {tuple(part.shape)}".encode("utf-8"))
        total.update(part.detach().cpu().contiguous().numpy().tobytes())
    elif hasattr(part, "depends_on"):
        _add(total, part.depends_on())
    elif isinstance(part, (list, tuple)):
        total.update(digest(*part).encode("utf-8"))
    elif isinstance(part, dict):
        _add(total, list(part.items()))
    elif dataclasses.is_dataclass(part):
        _add(total, dataclasses.asdict(part))
    elif isinstance(part, torch.nn.Module):
        device = next(part.parameters()).device.type
        code = code_of_module(type(part).__module__)
        _check_current(type(part))
        _add(total, [code, getattr(part, "config", None), device, weights(part)])
    elif isinstance(part, tiktoken.Encoding):
        tokens = {token: part.encode_single_token(token) for token in part.token_byte_values()}
        _add(total, [part.name, tokens])
    elif isinstance(part, functools.partial):
        _add(total, [part.func, part.args, part.keywords])
    elif isinstance(part, types.MethodType):
        _add(total, [part.__self__, part.__name__])
    elif isinstance(part, types.FunctionType):
        _add(total, code_of_function(part))
    else:
        raise TypeError(f"the content of a {type(part).__name__} is unknown")


def _check_current(kind: type) -> None:
    """Raise UnusableInput for a class of a file that was loaded again since: it has other code."""
    current = getattr(sys.modules[kind.__module__], kind.__name__, kind)
    if current is not kind:
        raise UnusableInput(f"{kind.__module__} was loaded again, but a {kind.__name__} of the old "
                            f"one is in use: restart Python")
