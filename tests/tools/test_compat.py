"""tools/compat.py: the parts that install nothing."""

import subprocess
import sys
import tarfile

import pytest

REPORT = """<testsuites><testsuite name="pytest">
<testcase classname="tests.ops.test_a" name="test_one[x]" />
<testcase classname="tests.ops.test_a" name="test_two"><failure message="1 == 2" /></testcase>
<testcase classname="tests.ops.test_b" name="test_three"><error message="in a fixture" /></testcase>
<testcase classname="tests.ops.test_b" name="test_four"><skipped message="no GPU" /></testcase>
</testsuite></testsuites>"""


def test_reads_what_pytest_reports(tool, tmp_path):
    report = tmp_path / "junit.xml"
    report.write_text(REPORT)
    assert tool("compat").read_report(report) == {
        "passed": 1,
        "failed": 2,
        "skipped": 1,
        "failures": ["tests.ops.test_a::test_two", "tests.ops.test_b::test_three"],
    }


def test_finds_a_python_that_runs_and_no_other(tool):
    compat = tool("compat")
    version = "{}.{}".format(*sys.version_info[:2])
    found = compat.find_python(version)
    if found is not None:  # the environment's own may be under another name
        told = subprocess.check_output([found, "--version"], text=True)
        assert told.startswith(f"Python {version}.")
    assert compat.find_python("3.2") is None


def test_a_python_that_is_not_there_is_a_row_that_says_so(tool, tmp_path, monkeypatch):
    compat = tool("compat")
    monkeypatch.setitem(compat.STACKS, "old", compat.Stack("3.2"))
    row = compat.try_stack("old", tmp_path / "s", tmp_path / "w", tmp_path / "work", [])
    assert row == {"stack": "old", "python": "3.2", "problem": "Python 3.2 is not installed"}
    assert "old: Python 3.2 is not installed" in compat.table([row])


def test_a_failed_step_is_a_row_that_says_so(tool, tmp_path, monkeypatch):
    compat = tool("compat")
    monkeypatch.setattr(compat, "find_python", lambda version: sys.executable)

    def fails(*arguments):
        raise compat.Failure("pip found no torch")

    monkeypatch.setattr(compat, "install", fails)
    row = compat.try_stack("newest", tmp_path / "s", tmp_path / "w", tmp_path / "work", [])
    assert row["problem"] == "pip found no torch"


def test_the_tests_see_the_installed_package(tool, tmp_path):
    """The source distribution's own is replaced, so that no test imports it unnoticed."""
    source = tmp_path / "source" / "d2_deform-0.1"
    (source / "d2_deform").mkdir(parents=True)
    (source / "d2_deform" / "shipped.py").touch()
    (source / "tests").mkdir()
    with tarfile.open(tmp_path / "s.tar.gz", "w:gz") as archive:
        archive.add(source, source.name)
    (tmp_path / "work").mkdir()
    tree = tool("compat").lay_out(tmp_path / "s.tar.gz", sys.executable, tmp_path / "work")
    assert (tree / "tests").is_dir()
    assert not (tree / "d2_deform" / "shipped.py").exists()
    assert (tree / "d2_deform").is_symlink()


def test_an_unknown_stack_is_refused(tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compat.py", "newset"])
    with pytest.raises(SystemExit):
        tool("compat").main()
    assert "no stack newset; there are pinned, newest, oldest" in capsys.readouterr().err
