"""Every example of docs/layers.md runs as it stands there."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "layers.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_the_page_has_examples():
    assert len(EXAMPLES) == PAGE.read_text().count("```python") >= 10


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example(number):
    example = EXAMPLES[number]
    for library in ("timm", "torchvision", "fvcore"):
        if f"import {library}\n" in example:
            pytest.importorskip(library)
    exec(compile(example, f"example {number} of layers.md", "exec"), {})
