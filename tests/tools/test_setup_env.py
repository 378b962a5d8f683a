"""tools/setup_env.py: the parts that install nothing."""

import re


def test_constraints_keep_what_is_there_but_not_the_plugin(tool, tmp_path, monkeypatch):
    setup_env = tool("setup_env")
    present = {"torch": "2.11.0", "d2-deform": "0.0.1"}
    monkeypatch.setattr(setup_env, "installed_versions", lambda python: present)
    lines = setup_env.keep_what_is_there("python", tmp_path).read_text().splitlines()
    assert "torch==2.11.0" in lines
    assert [line for line in lines if line.startswith("torch==")] == ["torch==2.11.0"]
    assert [line for line in lines if line.startswith("torchvision==")]  # of constraints.txt
    assert not [line for line in lines if line.startswith("d2")]


def test_part_of_the_lock(tool):
    part = tool("setup_env").part_of_lock({"wheel", "setuptools"})
    names = re.findall(r"(?m)^([\w-]+)==", part)
    assert names == ["setuptools", "wheel"]
    assert part.count("--hash") >= 4
