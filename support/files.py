"""Files that other programs or runs may read at any moment: written completely, or not at all."""
import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from support.processes import rank


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it. Of several processes, the first writes.

    A reader sees the old content or the new one, never a part.
    """
    if rank() != 0:
        return
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
