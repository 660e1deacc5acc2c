"""Rewards of an own reward function, written down as soon as they are known.

A reward may take long, and may fail after hours. No pair of texts is judged twice: each reward is
appended to a file in the cache, under a hash of prompt and response. The file is named after the
code of the reward and its DEPENDS_ON.
"""
import hashlib
import os
import struct
from pathlib import Path


RECORD = struct.Struct("<16sd")                         # a hash of a pair of texts, and its reward


class Journal:
    """The rewards that are known, by pair of texts."""

    def __init__(self, path: Path):
        self.path = path
        self.known = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        content = b""
        if path.exists():
            content = path.read_bytes()
        # a process that was killed may have left a part of a record at the end
        for key, reward in RECORD.iter_unpack(content[:len(content) // RECORD.size * RECORD.size]):
            self.known[key] = reward

    def find(self, prompts: list[str], responses: list[str]) -> list[float | None]:
        """Return the rewards of these pairs, None for each that is not known."""
        return [self.known.get(_key(pair)) for pair in zip(prompts, responses)]

    def add(self, prompts: list[str], responses: list[str], rewards: list[float]) -> None:
        """Write down the rewards of these pairs."""
        records = b""
        for pair, reward in zip(zip(prompts, responses), rewards):
            key = _key(pair)
            self.known[key] = reward
            records += RECORD.pack(key, reward)
        # other processes may write to the same file
        if True:
            with open(self.path, "ab") as file:
                size = os.path.getsize(self.path)
                file.truncate(size // RECORD.size * RECORD.size)
                file.write(records)


def _key(pair: tuple[str, str]) -> bytes:
    """Return a hash of a prompt and a response."""
    text = f"{len(pair[0])} {pair[0]}{pair[1]}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]
