"""MXNet's file format: every version of it, and files that lie."""

import struct
import tracemalloc

import numpy as np
import pytest

from d2_deform.checkpoint import MXNetFileError, read_mxnet_file

V1, V2, V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
NUMBERS = {"f4": 0, "f8": 1, "f2": 2, "u1": 3, "i4": 4, "i1": 5, "i8": 6, "b1": 7}


def pack_array(array, version):
    """One array as MXNet writes it; version 0 is the oldest."""
    dimensions = struct.pack("<I", array.ndim)
    sizes = struct.pack(f"<{array.ndim}{'q' if version else 'I'}", *array.shape)
    head = {
        0: b"",
        1: struct.pack("<I", V1),
        2: struct.pack("<Ii", V2, 0),
        3: struct.pack("<Ii", V3, 0),
    }[version]
    device = struct.pack("<ii", 2, 3)  # GPU 3: read to the CPU
    number = struct.pack("<i", NUMBERS[array.dtype.str[1:]])
    return head + dimensions + sizes + device + number + array.tobytes()


def pack(arrays, version=2):
    file = struct.pack("<QQQ", 0x112, 0, len(arrays))
    file += b"".join(pack_array(array, version) for array in arrays.values())
    file += struct.pack("<Q", len(arrays))
    for name in arrays:
        file += struct.pack("<Q", len(name.encode())) + name.encode()
    return file


@pytest.fixture
def read(tmp_path):
    def read(content):
        path = tmp_path / "net-0000.params"
        path.write_bytes(content)
        return read_mxnet_file(path)

    return read


ARRAYS = {
    "arg:conv1_weight": np.arange(24, dtype="f4").reshape(2, 3, 2, 2) / 7,
    "aux:bn_conv1_moving_var": np.array([1e-30, 3e38], dtype="f4"),
    "arg:größe": np.zeros((0, 5), dtype="f2"),
}


@pytest.mark.parametrize("version", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", NUMBERS)
def test_reads_what_was_written(read, version, dtype):
    arrays = {name: array.astype(dtype) for name, array in ARRAYS.items() if dtype[0] == "f"}
    arrays["arg:numbers"] = np.array([[0, 1, 127]], dtype=dtype)
    got = read(pack(arrays, version))
    assert list(got) == list(arrays)
    for name, array in arrays.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name], array)


def test_versions_may_mix_and_a_scalar_is_version_3s(read):
    parts = [pack_array(np.ones(2, "f4"), version) for version in (0, 1, 2)]
    parts.append(pack_array(np.array(5.0), 3))
    names = b"".join(struct.pack("<Q", 1) + letter for letter in (b"a", b"b", b"c", b"d"))
    head, count = struct.pack("<QQQ", 0x112, 0, 4), struct.pack("<Q", 4)
    got = read(head + b"".join(parts) + count + names)
    assert [array.shape for array in got.values()] == [(2,), (2,), (2,), ()]
    assert got["d"] == 5


@pytest.mark.parametrize("version", [0, 2])
def test_a_file_cut_anywhere_is_refused(read, version):
    content = pack(ARRAYS, version)
    for length in range(len(content)):
        with pytest.raises(MXNetFileError, match=r"net-0000\.params: "):
            read(content[:length])


def test_any_changed_byte_is_refused_or_changes_values_only(read):
    """No other error, no crash; sizes of 2 ** 60 among them."""
    content = pack(ARRAYS)
    refused = 0
    for place in range(len(content)):
        for value in (0, 0x7F, 0xFF):
            changed = content[:place] + bytes([value]) + content[place + 1 :]
            try:
                assert len(read(changed)) == len(ARRAYS)
            except MXNetFileError:
                refused += 1
    assert refused > len(content) // 2


def huge_shape():
    array = struct.pack("<Iii2qiii", V2, 0, 2, 2**19, 2**19, 1, 0, 0)
    return struct.pack("<QQQ", 0x112, 0, 1) + array


ONE = struct.pack("<QQQ", 0x112, 0, 1)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is no file of MXNet arrays"),
        (b"PK\x03\x04" * 8, "is no file of MXNet arrays; it does not begin with 0x112"),
        (struct.pack("<QQQ", 0x112, 0, 2**60), "array count is 1152921504606846976, more than 0"),
        (huge_shape(), r"array 0 of shape \(524288, 524288\) needs 1099511627776 bytes"),
        (ONE + struct.pack("<I", 10**9), "array 0 has 1000000000 dimensions, or begins with no"),
        (ONE + struct.pack("<Iii", V2, 0, -7), "array 0 has -7 dimensions"),
        (ONE + struct.pack("<Iii", V2, 0, 0) + bytes(9), "array 0 has no values"),
        (ONE + struct.pack("<Iii", V3, 0, -1) + bytes(9), "array 0 has no values"),
        (ONE + struct.pack("<I", 0) + bytes(9), "array 0 has no values"),
        (ONE + struct.pack("<Ii", V2, 1) + bytes(60), "array 0 has row-sparse storage; weights"),
        (ONE + struct.pack("<Ii", V2, 9) + bytes(60), r"array 0 has unknown \(9\) storage"),
        (ONE + struct.pack("<Iq", V1, -5) + bytes(9), "array 0 has -5 dimensions"),
        (ONE + struct.pack("<Iiqiii", V1, 1, -5, 1, 0, 0), r"array 0 has the shape \(-5,\)"),
        (ONE + struct.pack("<I3I", 3, 0, 2**31, 2**31), r"array 0 has the shape \(0, 2147483648"),
        (ONE + struct.pack("<Iiqiii", V1, 1, 1, 1, 0, 12), "numbers of the unknown type 12"),
        (pack({"a": np.ones(2)})[:-17] + struct.pack("<Q", 0), "1 arrays have 0 names"),
        (pack({"a": np.ones(2)}) + b"x", "1 bytes follow the last name"),
        (pack({"a": np.ones(2)})[:-1] + b"\xff", "name 0 is no text"),
        (pack({"a": np.ones(2), "b": np.ones(2)})[:-1] + b"a", "the name 'a' is there twice"),
    ],
)
def test_a_flawed_file_is_told_without_taking_memory(read, content, message):
    tracemalloc.start()
    with pytest.raises(MXNetFileError, match=message):
        read(content)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
