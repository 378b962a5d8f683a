"""Build of d2_deform: its metadata, and csrc/ compiled into plain shared libraries.

The libraries register operators through LibTorch's stable ABI and hold no Python, so that one build
serves every Python and every torch from 2.10 on. ``torch.ops.load_library`` loads them
(d2_deform/ops/_library.py).

Environment variables: ``FORCE_CUDA=1`` builds the CUDA library without a GPU, for
``TORCH_CUDA_ARCH_LIST``; ``CUDA_HOME`` names the toolkit, by default that of the nvcc on the PATH;
``MAX_JOBS`` limits the compilers at a time; ``D2_DEFORM_SANITIZE=address,undefined`` compiles the
compiler's sanitizers of these names into the CPU library (tools/sanitize.py).
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel

try:
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    raise SystemExit(
        "d2_deform is compiled against the PyTorch of the environment, and there is none. Install "
        "torch, then run `pip install --no-build-isolation .` (pip's isolated environment would "
        "not see it)."
    ) from error

ROOT = Path(__file__).parent
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # as of torch 2.10
# Contraction to fused multiply-add keeps what the operators promise about NaN and infinity;
# -ffast-math would not. Instruction sets are chosen at run time, so no -march. Unused
# parameters are in torch's headers.
CXX_FLAGS = ["-O3", "-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter"]
SANITIZERS = os.environ.get("D2_DEFORM_SANITIZE", "")


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def find_toolkit() -> str | None:
    """The CUDA toolkit's folder, or None. torch guesses it from the path of nvcc, which may be a
    link or a wrapper; nvcc itself knows it."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or "CUDA_HOME" in os.environ or "CUDA_PATH" in os.environ:
        return cpp_extension.CUDA_HOME
    told = subprocess.run([nvcc, "--dryrun", "none.cu"], capture_output=True, text=True).stderr
    tops = [line.partition("TOP=")[2] for line in told.splitlines() if "TOP=" in line]
    return os.path.realpath(tops[0]) if tops else cpp_extension.CUDA_HOME


def sanitizer_flags() -> list[str]:
    """For the compiler: what the sanitizers need to tell, with its line, and to stop at it."""
    if not SANITIZERS:
        return []
    # Not among those of "undefined": a float that is too large for a whole number.
    names = SANITIZERS + (",float-cast-overflow" if "undefined" in SANITIZERS else "")
    flags = [f"-fsanitize={names}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1"]
    # Python asks for -fwrapv, with which an overflow is none.
    return [*flags, "-O1", "-fno-wrapv", "-D_GLIBCXX_ASSERTIONS", "-DD2_DEFORM_SANITIZE"]


def libraries() -> list[Extension]:
    cpu = CppExtension(
        "d2_deform._C",
        sources("csrc/*.cpp") + sources("csrc/cpu/*.cpp"),
        depends=sources("csrc/**/*.h"),
        extra_compile_args=[*CXX_FLAGS, *WARNINGS, STABLE_ABI, *sanitizer_flags()],
        extra_link_args=[f"-fsanitize={SANITIZERS}"] if SANITIZERS else [],
        py_limited_api=True,
    )
    kernels = sources("csrc/cuda/*.cu")
    if not kernels:
        return [cpu]
    cpp_extension.CUDA_HOME = find_toolkit()
    if cpp_extension.CUDA_HOME is None:
        print("d2_deform: operators for CPU only: nvcc, the CUDA compiler, was not found")
        return [cpu]
    if not torch.cuda.is_available() and os.environ.get("FORCE_CUDA") != "1":
        print("d2_deform: operators for CPU only: torch sees no GPU, and FORCE_CUDA is not 1")
        return [cpu]
    cuda = CUDAExtension(
        "d2_deform._C_cuda",
        kernels,
        depends=sources("csrc/**/*.h"),
        extra_compile_args={
            "cxx": [*CXX_FLAGS, *WARNINGS, STABLE_ABI],
            # constexpr members of the standard library serve device code, too.
            "nvcc": [
                *("-O3", "-std=c++17", "--expt-relaxed-constexpr", "-DUSE_CUDA", STABLE_ABI),
                f"-Xcompiler={','.join(['-fvisibility=hidden', *WARNINGS])}",
            ],
        },
        py_limited_api=True,
    )
    return [cpu, cuda]


class BuildLibraries(BuildExtension):
    """Also writes what each library was built with, for ``python -m d2_deform.collect_env``."""

    def run(self):
        super().run()
        folder = ROOT if self.inplace else Path(self.build_lib)
        path = folder / "d2_deform" / "_C_build.json"
        path.write_text(json.dumps(self.description(), indent=1) + "\n")

    def description(self) -> dict[str, object]:
        compiler = os.environ.get("CXX", "c++").split()[0]
        told = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
        flags = {library.name: library.extra_compile_args for library in self.extensions}
        cuda = {"toolkit": cpp_extension.CUDA_HOME, "torch": torch.version.cuda}
        cuda["architectures"] = os.environ.get("TORCH_CUDA_ARCH_LIST", "those of the GPUs there")
        return {
            "torch": torch.__version__,
            "compiler": told.partition("\n")[0],
            "flags": flags,
            "cuda": cuda if len(flags) > 1 else None,
        }


class Wheel(bdist_wheel):
    """py3-none-<platform>: the libraries hold no Python, so one wheel serves every Python 3."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


DIGITS = ["scikit-learn>=1.3", "opencv-python-headless>=4.8"]
TEST = ["pytest>=8", "hypothesis>=6.100", "pytest-xdist>=3.5", "scikit-learn>=1.3", "timm>=1.0"]

setup(
    name="d2_deform",
    version="0.1.0",
    description="Deformable Convolutional Networks as a plugin for Detectron2",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["d2_deform", "d2_deform.*"]),
    # d2_deform/configs is a link to configs/: one address in a checkout and in a wheel.
    package_data={
        "d2_deform": ["configs/**/*.yaml", "configs/**/*.py"],
        "d2_deform.model_zoo": ["weights/**/*.pth"],
        "d2_deform.visualization": ["explorer.html", "explorer.css", "explorer.js"],
    },
    include_package_data=False,
    zip_safe=False,
    # Detectron2 is needed by all but d2_deform.ops and d2_deform.layers, yet cannot stand here: it
    # has no registry release under its own name, so pip would fail, or fetch something else beside
    # a Detectron2 built from source. `import d2_deform` says how to get it.
    install_requires=["torch>=2.10", "numpy>=1.24"],
    extras_require={
        "digits": DIGITS,  # the embedded data set; any other build of OpenCV does too
        "plots": ["matplotlib>=3.7"],  # some version of it comes with Detectron2
        "experiments": ["scipy>=1.10"],  # confidence intervals of tools/run_ablation.py
        "onnx": ["onnx>=1.16", "onnxscript>=0.5", "onnxruntime>=1.20"],  # tools/export_model.py
        "benchmark": ["torchvision", "onnx>=1.16", "onnxruntime>=1.20", "matplotlib>=3.7"],
        "test": TEST,
        "dev": [*TEST, "ruff", "mypy", "clang-format", "ninja"],
        # The site's, in an environment of its own: make docs. Ruff formats signatures.
        "docs": ["mkdocs-material>=9.6", "mkdocstrings-python>=2", "latex2mathml>=3.78", "ruff"],
    },
    ext_modules=libraries(),
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
)
