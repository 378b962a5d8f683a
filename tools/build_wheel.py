#!/usr/bin/env python3
"""Builds the source distribution, and from it the wheel, into dist/ (``make wheel``).

The wheel is compiled against the torch of the Python that runs this, and serves every Python 3 and
every torch from 2.10 on: its libraries use LibTorch's stable ABI and hold no Python.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build(folder: Path) -> tuple[Path, Path]:
    """The source distribution and the wheel, made anew in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("d2_deform-*.tar.gz"), *folder.glob("d2_deform-*.whl")]:
        old.unlink()
    _run("setup.py", "-q", "sdist", "-d", str(folder), cwd=ROOT)
    (sdist,) = folder.glob("d2_deform-*.tar.gz")
    # From the unpacked archive, so that what is shipped is complete.
    with tempfile.TemporaryDirectory() as unpacked:
        with tarfile.open(sdist) as archive:
            archive.extractall(unpacked, filter="data")
        (tree,) = Path(unpacked).iterdir()
        options = ("--no-build-isolation", "--no-deps", "-q", "-w", str(folder))
        _run("-m", "pip", "wheel", "--disable-pip-version-check", *options, ".", cwd=tree)
    (wheel,) = folder.glob("d2_deform-*.whl")
    return sdist, wheel


def _run(*arguments: str, cwd: Path) -> None:
    if subprocess.run([sys.executable, "-W", "ignore", *arguments], cwd=cwd).returncode != 0:
        sys.exit(f"build_wheel: `{arguments[0]} ...` failed in {cwd}, its messages are above.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--output", type=Path, default=ROOT / "dist", help="folder for both (default: dist)"
    )
    for path in build(parser.parse_args().output.resolve()):
        print(path)
