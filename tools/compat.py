#!/usr/bin/env python3
"""Runs the tests in other stacks than the pinned one (what ``make compat`` does).

One wheel is built. For each stack an environment is made, the wheel installed in it, the tests of
the source distribution run on it, and the environment removed: one takes 5.5 GB. The table goes to
the screen, and with the names of what failed to ``compat.json``.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import setup_env  # noqa: E402
from tools.build_wheel import build  # noqa: E402

EXTRAS = "test,digits,experiments,benchmark"
VERSIONS = ("torch", "torchvision", "numpy", "sal-detectron2", "d2_deform")


@dataclass(frozen=True)
class Stack:
    """Which Python, such as "3.11"; which torch (empty: the pinned stack, by hashes)."""

    python: str
    torch: str = ""


STACKS = {
    "pinned": Stack("3.11"),
    "newest": Stack("3.11", "torch"),
    "oldest": Stack("3.11", "torch==2.10.*"),
    "python3.10": Stack("3.10"),
    "python3.12": Stack("3.12"),
    "python3.13": Stack("3.13"),
}


class Failure(Exception):
    """A step of a stack's set-up that did not succeed; the stack's row tells it."""


def find_python(version: str) -> str | None:
    """An interpreter of that version: on the PATH, or one of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [f"python{version}", *sorted(map(str, pyenv.glob(f"{version}.*/bin/python")))]
    code = "import sys, venv; print('{}.{}'.format(*sys.version_info))"
    for candidate in filter(shutil.which, candidates):
        told = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        if told.stdout.strip() == version:
            return candidate
    return None


def install(stack: Stack, interpreter: str, wheel: Path, folder: Path) -> Path:
    """An environment with the stack and the wheel; its Python."""
    _run(interpreter, "-m", "venv", str(folder / "env"))
    python = folder / "env" / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    if stack.torch:
        # What pip takes by itself, whatever a settings file caps.
        free = {**os.environ, "PIP_CONSTRAINT": os.devnull}
        _run(*pip, stack.torch, "torchvision", "setuptools>=70.1,<81", "wheel", env=free)
        detectron2 = setup_env.fetch_detectron2(python, folder)
        torch = f"torch=={setup_env.installed_versions(python)['torch']}"
        _run(*pip, torch, str(detectron2), f"{wheel}[{EXTRAS}]", env=free)
    else:
        setup_env.install_stack(python)
        _run(*pip, "--no-deps", str(wheel))
    return python


def lay_out(sdist: Path, python: Path, folder: Path) -> Path:
    """The source distribution unpacked, with the installed package in the place of its own."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = folder.glob("d2_deform-*")
    shutil.rmtree(tree / "d2_deform")
    code = "import sysconfig; print(sysconfig.get_path('platlib'))"
    site = subprocess.check_output([str(python), "-c", code], text=True).strip()
    (tree / "d2_deform").symlink_to(Path(site) / "d2_deform")
    return tree


def run_tests(python: Path, tree: Path, arguments: Iterable[str]) -> dict[str, Any]:
    """Runs pytest; how many tests passed, failed and were skipped, and which failed."""
    report = tree / "junit.xml"
    command = [str(python), "-m", "pytest", "-q", f"--junitxml={report}", *arguments]
    log = tree.parent / "pytest.log"
    with log.open("w") as output:
        subprocess.run(command, cwd=tree, stdout=output, stderr=subprocess.STDOUT)
    if not report.exists():
        raise Failure("pytest ended without a report: " + log.read_text()[-2000:])
    return read_report(report)


def read_report(report: Path) -> dict[str, Any]:
    """Of pytest's JUnit XML: {"passed", "failed", "skipped": numbers, "failures": names}."""
    counts: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            counts["failed"] += 1
            counts["failures"].append(f"{case.get('classname')}::{case.get('name')}")
        elif case.find("skipped") is not None:
            counts["skipped"] += 1
        else:
            counts["passed"] += 1
    return counts


def try_stack(
    name: str, sdist: Path, wheel: Path, folder: Path, arguments: Iterable[str]
) -> dict[str, Any]:
    """One row of the table; makes and removes ``folder``, except for pytest's log."""
    stack = STACKS[name]
    row: dict[str, Any] = {"stack": name, "python": stack.python}
    interpreter = find_python(stack.python)
    if interpreter is None:
        return {**row, "problem": f"Python {stack.python} is not installed"}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start = time.monotonic()
    try:
        python = install(stack, interpreter, wheel, folder)
        versions = setup_env.installed_versions(python)
        row |= {key: versions.get(setup_env.canonical(key), "") for key in VERSIONS}
        row["installing_s"] = round(time.monotonic() - start)
        tree = lay_out(sdist, python, folder)
        start = time.monotonic()
        row |= run_tests(python, tree, arguments)
        row["testing_s"] = round(time.monotonic() - start)
    except (Failure, SystemExit) as error:
        row["problem"] = str(error)
    finally:
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
    return row


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| stack | Python | torch | torchvision | numpy | passed | failed | skipped |",
        "|---|---|---|---|---|---|---|---|",
    ]
    keys = ("stack", "python", "torch", "torchvision", "numpy", "passed", "failed", "skipped")
    for row in rows:
        lines.append("| " + " | ".join(str(row.get(key, "")) for key in keys) + " |")
        if "problem" in row:
            lines.append(f"\n{row['stack']}: {row['problem']}")
    return "\n".join(lines)


def _run(*command: str, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise Failure(f"`{' '.join(command)}` failed:\n{(done.stdout + done.stderr)[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="What follows -- goes to pytest, for example: -- -m 'not slow' tests/ops",
    )
    parser.add_argument("stacks", nargs="*", help=f"some of {', '.join(STACKS)} (default: all)")
    parser.add_argument("--wheel", type=Path, help="folder with a wheel and its source, not built")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "compat")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "compat.json")
    given = sys.argv[1:]
    at = given.index("--") if "--" in given else len(given)
    pytest_arguments = given[at + 1 :]
    args = parser.parse_args(given[:at])
    unknown = [name for name in args.stacks if name not in STACKS]
    if unknown:
        parser.error(f"no stack {unknown[0]}; there are {', '.join(STACKS)}")
    if args.wheel:
        (sdist,), (wheel,) = args.wheel.glob("d2_deform-*.tar.gz"), args.wheel.glob("*.whl")
    else:
        print("compat: building the wheel", flush=True)
        sdist, wheel = build(args.work.resolve() / "dist")
    rows = []
    for name in args.stacks or STACKS:
        print(f"compat: {name}", flush=True)
        folder = args.work.resolve() / name
        rows.append(try_stack(name, sdist, wheel, folder, pytest_arguments))
        args.output.parent.mkdir(parents=True, exist_ok=True)
        content = {"wheel": wheel.name, "pytest": pytest_arguments, "rows": rows}
        args.output.write_text(json.dumps(content, indent=1) + "\n")
        print(table(rows[-1:]), flush=True)
    print("\n" + table(rows) + f"\n\ncompat: {args.output}")
    if any(row.get("failed", 1) for row in rows):
        sys.exit("compat: not every stack passed")


if __name__ == "__main__":
    main()
