#!/usr/bin/env python3
"""Sets up an environment for d2_deform (what ``make setup`` runs).

Where the active Python has torch and Detectron2 already, that environment is used as it is: only
small things that are missing are added, in the versions of ``constraints.txt``. Else ``.venv`` is
made, of the files whose checksums are in ``requirements.lock`` and no others. Either way the plugin
is installed as editable. Run again, it does nothing but recompile what changed in ``csrc/``.

Standard library only: this runs before anything is installed.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
CONSTRAINTS = ROOT / "constraints.txt"
LOCK = ROOT / "requirements.lock"  # made by tools/lock_requirements.py
EXTRAS = "dev,digits,onnx"  # of setup.py, for .venv
MINIMUM_PYTHON = (3, 10)
MINIMUM_TORCH = [2, 10]

# Detectron2 has no registry release of its own. This is upstream of August 2024, redistributed
# (Apache-2.0).
DETECTRON2 = "sal-detectron2==0.7.2"
DETECTRON2_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"


def say(text):
    print("setup: " + text, flush=True)


def stop(text):
    sys.exit("setup: " + text)


def run(command, step, **options):
    if subprocess.run([str(part) for part in command], cwd=str(ROOT), **options).returncode != 0:
        stop(step + " failed (its messages are above). Run it again to go on from here.")


def pip(python, *arguments, step):
    verbosity = [] if os.environ.get("V") else ["-q"]
    quiet = ["--disable-pip-version-check", "--no-input", *verbosity]
    run([python, "-m", "pip", *arguments, *quiet], step)


def in_own_venv():
    return Path(sys.prefix).resolve() == VENV.resolve()


def has(module):
    return importlib.util.find_spec(module) is not None


def active_environment_serves():
    """Whether the Python that runs this is one of the user's own, with torch and Detectron2."""
    return not in_own_venv() and has("torch") and has("detectron2") and not too_old_torch()


def too_old_torch():
    """The active environment's torch where it is too old, else empty."""
    version = importlib.metadata.version("torch") if has("torch") else "99.0"
    return version if [int(part) for part in version.split(".")[:2]] < MINIMUM_TORCH else ""


def environment():
    """Its Python and its folder."""
    if active_environment_serves():
        return Path(sys.executable), Path(sys.prefix)
    return VENV / "bin" / "python", VENV


def fingerprint(prefix):
    """Of all that decides what is installed."""
    digest = hashlib.sha256(str(prefix).encode())
    for path in (CONSTRAINTS, LOCK, ROOT / "setup.py", ROOT / "tools" / "setup_env.py"):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def plugin_is_installed(python):
    """Whether the environment's d2_deform is this checkout, and not removed or another since."""
    code = "from importlib.metadata import distribution\n"
    code += "print(distribution('d2_deform').read_text('direct_url.json'))"
    result = subprocess.run([str(python), "-c", code], cwd="/", capture_output=True, text=True)
    return '"' + ROOT.as_uri() + '"' in result.stdout and "editable" in result.stdout


