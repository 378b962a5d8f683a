"""No file is unpickled that may run code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [path for part in ("d2_deform", "tools") for path in sorted((ROOT / part).rglob("*.py"))]
UNPICKLES = {"load", "loads", "Unpickler"}
# Each takes arrays alone, which its own tests show.
SAFE_UNPICKLERS = {"d2_deform/data/proposals.py": ["_ArrayUnpickler"]}
# Reads other projects' checkpoints, and pickles among them only where the caller asks for it.
ON_REQUEST = {"d2_deform/checkpoint/source_file.py"}


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Every call in a file, by its name as written."""
    tree = ast.parse(path.read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(ast.unparse(node.func), node) for node in found]


def unsafe_calls(path: Path) -> list[str]:
    """What a file unpickles without a restriction."""
    unsafe = []
    for name, call in calls(path):
        module, _, function = name.rpartition(".")
        keywords = {word.arg: ast.unparse(word.value) for word in call.keywords}
        pickles = module in ("pickle", "cPickle", "dill", "joblib") and function in UNPICKLES
        arrays = module in ("np", "numpy") and keywords.get("allow_pickle", "False") != "False"
        # True is the default of every torch that is supported.
        tensors = name == "torch.load" and keywords.get("weights_only", "True") != "True"
        if pickles or arrays or tensors:
            unsafe.append(f"line {call.lineno}: {ast.unparse(call)}")
    return unsafe


def test_no_source_unpickles_without_a_restriction():
    found = {path.relative_to(ROOT).as_posix(): unsafe_calls(path) for path in SOURCES}
    assert {
        name: unsafe for name, unsafe in found.items() if unsafe and name not in ON_REQUEST
    } == {}


@pytest.mark.parametrize(
    "code, safe",
    [
        ("torch.load(f)", True),
        ("torch.load(f, weights_only=False)", False),
        ("torch.load(f, weights_only=True)", True),
        ("pickle.load(f)", False),
        ("pickle.Unpickler(f).load()", False),
        ("np.load(f, allow_pickle=True)", False),
        ("np.load(f)", True),
    ],
)
def test_what_counts_as_unsafe(code, safe, tmp_path):
    path = tmp_path / "source.py"
    path.write_text(code)
    assert (unsafe_calls(path) == []) == safe


def test_subclasses_of_the_unpickler_are_the_known_ones():
    found: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            bases = [ast.unparse(base) for base in getattr(node, "bases", [])]
            if isinstance(node, ast.ClassDef) and "pickle.Unpickler" in bases:
                found.setdefault(path.relative_to(ROOT).as_posix(), []).append(node.name)
    assert found == SAFE_UNPICKLERS
