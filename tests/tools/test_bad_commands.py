"""Every tool is given what it cannot use: one line that names it, and no traceback."""

import os
import re
import runpy
import sys

import pytest
from conftest import CONFIG, REPOSITORY

TOOLS = os.path.join(REPOSITORY, "tools")

# Tool, its words ({folder} is an empty folder, {file} a file that is nothing), what it says
TABLE = [
    (
        "analyze_model",
        "--config-file {folder}/x.yaml",
        r"--config-file \S*x\.yaml: there is no such",
    ),
    ("analyze_model", f"--config-file {CONFIG} --picture-size 0 3", r"--picture-size: 0 given"),
    ("analyze_model", f"--config-file {CONFIG} --image {{file}}", r"{file}"),
    (
        "compare_studies",
        "{folder}/x {folder}/y --output {folder}/z",
        r"/x/settings\.json: there is no such file",
    ),
    ("compare_studies", "{folder} {file} --output {folder}/z", r"{folder}/settings\.json"),
    ("compare_studies", "{folder} --output {folder}/z", r"alone given, expected two studies"),
    ("crop_objects", "{folder}/x --output {folder}/y", r"/x"),
    ("crop_objects", "{folder} --output {folder}", r"{folder} exists"),
    ("demo", f"--config-file {CONFIG} --input {{file}}", r"MODEL\.WEIGHTS"),
    (
        "demo",
        f"--config-file {CONFIG} --input {{folder}}/x.jpg --opts MODEL.WEIGHTS {{file}}",
        r"x\.jpg|cannot be read as weights",
    ),
    (
        "convert_checkpoint",
        f"--from mmdet --input {{folder}}/x.pth --config-file {CONFIG} --output {{folder}}/y.pth",
        r"x\.pth",
    ),
    (
        "convert_checkpoint",
        f"--from mmdet --input {{file}} --config-file {CONFIG} --output {{folder}}/y.pth",
        r"{file}",
    ),
    ("dump_proposals", f"--config-file {CONFIG} --output {{folder}}", r"RFCN|PROPOSAL|WEIGHTS"),
    ("effective_dilation", f"--config-file {CONFIG} --output {{file}}/x", r"WEIGHTS|{file}/x"),
    (
        "export_model",
        f"--config-file {CONFIG} --format onnx --output {{folder}}/x.onnx",
        r"MODEL\.WEIGHTS is empty",
    ),
    (
        "export_model",
        f"--config-file {CONFIG} --format onnx --output {{folder}}/x.onnx MODEL.WEIGHTS {{file}}",
        r"{file} cannot be read as weights",
    ),
    (
        "make_deformed_digits",
        "--output {folder}/x --num-images 0",
        r"num_images is 0; expected 1 or more",
    ),
    ("make_deformed_digits", "--output {file}/x --num-images 1", r"{file}"),
    ("plan_scaling", "--config-file {folder}/x.yaml --step-seconds 1", r"x\.yaml"),
    ("plot_metrics", "{folder}/x --output {folder}/y.png", r"/x"),
    ("plot_metrics", "{file} --output {folder}/y.png", r"{file}"),
    ("prepare_voc_aug", "--voc {folder}", r"{folder}\S* is missing"),
    ("pretrain_classifier", f"--num-gpus 0 --config-file {CONFIG}", r"META_ARCHITECTURE is RFCN"),
    ("quickstart", "--config-file {folder}/x.yaml", r"x\.yaml: there is no such file"),
    ("run_ablation", "--table 1 --method rfcn --data cityscapes", r"rfcn on cityscapes"),
    ("run_ablation", "--table 1 --method rfcn --data digits --output {file}", r"{file}"),
    ("train_net", "--num-gpus 0 --config-file {folder}/x.yaml", r"x\.yaml: there is no such file"),
    ("train_net", f"--num-gpus 0 --config-file {CONFIG} SEED", r"'SEED' has no value"),
    ("train_net", "--num-gpus 99", r"--num-gpus 99: this machine has"),
    (
        "train_net",
        f"--num-gpus 0 --config-file {CONFIG} OUTPUT_DIR {{file}}/x",
        r"OUTPUT_DIR: {file}/x cannot be written to",
    ),
    (
        "train_net",
        f"--num-gpus 0 --config-file {CONFIG} --eval-only OUTPUT_DIR {{folder}} "
        "MODEL.WEIGHTS {file}",
        r"{file} cannot be read as a checkpoint",
    ),
    ("visualize_offsets", f"--config-file {CONFIG} --input {{file}}", r"{file}: .* as a picture"),
    ("visualize_offsets", f"--config-file {CONFIG} --layers 0 {{file}}", r"--layers"),
    ("kill_and_resume", "--kills 0", r"--kills: 0 given, expected 1 or more"),
]

# Tools with nothing in the table, and why
EXEMPT = {
    "build_wheel": "a make target of the developers",
    "check_cuda": "a make target of the developers",
    "check_docs": "a make target of the developers",
    "compat": "a make target of the developers",
    "lock_requirements": "a make target of the developers",
    "mkdocs_hooks": "MkDocs calls it",
    "publish_model": "for the developers",
    "sanitize": "a make target of the developers",
    "setup_env": "works before torch is there: tests/tools/test_setup_env.py",
    "soak": "for the developers",
}


def test_no_tool_is_forgotten():
    tools = {name.removesuffix(".py") for name in os.listdir(TOOLS) if name.endswith(".py")}
    assert tools <= {name for name, *_ in TABLE} | EXEMPT.keys()


@pytest.mark.parametrize(
    "name, words, says", TABLE, ids=[f"{r[0]}-{i}" for i, r in enumerate(TABLE)]
)
def test_one_line_says_what_is_wrong(name, words, says, tmp_path, monkeypatch, capfd):
    file = tmp_path / "nothing"
    file.write_bytes(b"nothing\n")
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    given = [word.format(folder=folder, file=file) for word in words.split()]
    script = os.path.join(TOOLS, f"{name}.py")
    monkeypatch.setattr(sys, "argv", [script, *given])
    monkeypatch.syspath_prepend(TOOLS)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    said = ended.value.code if isinstance(ended.value.code, str) else capfd.readouterr().err
    assert ended.value.code != 0 and "Traceback" not in said
    line = said.strip().splitlines()[-1]
    assert re.search(says.format(folder=folder, file=file), line), line
