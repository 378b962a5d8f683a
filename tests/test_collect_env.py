"""``python -m d2_deform.collect_env``."""

import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from d2_deform import ops
from d2_deform.collect_env import collect_env_info

FILE = Path(ops.__file__).resolve().parents[1] / "collect_env.py"


def row(report: str, name: str) -> str:
    (value,) = re.findall(rf"(?m)^{name}\s+(.*)$", report.partition("\n\n")[0])
    return value


def test_tells_of_the_plugin_and_of_detectron2():
    report = collect_env_info()
    assert row(report, "d2_deform").startswith(version("d2_deform"))
    assert row(report, "CPU operators") == "_C.abi3.so"
    assert row(report, "operators run on") == ", ".join(sorted(ops.built_devices()))
    assert row(report, "CPU capability") == ops.cpu_capability()
    assert row(report, "torch") == version("torch")
    assert re.search(r"sys\.platform +linux", report)


def test_tells_how_the_library_was_built():
    report = collect_env_info()
    assert re.match(r"torch \d+\.\d+.*, .*\d", row(report, "built with"))
    assert "-DTORCH_TARGET_VERSION=0x020a000000000000" in row(report, "flags of _C")


def test_without_libraries_the_file_tells_why_they_do_not_load(tmp_path):
    package = tmp_path / "d2_deform"
    ignored = shutil.ignore_patterns("*.so", "_C_build.json", "__pycache__")
    shutil.copytree(FILE.parent, package, ignore=ignored)
    command = [sys.executable, str(package / "collect_env.py")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert row(result.stdout, "CPU operators") == "not built"
    assert "the compiled operators (_C*.so) are not in" in row(result.stdout, "operators")
    assert row(result.stdout, "torch") == version("torch")
