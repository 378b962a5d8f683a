"""Files that are written whole or not at all."""

import os

__all__ = ["write_whole"]


def write_whole(path: str, content: str | bytes) -> None:
    """Writes a file, or leaves what was there. Its folder exists.

    Args:
        path: the file; until it is complete it is ``path`` + ".tmp".
        content: text is written as UTF-8.
    """
    unfinished = path + ".tmp"
    with open(unfinished, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
