"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

__all__ = ["open_whole", "write_whole"]


@contextmanager
def open_whole(path: str) -> Iterator[IO[bytes]]:
    """Opens a file to write bytes to; what was there stays until all of the new one is on the disk.

    Args:
        path: the file, in a folder that exists; until it is complete it is ``path`` + ".tmp".

    Raises:
        OSError: it cannot be written; the message names it and says why. What was there is kept.
    """
    unfinished = path + ".tmp"
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException as error:
        with suppress(OSError):
            os.remove(unfinished)
        # torch.save says no more of a full disk than a position in the file; what its file said
        # before is the reason.
        for reason in (error, error.__context__):
            if isinstance(reason, OSError):
                raise OSError(reason.errno, reason.strerror, path) from error
        raise


def write_whole(path: str, content: str | bytes) -> None:
    """Writes a file as :func:`open_whole` does.

    Args:
        path: the file.
        content: text is written as UTF-8.
    """
    with open_whole(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
