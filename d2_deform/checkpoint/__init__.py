"""Checkpoints of other code bases for this package's networks (docs/checkpoints.md)."""

from .convert import SOURCES, Account, convert, pack
from .mxnet_file import MXNetFileError, read_mxnet_file
from .source_file import read_source_file

__all__ = [
    "SOURCES",
    "Account",
    "MXNetFileError",
    "convert",
    "pack",
    "read_mxnet_file",
    "read_source_file",
]
