"""The CUDA library compiles without a GPU, without a warning, and holds every kernel."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("8.0", "9.0")


def why_not() -> str:
    """Why nothing can be compiled for CUDA here; empty where it can."""
    if shutil.which("nvcc") is None:
        return "nvcc, the CUDA compiler, is missing"
    told = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)", told)
    wanted = (torch.version.cuda or "").partition(".")[0]
    if found is None or found[1] != wanted:
        return f"nvcc is not of torch's CUDA, {torch.version.cuda}"
    return ""


WHY_NOT = why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("cuda_build"),
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that the working tree keeps the libraries that it has; without
    the CPU's kernels, which other tests need compiled anyway."""
    tree = tmp_path_factory.mktemp("cuda") / "tree"
    tree.mkdir()
    for name in ("setup.py", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tree)
    for name in ("csrc", "d2_deform"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__", "configs", "cpu")
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    environment = {
        **os.environ,
        "FORCE_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": ";".join(ARCHITECTURES),
        "MAX_JOBS": os.environ.get("MAX_JOBS", "2"),
        "NVCC_APPEND_FLAGS": "--no-compress",  # so that the kernels' names can be read
    }
    command = (sys.executable, "setup.py", "build_ext", "--inplace")
    result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (tree / "build.log").write_text(result.stdout + result.stderr)
    return tree


@pytest.fixture(scope="module")
def library(build: Path) -> Path:
    (library,) = (build / "d2_deform").glob("_C_cuda*.so")
    return library


def cubins(library: Path) -> Iterator[bytes]:
    """The GPU programs that a library carries: ELF files inside the ELF file."""
    data = library.read_bytes()
    for match in re.finditer(rb"\x7fELF\x02\x01", data):
        (machine,) = struct.unpack_from("<H", data, match.start() + 18)
        if machine == 190:  # EM_CUDA
            yield data[match.start() :]


def architecture(cubin: bytes) -> str:
    (flags,) = struct.unpack_from("<I", cubin, 48)
    number = flags >> 8 & 0xFF  # as of CUDA 13; before, the lowest byte
    number = number if number >= 50 else flags & 0xFF
    return f"{number // 10}.{number % 10}"


def kernels(cubin: bytes) -> set[str]:
    """Names of the sections .text.<kernel>."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    (start,) = struct.unpack_from("<Q", cubin, table + names * size + 24)
    found = set()
    for section in range(count):
        (name,) = struct.unpack_from("<I", cubin, table + section * size)
        text = cubin[start + name : cubin.index(b"\0", start + name)].decode()
        if text.startswith(".text."):
            found.add(text.removeprefix(".text."))
    return found


def launched() -> set[str]:
    """The kernels by the names with which the sources launch them."""
    text = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.*"))
    names = set(re.findall(r'for_each(?:_sum)?\(\s*"(\w+)"', text))
    assert len(names) >= 10
    return names


def test_build_is_free_of_warnings(build: Path) -> None:
    lines = (build / "build.log").read_text().splitlines()
    compiled = [line for line in lines if "warning" in line.lower() and "csrc" in line]
    assert [line for line in compiled if "warning:" in line or "warning #" in line] == []
    assert [line for line in lines if re.match(r"(ptxas|nvlink) warning", line)] == []


def test_library_has_every_kernel_for_each_architecture(library: Path) -> None:
    found: dict[str, set[str]] = {name: set() for name in ARCHITECTURES}
    for cubin in cubins(library):
        found[architecture(cubin)] |= kernels(cubin)
    for number, names in found.items():
        for kernel in launched():
            assert [name for name in names if kernel in name], f"{kernel} for {number}"
    assert found["8.0"] == found["9.0"]


def test_kernels_exist_for_every_dtype(library: Path) -> None:
    """In mangled names d, f and BFloat16, Half stand for the types."""
    names = set().union(*(kernels(cubin) for cubin in cubins(library)))
    for kernel in launched() - {"SegmentStarts", "SampleKeys", "InverseGather"}:
        for dtype in (rf"{kernel}Id", rf"{kernel}If", rf"{kernel}I.*Half", rf"{kernel}I.*BFloat16"):
            assert [name for name in names if re.search(dtype, name)], f"{kernel}, {dtype}"


def test_library_loads_and_registers_without_a_gpu(build: Path) -> None:
    code = """
import sys
from pathlib import Path

import torch

for name in ("_C.*so", "_C_cuda*so"):
    (library,) = Path("d2_deform").glob(name)
    torch.ops.load_library(str(library.resolve()))
for name in ("deform_conv2d", "deform_roi_pool", "deform_ps_roi_pool"):
    for operator in (name, name + "_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"d2_deform::{operator}", "CUDA")
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=build, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_library_needs_only_the_stable_abi(library: Path) -> None:
    """As test_packaging.py says of the libraries in the working tree."""
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    command = ("nm", "-D", "-C", "--undefined-only", str(library))
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = [line.split(maxsplit=1)[1] for line in symbols.splitlines()]
    assert [name for name in names if re.search(r"\b(at|c10|torch|caffe2|pybind11)::", name)] == []
    assert [name for name in names if re.match(r"_?Py[A-Z]", name)] == []


def test_without_nvcc_the_cpu_part_builds_and_says_so(tmp_path: Path) -> None:
    """setup.py names its libraries; nothing is compiled here."""
    code = """
import shutil, sys
from torch.utils import cpp_extension
cpp_extension.CUDA_HOME = None
shutil.which = lambda name: None
sys.argv = ["setup.py", "--name"]
exec(compile(open("setup.py").read(), "setup.py", "exec"), {"__file__": sys.path[0] + "/setup.py"})
"""
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"],
        cwd=ROOT,
        env={**os.environ, "FORCE_CUDA": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "operators for CPU only: nvcc, the CUDA compiler, was not found" in result.stdout
