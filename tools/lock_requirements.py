#!/usr/bin/env python3
"""Writes what ``make setup`` and ``make docs`` install, by checksum (``make lock``).

That is requirements.lock and docs/requirements.txt. The versions are those of constraints.txt, for
the rest those of the old file or the newest; every Python from 3.10 on and every platform that
PyTorch serves is in the one file. Needs uv (``pip install uv``) and runs in the environment of
``make setup``, whose Detectron2 tells what it requires.
"""

import importlib.metadata
import shutil
import subprocess
import sys
from distutils.core import run_setup  # from setuptools
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import setup_env  # noqa: E402

# The environment's own tools, and torchvision, which Detectron2 imports without naming it.
BESIDE = ["torchvision", "setuptools<81", "wheel", "ninja"]
DOCS_LOCK = ROOT / "docs" / "requirements.txt"
HOW = "by version and SHA-256; made by `make lock`, of setup.py and\n# constraints.txt."


def read_plugin() -> Any:
    """What setup.py tells, as a setuptools distribution."""
    return run_setup(str(ROOT / "setup.py"), stop_after="init")


def setup_requirements(plugin: Any) -> list[str]:
    """What the plugin (with the set-up's extras) and Detectron2 require."""
    found = [*BESIDE, *plugin.install_requires]
    for extra in setup_env.EXTRAS.split(","):
        found += plugin.extras_require[extra]
    detectron2 = setup_env.DETECTRON2.partition("==")[0]
    found += [line for line in importlib.metadata.requires(detectron2) or [] if "extra" not in line]
    return found


def lock(requirements: list[str], path: Path, header: str) -> None:
    """Writes all that some requirements bring along, each with its version and checksums."""
    uv = shutil.which("uv")
    if uv is None:
        sys.exit("lock: uv was not found; get it by `pip install uv`.")
    command = [uv, "pip", "compile", "-", "--quiet", "--universal", "--python-version=3.10"]
    command += ["--generate-hashes", "--no-annotate", "--no-header"]
    command += ["-c", str(setup_env.CONSTRAINTS), "-o", str(path)]
    done = subprocess.run(
        command, input="\n".join(requirements), text=True, stdout=subprocess.DEVNULL
    )
    if done.returncode != 0:
        sys.exit(f"lock: uv failed, its messages are above; {path} is as it was.")
    path.write_text(header + path.read_text())


def main() -> None:
    plugin = read_plugin()
    absent = f"Not here: {setup_env.DETECTRON2}, whose checksum is in tools/setup_env.py."
    header = f"# What make setup installs into .venv, {HOW} {absent}\n"
    lock(setup_requirements(plugin), setup_env.LOCK, header)
    header = f"# What make docs installs into .venv-docs, {HOW}\n"
    lock(plugin.extras_require["docs"], DOCS_LOCK, header)


if __name__ == "__main__":
    main()
