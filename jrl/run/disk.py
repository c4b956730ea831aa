"""What is on disk, and stays there when the machine stops."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Until a file, or a folder with all that is in it, is on disk, and its name too. Nothing happens where there is none."""
    if not path.exists():
        return
    inside = list(path.rglob("*")) if path.is_dir() else []
    for item in [*inside, path, path.parent]:
        handle = os.open(item, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def replace(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: beside it, and then in its place."""
    fresh = path.with_suffix(".tmp")
    with fresh.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
