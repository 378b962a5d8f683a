"""tools/setup_env.py: the parts that install nothing."""

import re
from importlib import metadata

import pytest
from packaging.requirements import Requirement


def test_constraints_keep_what_is_there_but_not_the_plugin(tool, tmp_path, monkeypatch):
    setup_env = tool("setup_env")
    present = {"torch": "2.11.0", "d2-deform": "0.0.1"}
    monkeypatch.setattr(setup_env, "installed_versions", lambda python: present)
    lines = setup_env.keep_what_is_there("python", tmp_path).read_text().splitlines()
    assert "torch==2.11.0" in lines
    assert [line for line in lines if line.startswith("torch==")] == ["torch==2.11.0"]
    assert [line for line in lines if line.startswith("torchvision==")]  # of constraints.txt
    assert not [line for line in lines if line.startswith("d2")]


def entries(setup_env):
    """The requirements of requirements.lock, and of each how many checksums it has."""
    blocks = re.split(r"\n(?=\S)", setup_env.LOCK.read_text())
    found = [block for block in blocks if not block.startswith("#")]
    return [(Requirement(block.split("\\")[0]), block.count("--hash=sha256:")) for block in found]


def on_linux(python):
    """What markers are asked about on Linux x86-64, for a Python such as "3.10"."""
    platform = {"sys_platform": "linux", "platform_machine": "x86_64"}
    return {**platform, "python_version": python, "python_full_version": python + ".1"}


def test_everything_in_the_lock_has_a_version_and_checksums(tool):
    for requirement, checksums in entries(tool("setup_env")):
        assert re.fullmatch(r"==[\w.+]+", str(requirement.specifier)), requirement
        assert checksums > 0, requirement


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_lock_has_the_versions_of_constraints_and_all_that_is_required(tool, python):
    setup_env = tool("setup_env")
    locked = {}
    for requirement, _ in entries(setup_env):
        if requirement.marker is None or requirement.marker.evaluate(on_linux(python)):
            assert requirement.name not in locked
            locked[requirement.name] = requirement.specifier
    for line in setup_env.CONSTRAINTS.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        wanted = Requirement(line)
        name = setup_env.canonical(wanted.name)
        if name in locked and (wanted.marker is None or wanted.marker.evaluate(on_linux(python))):
            assert locked[name] == wanted.specifier, line
    for line in metadata.requires("d2_deform"):
        wanted = Requirement(line)
        extras = [{"extra": extra} for extra in ("", *setup_env.EXTRAS.split(","))]
        if wanted.marker is None or any(wanted.marker.evaluate(extra) for extra in extras):
            assert setup_env.canonical(wanted.name) in locked, "run `make lock`"


def test_part_of_the_lock(tool):
    part = tool("setup_env").part_of_lock({"wheel", "setuptools"})
    names = re.findall(r"(?m)^([\w-]+)==", part)
    assert names == ["setuptools", "wheel"]
    assert part.count("--hash") >= 4
