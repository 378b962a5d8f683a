"""tools/make_deformed_digits.py from the command line."""

import os
import subprocess
import sys

from conftest import REPOSITORY


def test_contact_sheet_in_a_new_folder(tool, tmp_path, monkeypatch):
    sheet = tmp_path / "new" / "sheet.png"
    words = ["--output", tmp_path / "digits", "--num-images", 2, "--contact-sheet", sheet]
    monkeypatch.setattr(sys, "argv", ["make_deformed_digits.py", *map(str, words)])
    tool("make_deformed_digits").main()
    assert sheet.exists()


def test_a_flawed_value_gets_one_line(tmp_path):
    script = os.path.join(REPOSITORY, "tools", "make_deformed_digits.py")
    done = subprocess.run(
        [sys.executable, script, "--output", str(tmp_path / "digits"), "--num-images", "0"],
        env={**os.environ, "PYTHONPATH": REPOSITORY},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "error: num_images is 0; expected 1 or more." in done.stderr
    assert "Traceback" not in done.stderr
