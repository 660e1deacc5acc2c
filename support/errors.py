"""Input that cannot be used: the exception for it, and how text and JSON files are read."""
import json
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
