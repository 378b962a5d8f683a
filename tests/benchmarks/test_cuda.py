"""benchmarks.cuda and tools/check_cuda.py, as far as they go without a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.convolution import RES5, convolution_cases
from benchmarks.gpu.pooling import pooling_cases
from benchmarks.gpu.report import judge, report
from benchmarks.gpu.roofline import floor

ROOT = Path(__file__).resolve().parents[2]
PEAK = {"fp32": 6e13, "tf32": 4e14, "fp16": 8e14, "bf16": 8e14, "bandwidth": 3e12}


def times(**medians: float) -> dict:
    return {name: {"median": median, "host": median} for name, median in medians.items()}


def test_work_of_res5() -> None:
    """Products of 11.3 GFLOP a picture, twice that backward; 8 FLOP a sample, 24 backward."""
    forward, backward = (RES5.case(8, "bf16", backward) for backward in (False, True))
    pixels = 8 * 38 * 63
    assert forward.flop == 2 * pixels * 512**2 * 9 + 8 * pixels * 512 * 9
    assert backward.flop == 4 * pixels * 512**2 * 9 + 24 * pixels * 512 * 9
    maps, weight, offsets = 2 * pixels * 512, 2 * 512**2 * 9, 4 * pixels * 72
    assert forward.moved == 2 * maps + weight + offsets
    assert backward.moved == 3 * maps + 2 * weight + 2 * offsets
    row = floor(forward, PEAK, times(ours=1.0))
    assert row["floor"] == pytest.approx(1e3 * forward.flop / 8e14)
    assert row["share"] == pytest.approx(row["floor"])


def test_goals_are_judged_and_told() -> None:
    row = {
        "case": "res5, batch 8, bf16",
        "times": times(ours=0.3, dense=0.1),
        "figures": {"ours / dense": 3.0, "dense / ours": 1 / 3},
        "absent": {"torchvision": "not for this type"},
        "floor": 0.1,
        "share": 1 / 3,
    }
    goals = judge("convolution forward", row)
    assert [(goal["figure"], goal["met"]) for goal in goals] == [("ours / dense", False)]
    text = report(
        {
            "measured": "today",
            "commit": "abc",
            "machine": {"device": "a GPU"},
            "peaks": PEAK,
            "parts": {"convolution forward": [row]},
            "goals": goals,
        }
    )
    assert "| res5, batch 8, bf16 | 0.300 | 0.100 | 0.300 | 0.100 | 33% |" in text
    assert "- convolution forward, res5, batch 8, bf16: ours / dense = 3.00, goal <= 1.5" in text
    assert "- torchvision: not for this type" in text


def test_cases_have_names_of_their_own() -> None:
    cases = [*convolution_cases(quick=False), *pooling_cases(quick=False)]
    assert len({(case.part, case.name) for case in cases}) == len(cases) == 140
    assert len(list(convolution_cases(quick=True))) == 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "command", [("-m", "benchmarks.cuda"), ("tools/check_cuda.py",)], ids=["benchmark", "check"]
)
def test_without_a_gpu_it_says_so(command: tuple[str, ...]) -> None:
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "GPU" in result.stderr.splitlines()[-1]
