"""Finished stages, kept in files. A stage runs again only if something that it depends on changed.

A file's name is made from the arguments of its stage and the source of the modules that compute its
numbers. A run that was killed continues after the last finished stage or update of fine-tuning.
"""
import ast
import dataclasses
import functools
import gc
import hashlib
import io
import types
from collections.abc import Callable
from pathlib import Path

import tiktoken
import torch
from torch import Tensor, nn

from model import GPT
from support.files import UnusableInput, write_whole

ROOT = Path(__file__).parent.parent
OURS = ("vbon.py", "model.py", "reward.py", "train.py", "support/*.py", "experiments/*.py")


def read_sources() -> dict[str, str]:
    """Return the sources of our modules by name: "vbon", "support.text", ..."""
    sources = {}
    for pattern in OURS:
        for file in sorted(ROOT.glob(pattern)):
            if not file.stem.startswith("test_"):
                name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
                sources[name] = file.read_text(encoding="utf-8")
    return sources


SOURCES = read_sources()                                # once, when the program starts


def check_sources() -> None:
    """Raise UnusableInput if a file was edited since the program started, or other code is loaded.

    Otherwise numbers of the old code could be kept under the name of the new one, or the reverse.
    """
    now = read_sources()
    # all in memory: other modules may hold functions of a file that was loaded again since
    functions = [x for x in gc.get_objects() if type(x) is types.FunctionType]
    ours = [x for x in functions if x.__module__ in SOURCES]
    for name, source in SOURCES.items():
        path = ROOT / (name.replace(".", "/") + ".py")
        loaded = {x.__code__ for x in ours if x.__module__ == name}
        # others are made by a decorator of the standard library
        loaded = {code for code in loaded if Path(code.co_filename) == path}
        if now.get(name) != source or not loaded <= _code_of(source):
            raise UnusableInput(f"{path.name} was edited after its import: restart Python")


def _code_of(source: str) -> set[types.CodeType]:
    """Return the code of all functions in a source."""
    found = [compile(source, "", "exec")]
    for code in found:
        found += [x for x in code.co_consts if isinstance(x, types.CodeType)]
    return set(found)


@functools.cache
def syntax(name: str) -> str:
    """Return the syntax tree of a module: comments and layout do not count."""
    return ast.dump(ast.parse(SOURCES[name]))


def digest(*parts: object) -> str:
    """Return 12 hexadecimal digits that name these contents, today and in another process.

    A model counts by its config, weights and type of device, a tokenizer by its tokens, an object
    with a method `depends_on` by what this returns. Raises TypeError for others.
    """
    total = hashlib.sha256()
    for part in parts:
        _add(total, part)
    return total.hexdigest()[:12]


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
    elif isinstance(part, nn.Module):
        device = next(part.parameters()).device.type
        _add(total, [getattr(part, "config", None), device, part.state_dict()])
    elif isinstance(part, tiktoken.Encoding):
        tokens = {token: part.encode_single_token(token) for token in part.token_byte_values()}
        _add(total, [part.name, tokens])
    elif isinstance(part, types.MethodType):            # such as the reward of a classifier
        _add(total, [part.__self__, part.__name__])
    else:
        raise TypeError(f"the content of a {type(part).__name__} is unknown")


def keep(cache: Path, name: str, stage: Callable[..., dict], *args: object, code: tuple[str, ...],
         resumable: bool = False) -> dict:
    """Return stage(*args), from a file in the folder `cache` if it was made before.

    code: the names of the modules whose code makes the numbers. A resumable stage gets one more
    argument, before the others: the path of a checkpoint, from which it may continue. Models in the
    result are on the CPU.
    """
    key = digest(torch.__version__, [syntax(module) for module in code], args)
    path = cache / f"{name}-{key}.pt"
    checkpoint = path.with_suffix(".checkpoint")
    content = load(path)
    if content is None:
        if resumable:
            args = (checkpoint, *args)
        save(path, stage(*args))
        content = load(path)                            # so that new and kept ones are the same
    checkpoint.unlink(missing_ok=True)
    return content


def save(path: Path, content: dict) -> None:
    """Write tensors, numbers, models, and lists of them, with a checksum in front."""
    plain = {}
    for name, x in content.items():
        if isinstance(x, GPT):
            x = {"config": x.config, "weights": x.state_dict()}
        plain[name] = x
    buffer = io.BytesIO()
    torch.save(plain, buffer)
    checksum = hashlib.sha256(buffer.getbuffer()).digest()
    write_whole(path, checksum + buffer.getvalue())


def load(path: Path) -> dict | None:
    """Return what `save` wrote, on the CPU, or None if it is missing or damaged."""
    if not path.exists():
        return None
    content = path.read_bytes()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        print(f"  damaged, made again: {path}", flush=True)
        return None
    found = torch.load(io.BytesIO(content[32:]), "cpu", weights_only=True)
    for name, x in found.items():
        if isinstance(x, dict) and x.keys() == {"config", "weights"}:
            found[name] = GPT(**x["config"])
            found[name].load_state_dict(x["weights"])
    return found


def save_checkpoint(path: Path, step: int, trained: list[Tensor], optimizer, history: list[dict],
                    seconds: float) -> None:
    """Write all that the next updates of fine-tuning need."""
    save(path, {"step": step, "trained": [p.detach() for p in trained],
                "optimizer": optimizer.state_dict(), "history": history, "seconds": seconds})


def resume(path: Path, trained: list[Tensor], optimizer) -> tuple[int, list[dict], float]:
    """Continue from a checkpoint, if any. Return the finished steps, the history, the seconds."""
    saved = load(path)
    if saved is None:
        return 0, [], 0.0
    for p, x in zip(trained, saved["trained"], strict=True):
        p.data.copy_(x)
    optimizer.load_state_dict(saved["optimizer"])
    print(f"  continuing after step {saved['step']}", flush=True)
    return saved["step"], saved["history"], saved["seconds"]
