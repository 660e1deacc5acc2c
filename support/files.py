"""Files: read with a clear message, written completely or not at all."""
import json
import uuid
from pathlib import Path


class UnusableInput(ValueError):
    """A user's input cannot be used. The message says in one line what is wrong, and what to do."""


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, without a byte-order mark. Raises UnusableInput."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnusableInput(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UnusableInput(f"{path}: {error.strerror}") from None


def read_json(path: Path) -> dict:
    """Return the object in a JSON file. Raises UnusableInput if there is none."""
    text = read_text(path)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UnusableInput(f"{path}: want a JSON object")
    return found


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, and its folder. A reader sees the old content or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, entries: dict) -> None:
    """Write a JSON object, indented."""
    text = json.dumps(entries, indent=2)
    write_whole(path, f"{text}\n".encode("utf-8"))


def write_lines(path: Path, rows: list[dict]) -> None:
    """Write a file with one JSON object a line."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    text = "".join(lines)
    write_whole(path, text.encode("utf-8"))


def check_writable(folder: Path) -> None:
    """Make the folder and its cache. Raises UnusableInput if one cannot be written into."""
    try:
        # keeps results out of the user's repository
        for place in (folder / "cache", folder):
            write_whole(place / ".gitignore", b"*\n")
    except OSError as error:
        raise UnusableInput(f"--out {error.filename or folder}: {error.strerror}") from None
