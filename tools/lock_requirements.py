#!/usr/bin/env python3
"""Writes requirements.lock: what ``make setup`` installs, by checksum (``make lock``).

The versions are those of constraints.txt, for the rest those of the old lock or the newest; every
Python from 3.10 on and every platform that PyTorch serves is in the one file. Needs uv
(``pip install uv``) and runs in the environment of ``make setup``, whose Detectron2 tells what it
requires.
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
HEADER = f"""\
# What make setup installs into .venv, by version and SHA-256; made by `make lock`, of setup.py and
# constraints.txt. Not here: {setup_env.DETECTRON2}, whose checksum is in tools/setup_env.py.
"""


def requirements() -> list[str]:
    """What the plugin (with the set-up's extras) and Detectron2 require."""
    plugin: Any = run_setup(str(ROOT / "setup.py"), stop_after="init")
    found = [*BESIDE, *plugin.install_requires]
    for extra in setup_env.EXTRAS.split(","):
        found += plugin.extras_require[extra]
    detectron2 = setup_env.DETECTRON2.partition("==")[0]
    found += [line for line in importlib.metadata.requires(detectron2) or [] if "extra" not in line]
    return found


def lock() -> None:
    uv = shutil.which("uv")
    if uv is None:
        sys.exit("lock: uv was not found; get it by `pip install uv`.")
    command = [uv, "pip", "compile", "-", "--quiet", "--universal", "--python-version=3.10"]
    command += ["--generate-hashes", "--no-annotate", "--no-header"]
    command += ["-c", str(setup_env.CONSTRAINTS), "-o", str(setup_env.LOCK)]
    done = subprocess.run(
        command, input="\n".join(requirements()), text=True, stdout=subprocess.DEVNULL
    )
    if done.returncode != 0:
        sys.exit("lock: uv failed, its messages are above; requirements.lock is as it was.")
    setup_env.LOCK.write_text(HEADER + setup_env.LOCK.read_text())


if __name__ == "__main__":
    lock()
