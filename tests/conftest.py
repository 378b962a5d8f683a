"""What the whole suite shares."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

# The same examples in every run, as many as take a few seconds; `--hypothesis-profile=many`
# (tools/sanitize.py) draws others each time.
settings.register_profile("few", max_examples=30, derandomize=True, deadline=None, database=None)
settings.register_profile("many", max_examples=400, deadline=None, database=None)
settings.load_profile("few")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the parameters of every config that was built (tests/modeling/test_configs_on_...)."""
    rows = sorted(_parameters(terminalreporter), key=lambda row: row["config"])
    if not rows:
        return
    terminalreporter.section("parameters of every config, millions")
    for row in rows:
        total, offsets = row["parameters"] / 1e6, row["offsets"] / 1e6
        terminalreporter.write_line(f"{row['config']:62}{total:9.3f}{offsets:9.3f} in offsets")


def _parameters(reporter: pytest.TerminalReporter) -> Iterator[dict[str, Any]]:
    for report in reporter.stats.get("passed", []):
        properties = dict(report.user_properties)
        if report.when == "call" and "parameters" in properties:
            yield properties
