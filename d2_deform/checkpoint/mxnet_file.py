"""MXNet's binary files of named arrays (``.params``), read without MXNet.

Layout, little endian, as MXNet's ``NDArray::Save`` and ``Load`` (src/ndarray/ndarray.cc) have it:

    uint64 0x112, uint64 0 (reserved)
    uint64 number of arrays, the arrays
    uint64 number of names, each as uint64 length and its bytes

An array has one of four forms, told by its first uint32:

    anything else  before 0.11: this is the number of dimensions; each is a uint32
    0xF993FAC8     version 1: shape
    0xF993FAC9     version 2: int32 storage type (0 dense), shape
    0xF993FACA     version 3: as 2; no dimension means a scalar instead of no array

then int32 device type, int32 device number, int32 number type, the values. A shape is a uint32
number of dimensions, each an int64 (version 3: -1 dimensions is no array).

A file may come from anywhere: every size is compared with what is left of the file before memory
is taken for it.
"""

import math
import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

__all__ = ["MXNetFileError", "read_mxnet_file"]

_LIST_MAGIC = 0x112
_V1, _V2, _V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
_MOST_DIMENSIONS = 32  # numpy's limit of old; networks have 4
_MOST_NUMBERS = 2**40
_DTYPES = ("<f4", "<f8", "<f2", "u1", "<i4", "i1", "<i8", "?")  # by MXNet's number of the type
_STORAGE = {1: "row-sparse", 2: "CSR"}


class MXNetFileError(ValueError):
    """A file that is not what MXNet writes; the message says where and how."""


def read_mxnet_file(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads all arrays of a file.

    Args:
        path: what ``mx.nd.save`` wrote for a dictionary, or ``mx.model.save_checkpoint``, whose
            names begin with "arg:" or "aux:".

    Returns:
        Arrays by name, in the file's order.

    Raises:
        MXNetFileError: the file is none of MXNet's, is cut off or goes on behind its end, or holds
            what no network's weights are: sparse or empty arrays, a name twice, none at all.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        reader = _Reader(file, os.fspath(path))
        return dict(_read_list(reader))


class _Reader:
    """Hands out a file's bytes, never more than are left."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self._file = file
        self._path = path
        self.left = os.fstat(file.fileno()).st_size

    def fail(self, reason: str) -> MXNetFileError:
        return MXNetFileError(f"{self._path}: {reason}")

    def take(self, count: int, what: str) -> bytes:
        if count > self.left:
            raise self.fail(f"{what} needs {count} bytes, but {self.left} are left; it is cut off")
        self.left -= count
        taken = self._file.read(count)
        if len(taken) != count:
            raise self.fail(f"{what} ends early; the file became shorter while it was read")
        return taken

    def number(self, form: str, what: str) -> int:
        """One number, ``form`` as in :mod:`struct`."""
        (value,) = struct.unpack("<" + form, self.take(struct.calcsize("<" + form), what))
        return value

    def count(self, least_size: int, what: str) -> int:
        """How many things of at least so many bytes follow."""
        count = self.number("Q", what)
        if count * least_size > self.left:
            raise self.fail(f"{what} is {count}, more than {self.left} bytes can hold")
        return count


def _read_list(reader: _Reader) -> Iterator[tuple[str, np.ndarray]]:
    if reader.left < 16 or reader.number("Q", "the head") != _LIST_MAGIC:
        raise reader.fail("is no file of MXNet arrays; it does not begin with 0x112")
    reader.number("Q", "the head")
    arrays = [
        _read_array(reader, f"array {index}") for index in range(reader.count(4, "array count"))
    ]
    names = [_read_name(reader, index) for index in range(reader.count(8, "name count"))]
    if len(names) != len(arrays):
        raise reader.fail(f"{len(arrays)} arrays have {len(names)} names")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise reader.fail(f"the name {twice!r} is there twice")
    if reader.left:
        raise reader.fail(f"{reader.left} bytes follow the last name")
    yield from zip(names, arrays, strict=True)


def _read_name(reader: _Reader, index: int) -> str:
    try:
        return reader.take(reader.count(1, f"length of name {index}"), f"name {index}").decode()
    except UnicodeDecodeError as error:
        raise reader.fail(f"name {index} is no text") from error


def _read_array(reader: _Reader, what: str) -> np.ndarray:
    shape = _read_shape(reader, what)
    reader.take(8, f"device of {what}")
    dtype_number = reader.number("i", f"number type of {what}")
    if not 0 <= dtype_number < len(_DTYPES):
        raise reader.fail(f"{what} has numbers of the unknown type {dtype_number}")
    dtype = np.dtype(_DTYPES[dtype_number])
    values = reader.take(math.prod(shape) * dtype.itemsize, f"{what} of shape {shape}")
    return np.frombuffer(values, dtype).reshape(shape)


def _read_shape(reader: _Reader, what: str) -> tuple[int, ...]:
    magic = reader.number("I", f"version of {what}")
    if magic in (_V2, _V3):
        storage = reader.number("i", f"storage of {what}")
        if storage != 0:
            name = _STORAGE.get(storage, f"unknown ({storage})")
            raise reader.fail(f"{what} has {name} storage; weights of networks are dense")
    if magic in (_V1, _V2, _V3):
        size, form = 8, "q"
        dimensions = reader.number("i", f"dimensions of {what}")
    else:
        size, form, dimensions = 4, "I", magic
    if dimensions == -1 or (dimensions == 0 and magic != _V3):
        raise reader.fail(f"{what} has no values; it was saved before it was filled")
    if not 0 <= dimensions <= _MOST_DIMENSIONS:
        raise reader.fail(f"{what} has {dimensions} dimensions, or begins with no known version")
    packed = reader.take(dimensions * size, f"shape of {what}")
    shape = struct.unpack(f"<{dimensions}{form}", packed)
    # With a length of 0 the others are not bounded by the file's size.
    if any(length < 0 for length in shape) or math.prod(max(n, 1) for n in shape) > _MOST_NUMBERS:
        raise reader.fail(f"{what} has the shape {shape}, which no network's weights have")
    return shape
