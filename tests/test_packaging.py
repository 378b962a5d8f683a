"""What is shipped: source distribution, wheel, the library's ABI, the direction of imports."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "d2_deform"
# What no build needs, or only contains what it makes.
NOT_COPIED = shutil.ignore_patterns(
    ".venv*",
    ".git",
    "build",
    "dist",
    "output",
    "datasets",
    "*.egg-info",
    "*.so",
    "__pycache__",
    ".*_cache",
)

# Those that share the built files run in one process of pytest-xdist.
pytestmark = pytest.mark.xdist_group("packaging")


def run(*command, cwd):
    """Output of a command, which must succeed; no package index is reachable from it."""
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment.pop("FORCE_CUDA", None)
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    # A copy, since building writes into the tree.
    tree = tmp_path_factory.mktemp("checkout") / "tree"
    shutil.copytree(ROOT, tree, ignore=NOT_COPIED, symlinks=True)
    run(sys.executable, "setup.py", "-q", "sdist", cwd=tree)
    (archive,) = (tree / "dist").glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def sdist_tree(sdist, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    return tree


@pytest.fixture(scope="module")
def wheel(sdist_tree, tmp_path_factory) -> Path:
    # From the unpacked sdist, so it also proves that the sdist is complete.
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--no-build-isolation", "--no-deps", "-q", "-w", str(folder))
    run(sys.executable, "-m", "pip", "wheel", *options, ".", cwd=sdist_tree)
    (archive,) = folder.glob("*.whl")
    return archive


def names_below(folder: str, *patterns: str) -> set[str]:
    found = (path for pattern in patterns for path in (ROOT / folder).rglob(pattern))
    return {path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts}


@pytest.mark.slow
def test_sdist_holds_all_that_git_does(sdist_tree):
    """So that every target of the Makefile works there, too."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    wanted = {path for path in run("git", "ls-files", cwd=ROOT).splitlines() if path[0] != "."}
    wanted |= {".clang-format", ".pre-commit-config.yaml"}
    wanted.remove("d2_deform/configs")  # a link, in its place are the files
    held = {path.relative_to(sdist_tree).as_posix() for path in sdist_tree.rglob("*")}
    assert {path for path in wanted - held if (ROOT / path).exists()} == set()


@pytest.mark.slow
def test_sdist_holds_nothing_built(sdist_tree):
    assert [path for path in sdist_tree.rglob("*") if path.suffix in (".so", ".o", ".pyc")] == []


@pytest.mark.slow
def test_wheel_has_library_configs_and_every_module(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"d2_deform/{name}" for name in names_below("configs", "*.yaml", "*.py")}
    wanted |= {path for path in names_below("d2_deform", "*.py") if "/configs/" not in path}
    wanted |= names_below("d2_deform", "*.html", "*.css", "*.js")  # the explorer's page
    wanted |= names_below("d2_deform", "*.pth")  # the zoo's trained weights
    wanted |= {"d2_deform/_C.abi3.so", "d2_deform/_C_build.json"}
    assert wanted - held == set()
    assert {name.split("/")[0].partition("-")[0] for name in held} == {"d2_deform"}


@pytest.mark.slow
def test_wheel_serves_every_python_3(wheel):
    assert re.fullmatch(r"d2_deform-[0-9.]+-py3-none-linux_\w+\.whl", wheel.name)


@pytest.mark.slow
def test_wheel_runs_where_it_is_unpacked(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = """
import sys; sys.path.insert(0, sys.argv[1])
import torch, d2_deform.ops as ops
assert ops.__file__.startswith(sys.argv[1]), ops.__file__
x = torch.rand(1, 2, 5, 5)
y = ops.deform_conv2d(x, torch.zeros(1, 2, 5, 5), torch.eye(2)[:, :, None, None])
torch.testing.assert_close(y, x)
"""
    run(sys.executable, "-c", code, str(tmp_path), cwd=tmp_path)


def test_requirements_do_not_name_detectron2():
    """pip would look for it in a registry, beside the one that a user built from source."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    (call,) = [
        node
        for node in tree.body
        if isinstance(node, ast.Expr) and "setup" in ast.dump(node.value)[:60]
    ]
    (requirements,) = [item.value for item in call.value.keywords if item.arg == "install_requires"]
    assert not [name for name in ast.literal_eval(requirements) if "detectron2" in name]


@pytest.mark.parametrize("library", sorted(PACKAGE.glob("_C*.so")), ids=lambda path: path.name)
def test_library_needs_only_the_stable_abi(library):
    """A C++ symbol of ATen or c10 would tie the library to one torch, one of Python to a Python."""
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    symbols = run("nm", "-D", "-C", "--undefined-only", str(library), cwd=ROOT).splitlines()
    names = [line.split(maxsplit=1)[1] for line in symbols]
    assert [name for name in names if re.search(r"\b(at|c10|torch|caffe2|pybind11)::", name)] == []
    assert [name for name in names if re.match(r"_?Py[A-Z]", name)] == []
    needed = run("readelf", "-d", str(library), cwd=ROOT)
    assert "libtorch_python" not in needed and "libpython" not in needed


def test_no_module_of_ops_or_layers_imports_detectron2():
    offenders = []
    for path in [*PACKAGE.glob("ops/**/*.py"), *PACKAGE.glob("layers/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if any(name.split(".")[0] == "detectron2" for name in names):
                offenders.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert offenders == []


def test_setup_script_speaks_to_an_old_python():
    """It must get as far as its message about the version, so it uses no newer syntax."""
    ast.parse((ROOT / "tools" / "setup_env.py").read_text(), feature_version=(3, 7))
