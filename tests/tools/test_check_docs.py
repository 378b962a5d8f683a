"""What the documentation tells people to run is what tools/check_docs.py runs."""

import pytest

from tools.check_docs import find_pages, is_known, read_examples, shorten, why_not

EXAMPLES = [example for page in find_pages() for example in read_examples(page)]


def test_pages_are_found():
    pages = find_pages()
    assert pages[0] == "README.md" and "docs/own_data.md" in pages
    assert {example.page for example in EXAMPLES} >= {"README.md", "docs/own_data.md"}


def test_every_command_is_run_or_has_a_reason():
    commands = [example for example in EXAMPLES if not example.is_python]
    assert len(commands) > 20
    assert [f"{c.page}: {c.text}" for c in commands if not is_known(c.text)] == []


def test_every_block_of_python_compiles():
    for example in EXAMPLES:
        if example.is_python:
            compile(example.text, example.page, "exec")


def test_a_page_is_read_by_commands(tmp_path, monkeypatch):
    monkeypatch.setattr("tools.check_docs.ROOT", str(tmp_path))
    (tmp_path / "page.md").write_text(
        "```\nmake setup   # once\npython tools/x.py --a \\\n    KEY 'a b'\ntools/  a tree\n```\n"
        "text\n```python\nx = 1\n```\n```math\npython\n```\n"
    )
    commands = read_examples("page.md")
    assert [(c.text, c.is_python) for c in commands] == [
        ("make setup", False),
        ("python tools/x.py --a KEY 'a b'", False),
        ("x = 1\n", True),
    ]
    assert not is_known("python tools/x.py")


@pytest.mark.parametrize(
    "command, short",
    [
        (
            "python tools/run_ablation.py --table 1 KEY 1",
            "python tools/run_ablation.py --iterations 2 --num-gpus 0 --seeds 1 --rows plain "
            "--table 1 KEY 1 SOLVER.IMS_PER_BATCH 2",
        ),
        ("python tools/plot_metrics.py a", "python tools/plot_metrics.py a"),
    ],
)
def test_commands_are_shortened(command, short):
    assert shorten(command) == short


def test_reasons():
    assert why_not("make test") == "tested by its own use"
    assert why_not("python tools/demo.py") is None
    assert why_not("python tools/run_ablation.py --data voc") == "needs the data set"
    assert why_not("python tools/run_ablation.py --data voc_folder") is None
    assert why_not("python tools/run_ablation.py --data digits") is None
