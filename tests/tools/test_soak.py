"""tools/soak.py: what it says of a run, and that it draws it. The runs themselves take minutes."""

import json

import pytest

from d2_deform.analysis.process_usage import Usage


@pytest.fixture(scope="module")
def soak(tool):
    return tool("soak")


def usages(allocated=(100.0,) * 8, files=(7,) * 8, threads=(2,) * 8):
    return [
        Usage(10 * (n + 1), 60.0 * n, 500.0, *values, children=0, children_memory=0.0)
        for n, values in enumerate(zip(allocated, files, threads, strict=True))
    ]


@pytest.mark.parametrize(
    "changed, grew, text",
    [
        ({}, False, "80 in 7.0 minutes;"),
        ({"allocated": (50, 90, *[100] * 4, 100, 101)}, False, "in use 101 MiB (+1.0)"),
        (
            {"allocated": (50, 90, *[100] * 4, 103, 102)},
            True,
            "500 MiB (+0.0), in use 102 MiB (+3.0)",
        ),
        ({"files": (*[7] * 7, 8)}, True, "file handles 8 (+1), threads 2 (+0)"),
        ({"threads": (*[2] * 6, 3, 2)}, True, "threads 2 (+1)"),
    ],
)
def test_summary(soak, changed, grew, text):
    line, found = soak.summarize("predictions", usages(**changed))
    assert found is grew and text in line


def test_values_and_picture(soak, tmp_path):
    soak.write({"training iterations": usages(), "predictions": usages()}, str(tmp_path))
    with open(tmp_path / "usage.json") as file:
        values = json.load(file)
    assert values["predictions"][0] == usages()[0]._asdict()
    assert (tmp_path / "usage.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "words", [("--iterations", "39"), ("--iterations", "0", "--predictions", "0")]
)
def test_too_short_a_run(soak, words, tmp_path, capsys):
    with pytest.raises(SystemExit):
        soak.main(["--output", str(tmp_path), *words])
    assert "0 or at least 40, not both 0" in capsys.readouterr().err
