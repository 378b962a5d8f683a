"""Where data sets that we make ourselves are kept, and how they are made: whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["find_cache_dir", "whole_folder"]


def find_cache_dir(cache_dir: str | None = None) -> str:
    """`cache_dir`, or `$D2_DEFORM_CACHE`, or ~/.cache/d2_deform, as an absolute path."""
    cache_dir = cache_dir or os.environ.get("D2_DEFORM_CACHE") or "~/.cache/d2_deform"
    return os.path.abspath(os.path.expanduser(cache_dir))


@contextmanager
def whole_folder(dirname: str) -> Iterator[str]:
    """A folder to fill, which becomes `dirname` when the block ends, and vanishes where it raises.

    So an interrupted run leaves no half data set, and two processes may make the same one: the
    second finds it made.
    """
    parent, name = os.path.split(os.path.abspath(dirname))
    os.makedirs(parent, exist_ok=True)
    unfinished = tempfile.mkdtemp(prefix=f".{name}.", dir=parent)
    try:
        yield unfinished
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(unfinished, 0o777 & ~umask)  # mkdtemp lets only its owner in
        try:
            os.replace(unfinished, dirname)
        except OSError:
            if not os.path.isdir(dirname):  # else another process was first, with the same files
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
