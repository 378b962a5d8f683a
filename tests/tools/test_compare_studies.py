"""tools/compare_studies.py on small folders as tools/run_ablation.py leaves them."""

import json

import pytest

from d2_deform.engine import ConfigError

FIGURES = {  # mIoU of seeds 1, 2, 3
    "digits_warp0": {"plain": (50.0, 51.0, 52.0), "dconv3": (50.0, 52.0, 51.0)},
    "digits": {"plain": (40.0, 41.0, 42.0), "dconv3": (43.0, 44.0, 45.0)},
    "digits_warp8": {"plain": (30.0, 31.0, 32.0), "dconv3": (35.0, 37.0)},
}


@pytest.fixture
def folders(tmp_path):
    for data, rows in FIGURES.items():
        folder = tmp_path / data
        folder.mkdir()
        settings = {"method": "deeplab", "data": data, "processes": 1, "rows": dict.fromkeys(rows)}
        settings["config"] = {"SOLVER.MAX_ITER": 2400, "DATASETS.TEST": [f"deformed_{data}_test"]}
        (folder / "settings.json").write_text(json.dumps(settings))
        lines = [
            f"{row},{seed},{figure}\n"
            for row, figures in rows.items()
            for seed, figure in enumerate(figures, 1)
        ]
        (folder / "runs.csv").write_text("".join(["row,seed,sem_seg/mIoU\n", *lines]))
    return [str(tmp_path / data) for data in FIGURES]


def test_writes_and_tells_the_comparison(tool, folders, tmp_path, capsys):
    output = tmp_path / "output" / "strength"
    words = [*folders, "--output", str(output)]
    tool("compare_studies").main([*words, "--rows", "dconv3"])
    said = capsys.readouterr().out
    table = (output / "comparison.md").read_text()
    assert table in said and table.startswith("# deeplab on digits_warp0, digits, digits_warp8\n")
    assert (
        "| dconv3 | digits       | 3      | 44.00 ± 1.00 | 41.52 to 46.48 | +3.00 ± 0.00" in table
    )
    assert table.endswith("\ndigits_warp8: dconv3 has no finished run of seed 3.\n")
    assert (output / "comparison.csv").read_text().count("\n") == 1 + 2 * 3
    assert (output / "comparison.png").read_bytes().startswith(b"\x89PNG")
    tool("compare_studies").main(words)  # all rows, the same files
    assert capsys.readouterr().out == said


def test_nothing_is_overwritten(tool, folders, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    (output / "comparison.csv").write_text("mine\n")
    with pytest.raises(ConfigError, match=r"comparison.csv exists with other contents and stays"):
        tool("compare_studies").main([*folders, "--output", str(output)])
    assert [path.name for path in output.iterdir()] == ["comparison.csv"]
    assert (output / "comparison.csv").read_text() == "mine\n"


def test_studies_that_cannot_be_compared(tool, folders, tmp_path):
    output = tmp_path / "output"
    main = tool("compare_studies").main
    with pytest.raises(ConfigError, match=r"digits is given twice"):
        main([*folders, folders[1], "--output", str(output)])
    with pytest.raises(ConfigError, match=r"--rows dil8: \S+digits_warp0 has no finished run"):
        main([*folders, "--output", str(output), "--rows", "plain", "dil8"])
    settings = json.loads((tmp_path / "digits" / "settings.json").read_text())
    settings["config"]["SOLVER.MAX_ITER"] = 600
    (tmp_path / "digits" / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"digits: SOLVER.MAX_ITER is 600, 2400 in "):
        main([*folders, "--output", str(output)])
    settings["method"] = "yolo"
    (tmp_path / "digits_warp0" / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"digits_warp0: yolo on digits: there is no such study"):
        main([*folders, "--output", str(output)])
    assert not output.exists()