def check_machine():
    if sys.version_info < MINIMUM_PYTHON:
        stop(
            "Python 3.10 or newer is needed, this is {}.{}: make PYTHON=python3.11 ...".format(
                *sys.version_info[:2]
            )
        )
    compilers = [os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++"]
    if not any(name and shutil.which(name) for name in compilers):
        stop("no C++ compiler: install g++ (Debian and Ubuntu: apt-get install g++) or set CXX.")


def make_venv():
    say("making .venv with Python {}.{}".format(*sys.version_info[:2]))
    python = VENV / "bin" / "python"
    if has("ensurepip"):
        run([sys.executable, "-m", "venv", VENV], "making .venv")
    elif has("pip"):  # Debian's python3 without python3-venv
        run([sys.executable, "-m", "venv", "--without-pip", VENV], "making .venv")
        pip(sys.executable, "--python", python, "install", "pip", step="installing pip into .venv")
    else:
        stop("Python's venv module is not complete: apt-get install python3-venv (or python3-pip).")


def fetch_detectron2(python, folder):
    """Downloads Detectron2, checks it, and returns a wheel that suits every Python and torch.

    The published one holds a library compiled for one Python and one old torch. Without it
    Detectron2 runs on its Python code, torchvision's operators, and ours.
    """
    # The wheel's own tags, which this Python does not share, have to be asked for by name.
    tags = ["--python-version=3.10", "--implementation=cp", "--abi=none", "--platform=any"]
    options = ["--no-deps", "--only-binary=:all:", *tags, "-d", folder]
    pip(python, "download", *options, DETECTRON2, step="downloading Detectron2")
    (downloaded,) = folder.glob("*.whl")
    found = hashlib.sha256(downloaded.read_bytes()).hexdigest()
    if found != DETECTRON2_SHA256:
        stop(f"{downloaded.name} has checksum {found}, not {DETECTRON2_SHA256}: not installed.")
    target = folder / (downloaded.name.split("-cp310-")[0] + "-py3-none-any.whl")
    with zipfile.ZipFile(downloaded) as source:
        contents = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, content in contents.items():
            # tools/ would be installed beside the packages, where it hides other folders so named.
            if name.endswith((".so", "/RECORD")) or name.startswith("tools/"):
                continue
            if name.endswith(".dist-info/WHEEL"):
                content = re.sub(rb"(?m)^Tag: .*$", b"Tag: py3-none-any", content)
                content = content.replace(b"Root-Is-Purelib: false", b"Root-Is-Purelib: true")
            elif name.endswith(".dist-info/METADATA"):
                content = correct_requirements(content.decode()).encode()
            wheel.writestr(name, content)
        # pip wants the list of files, and takes it without checksums.
        (record,) = [name for name in contents if name.endswith(".dist-info/RECORD")]
        wheel.writestr(record, "".join(name + ",,\n" for name in [*wheel.namelist(), record]))
    return target


def correct_requirements(metadata):
    """What Detectron2 needs today, so that pip neither sets numpy back nor reports conflicts.

    ``numpy<2`` was written before numpy 2, with which it works (tried: training, evaluation,
    prediction); black is needed only to print a LazyConfig prettily; fvcore, iopath and setuptools
    (pkg_resources) are imported but not named.
    """
    wrong = ["numpy<2", "black"]
    missing = ["numpy", "fvcore", "iopath", "setuptools<81"]
    head, separator, description = metadata.partition("\n\n")
    lines = [line for line in head.splitlines() if line.replace("Requires-Dist: ", "") not in wrong]
    lines += ["Requires-Dist: " + name for name in missing]
    return "\n".join(lines) + separator + description


def installed_versions(python):
    command = [str(python), "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
    listed = json.loads(subprocess.check_output(command, cwd=str(ROOT)))
    return {canonical(item["name"]): item["version"] for item in listed}


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def keep_what_is_there(python, folder):
    """Constraints that leave what is installed at its version; constraints.txt for all others."""
    present = installed_versions(python)
    present.pop("d2-deform", None)  # its version is the checkout's
    lines = [f"{name}=={version}" for name, version in present.items()]
    for line in CONSTRAINTS.read_text().splitlines():
        if line and not line.startswith("#") and canonical(line.split("==")[0]) not in present:
            lines.append(line)
    path = folder / "constraints.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def part_of_lock(names):
    """The entries of requirements.lock for these packages."""
    entries = re.split(r"\n(?=\S)", LOCK.read_text())
    return "\n".join(entry for entry in entries if canonical(entry.split("==")[0]) in names) + "\n"


def install_locked(python, lock, step):
    """Installs what a file names, all of it by checksum, without asking for anything more."""
    strict = ["--require-hashes", "--no-deps", "--no-build-isolation"]
    pip(python, "install", *strict, "-r", lock, step=step)


def install_stack(python):
    """torch, torchvision, Detectron2 and all that they and the plugin need, in .venv."""
    present = installed_versions(python).keys()
    if present >= {"torch", "torchvision"}:
        say("comparing .venv with requirements.lock")
    else:
        say("installing torch and all else (about 3 GB to download, 5.5 GB on disk; minutes)")
    with tempfile.TemporaryDirectory() as folder:
        # What has only a source distribution is built with them, not with others that pip fetches.
        build = Path(folder) / "build.lock"
        build.write_text(part_of_lock({"setuptools", "wheel"}))
        install_locked(python, build, "installing setuptools")
        install_locked(python, LOCK, "installing torch and all else")
        if not present & {"detectron2", "sal-detectron2"}:
            say("installing Detectron2 (" + DETECTRON2 + " without its compiled part)")
            wheel = fetch_detectron2(python, Path(folder))
            pip(python, "install", "--no-deps", wheel, step="installing Detectron2")


def install_plugin(python, *options):
    say("compiling csrc/ and installing the plugin (editable)")
    plugin = ["--no-build-isolation", "-e", *options]
    pip(python, "install", *plugin, step="installing the plugin")


def check_requirements(python):
    """The lock's packages came without asking for more, so whether nothing is missing is asked."""
    command = [str(python), "-m", "pip", "check", "--disable-pip-version-check"]
    result = subprocess.run(command, cwd=str(ROOT), stdout=subprocess.PIPE, text=True)
    if result.returncode != 0:
        print(result.stdout, end="")
        stop("requirements.lock does not suit setup.py (see above): make lock")


def compile_changes(python):
    """Compiles what changed in csrc/; the compiler speaks only if it fails, or with V=1."""
    output = None if os.environ.get("V") else subprocess.PIPE
    command = [str(python), "setup.py", "-q", "build_ext", "--inplace"]
    result = subprocess.run(
        command, cwd=str(ROOT), stdout=output, stderr=subprocess.STDOUT, text=True
    )
    if result.returncode != 0:
        print(result.stdout or "", end="")
        stop("compiling csrc/ failed (its messages are above).")


def set_up():
    check_machine()
    python, prefix = environment()
    own = prefix != VENV
    # What was installed last. Not in the user's own environment: that may be read-only.
    stamp = ROOT / "build" / "environment" if own else VENV / ".d2_deform_setup"
    wanted = fingerprint(prefix)
    name = str(prefix) if own else ".venv"
    done = python.exists() and stamp.exists() and stamp.read_text() == wanted
    if done and plugin_is_installed(python):
        compile_changes(python)
        say(name + " is ready")
        return
    if own:
        say("using the active environment " + name + ", which has torch and Detectron2, as it is")
        if not has("pip"):
            stop("the active environment has no pip: run `python -m ensurepip` in it.")
        with tempfile.TemporaryDirectory() as folder:
            constraints = keep_what_is_there(python, Path(folder))
            build = ["setuptools", "wheel", "ninja"]
            pip(python, "install", "-c", constraints, *build, step="installing setuptools")
            # digits names opencv-python-headless, which must not come beside another OpenCV.
            extras = "dev" if has("cv2") and has("sklearn") else EXTRAS
            install_plugin(python, ".[" + extras + "]", "-c", constraints)
    else:
        if has("detectron2") and too_old_torch():
            say(
                "not using the active environment: torch " + too_old_torch() + " is older than 2.10"
            )
        if not python.exists():
            make_venv()
        install_stack(python)
        install_plugin(python, ".", "--no-deps")
        check_requirements(python)
    check = "import d2_deform.ops, torchvision, detectron2"
    run([python, "-W", "ignore", "-c", check], "importing what was installed")
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text(wanted)
    say(name + " is ready")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--which", action="store_true", help="print its Python, do nothing")
    if parser.parse_args().which:
        print(environment()[0])
    else:
        set_up()
