"""Folders of studies, read and compared."""

import json

import pytest

from d2_deform.engine import ConfigError
from d2_deform.engine.study_folder import (
    StudyFolder,
    check_same_but_data,
    differing_settings,
    read_study,
)

SETTINGS = {
    "method": "rfcn",
    "data": "digits",
    "processes": 1,
    "config": {"SOLVER.MAX_ITER": 2400, "DATASETS.TEST": ["deformed_digits_test"]},
    "rows": {"plain": {"MODEL.DEFORM.NUM_LAYERS": 0}, "wide": {"MODEL.RFCN.CONV_DIM": 363}},
}
RUNS = "row,seed,torch,bbox/AP,bbox/AP50\nplain,1,2.14.1,,60.5\nplain,2,2.14.1,40.0,nan\n"


def study(folder="study", results=None, **changes):
    results = results or {"plain": {1: {"bbox/AP50": 60.0}}}
    return StudyFolder(folder, {**SETTINGS, **changes}, results)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    (tmp_path / "runs.csv").write_text(RUNS)
    return tmp_path


def test_reads_settings_and_figures(folder):
    found = read_study(str(folder))
    assert found.settings == SETTINGS
    assert found.results["plain"][1] == {"bbox/AP50": 60.5}
    assert repr(found.results["plain"][2]) == "{'bbox/AP': 40.0, 'bbox/AP50': nan}"
    (folder / "runs.csv").write_text("\n")  # as it is before the first run is done
    assert read_study(str(folder)).results == {}


@pytest.mark.parametrize(
    "name, content",
    [
        ("settings.json", "{"),
        ("settings.json", "[1]"),
        ("settings.json", '{"method": "rfcn"}'),
        ("runs.csv", "seed,bbox/AP50\n1,60.0\n"),
        ("runs.csv", "row,seed,bbox/AP50\nplain,one,60.0\n"),
        ("runs.csv", "row,seed,bbox/AP50\nplain,1,good\n"),
        ("runs.csv", "row,seed,bbox/AP50\nplain,1,60.0,61.0\n"),
        ("runs.csv", "nothing\n"),
    ],
)
def test_files_that_are_something_else(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(ConfigError, match=rf"{name} cannot be read as tools/run_ablation.py"):
        read_study(str(folder))


def test_missing_files(folder):
    (folder / "runs.csv").unlink()
    for path in (folder, folder / "settings.json", folder / "nowhere"):
        with pytest.raises(ConfigError, match=r"there is no such file; expected a folder that"):
            read_study(str(path))


def test_settings_differ_in_what_both_know():
    now = {**SETTINGS, "processes": 8, "config": {"SOLVER.MAX_ITER": 1200, "NEW.KEY": 1}}
    assert differing_settings(SETTINGS, now) == [
        ("processes", 1, 8),
        ("SOLVER.MAX_ITER", 2400, 1200),
    ]
    assert differing_settings({"rows": {}}, SETTINGS) == []


def test_studies_may_differ_in_data_and_in_rows_that_do_not_matter():
    bent = {**SETTINGS["config"], "DATASETS.TEST": ["deformed_digits_warp8_test"]}
    rows = {**SETTINGS["rows"], "wide": {"MODEL.RFCN.CONV_DIM": 400}}
    other = study("other", data="digits_warp8", config=bent, rows=rows)
    check_same_but_data([study(), other], ["plain"], ["bbox/AP50"])
    with pytest.raises(ConfigError, match=r"other: wide is \{.*400\}, \{.*363\} in study; studies"):
        check_same_but_data([study(), other], ["plain", "wide"], [])


def test_studies_that_differ_in_more_than_data():
    config = {**SETTINGS["config"], "SOLVER.MAX_ITER": 1200}
    with pytest.raises(ConfigError, match=r"other: SOLVER.MAX_ITER is 1200, 2400 in study; "):
        check_same_but_data([study(), study("other", config=config)], ["plain"], [])
    other = study("other", config=config, method="deeplab")
    with pytest.raises(ConfigError, match=r"other: method is deeplab, rfcn in study and 1 more"):
        check_same_but_data([study(), other], ["plain"], [])


def test_rows_and_figures_that_are_not_there():
    with pytest.raises(ConfigError, match=r"--rows dconv3: study has no .* with runs: plain\."):
        check_same_but_data([study()], ["plain", "dconv3"], [])
    with pytest.raises(ConfigError, match=r"study: plain seed 1 has no figure bbox/AP70"):
        check_same_but_data([study()], ["plain"], ["bbox/AP50", "bbox/AP70"])
