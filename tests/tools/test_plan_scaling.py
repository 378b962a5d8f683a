"""tools/plan_scaling.py: the gradients of a network and a table."""

import pytest
from conftest import CONFIG


@pytest.fixture(scope="module")
def plan_scaling(tool):
    return tool("plan_scaling")


def test_table(plan_scaling, capsys):
    plan_scaling.main(["--config-file", CONFIG, "--step-seconds", "0.1", "--num-gpus", "1", "16"])
    lines = capsys.readouterr().out.splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[-4:]]
    assert table[0] == ["GPUs", "10 Gbit/s", "100 Gbit/s", "400 Gbit/s", "8 x 400 Gbit/s"]
    assert table[2] == ["1", *["0.0 ms, 100 %"] * 4]
    assert table[3][0] == "16"


def test_layers_that_do_not_learn_have_no_gradients(plan_scaling, tmp_path):
    frozen = tmp_path / "frozen.yaml"
    frozen.write_text(f"_BASE_: {CONFIG}\nMODEL: {{BACKBONE: {{FREEZE_AT: 1}}}}\n")
    stem = 7 * 7 * 3 * 16 + 2 * 16  # weight, batch norm
    difference = [plan_scaling.count_gradient_bytes(str(path)) for path in (CONFIG, frozen)]
    assert difference[0] - difference[1] == 4 * stem


@pytest.mark.parametrize(
    "option, message",
    [
        (("--step-seconds", "0"), "0 given, expected more than 0"),
        (("--slowest", "0.9"), "0.9 given, expected 1 or more"),
        (("--num-gpus", "0"), "0 given, expected 1 or more"),
    ],
)
def test_numbers_that_make_no_sense(plan_scaling, option, message, capsys):
    words = ["--config-file", CONFIG, "--step-seconds", "1", *option]
    with pytest.raises(SystemExit):
        plan_scaling.main(words)
    assert message in capsys.readouterr().err
