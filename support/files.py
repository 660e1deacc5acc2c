"""Files: read with a clear message, written completely or not at all."""
import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


class UnusableInput(ValueError):
    """A user's input cannot be used. The message says in one line what is wrong and what is wanted.

    The programs print the message without a traceback and exit with status 2.
    """


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, without the byte-order mark that some editors write.

    Raises UnusableInput if the file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnusableInput(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UnusableInput(f"{path}: {error.strerror}") from None


def read_json(path: Path) -> dict:
    """Return the object in a JSON file. Raises UnusableInput if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnusableInput(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UnusableInput(f"{path}: not a JSON file") from None
    if not isinstance(content, dict):
        raise UnusableInput(f"{path}: want a JSON object")
    return content


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it.

    A reader sees the old content or the new one, never a part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Let one process at a time change the results in this folder; waits for the others.

    The operating system releases the lock when its process ends. On a file system without locks,
    continue without one.
    """
    path = folder / "cache" / "results.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    # open to read: the file may be a colleague's
    file = os.open(path, os.O_RDONLY | os.O_CREAT, 0o666)
    try:
        _wait_for_lock(file)
    except OSError:                                     # some network file systems have no locks
        pass
    try:
        yield
    finally:
        os.close(file)


def _wait_for_lock(file: int) -> None:
    """Return once no other process holds the lock of this file."""
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX)
    except ImportError:                                 # Windows
        import msvcrt
        msvcrt.locking(file, msvcrt.LK_LOCK, 1)


def check_writable(folder: Path) -> None:
    """Make the folder and its cache, and try to write into both. Raises OSError.

    A .gitignore keeps results out of the user's repository.
    """
    for place in (folder, folder / "cache"):
        place.mkdir(parents=True, exist_ok=True)
        part = place / f"{uuid.uuid4().hex}.part"
        part.write_bytes(b"")
        part.unlink()
    ignored = folder / ".gitignore"
    if not ignored.exists():
        ignored.write_text("*\n", encoding="utf-8")


def replace_folder(new: Path, folder: Path) -> None:
    """Put the folder `new` in the place of an older one, or of none. Both are on one disk."""
    if not folder.exists():
        new.replace(folder)
        return
    old = new.with_name(f"{new.name}.old")
    folder.replace(old)
    new.replace(folder)
    shutil.rmtree(old)
