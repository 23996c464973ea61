"""Files."""

import hashlib
from pathlib import Path


def digest(path: Path) -> str:
    """Of a file's bytes, read in pieces."""
    made = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while data := file.read(1 << 22):
            made.update(data)
    return made.hexdigest()
