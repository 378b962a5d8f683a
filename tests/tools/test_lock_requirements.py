"""What tools/lock_requirements.py wrote: versions and checksums of all that is installed."""

import re
from pathlib import Path

import pytest
from conftest import REPOSITORY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCKS = ["requirements.lock", "docs/requirements.txt"]


def read_lines(name):
    """The requirements of constraints.txt, or of a lock with their checksums behind them."""
    blocks = re.split(r"\n(?=\S)", Path(REPOSITORY, name).read_text())
    return [block.strip() for block in blocks if not block.startswith("#")]


def read_lock(name):
    return [Requirement(block.split("\\")[0]) for block in read_lines(name)]


def applies(requirement, python):
    """Whether it is one for Linux x86-64 and a Python such as "3.10"."""
    platform = {"sys_platform": "linux", "platform_machine": "x86_64"}
    version = {"python_version": python, "python_full_version": python + ".9"}
    return requirement.marker is None or requirement.marker.evaluate({**platform, **version})


@pytest.fixture(scope="module")
def required(tool):
    """Of each lock, what setup.py wants in it."""
    plugin = tool("lock_requirements").read_plugin()
    extras = tool("setup_env").EXTRAS.split(",")
    for_setup = [line for extra in extras for line in plugin.extras_require[extra]]
    found = [[*plugin.install_requires, *for_setup], plugin.extras_require["docs"]]
    return dict(zip(LOCKS, found, strict=True))


@pytest.mark.parametrize("lock", LOCKS)
def test_everything_has_a_version_and_checksums(lock):
    for requirement in read_lock(lock):
        assert re.fullmatch(r"==[\w.+]+", str(requirement.specifier)), requirement
    assert [block for block in read_lines(lock) if "--hash=sha256:" not in block] == []


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize("lock", LOCKS)
def test_versions_are_those_of_constraints_and_nothing_is_missing(required, lock, python):
    locked = {}
    for requirement in read_lock(lock):
        if applies(requirement, python):
            name = canonicalize_name(requirement.name)
            assert name not in locked
            locked[name] = requirement.specifier
    for tried in map(Requirement, read_lines("constraints.txt")):
        name = canonicalize_name(tried.name)
        if name in locked and applies(tried, python):
            assert locked[name] == tried.specifier, tried
    wanted = {canonicalize_name(Requirement(line).name) for line in required[lock]}
    assert wanted - locked.keys() == set(), "run `make lock`"
