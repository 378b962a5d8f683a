#!/usr/bin/env python
"""Run every command and Python example of the documentation, each page in a folder of its own.

    python tools/check_docs.py                          # all pages: 37 minutes, beside other work
    python tools/check_docs.py docs/own_data.md         # one

Commands run as they stand, but short: `SHORTER` has what each tool is given besides. Data, pictures
and weights that a page takes for granted ("path/to/folder") are made by `make_workspace`. What
cannot run here is listed with the reason. Exit status 1: something failed, or is not known.
"""

import argparse
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from glob import glob

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

_DIGITS = ["DATASETS.TEST", "('deformed_digits_val',)"]
_STEPS = ["SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()", "SOLVER.WARMUP_ITERS", "1"]

# What is put behind a command (KEY VALUE options come last in every tool), by the text it holds;
# the first that fits
SHORTER: dict[str, list[str]] = {
    "tools/train_net.py": _STEPS,
    "tools/pretrain_classifier.py": [*_STEPS, "SOLVER.IMS_PER_BATCH", "8"],
    "tools/run_ablation.py": ["SOLVER.IMS_PER_BATCH", "2"],
}
# Flags put right behind the tool's name, before those of the page. argparse takes the last one.
FLAGS: dict[str, list[str]] = {
    "tools/run_ablation.py": [
        "--iterations",
        "2",
        "--num-gpus",
        "0",
        "--seeds",
        "1",
        "--rows",
        "plain",
    ],
}
# Words of a command in place of others
INSTEAD = {"--num-gpus 8": "--num-gpus 0", "--seeds 1 2 3": "--seeds 1"}
# Why a command is not run here
NOT_RUN = {
    r"make (setup|test|lint|format|quickstart)\b": "tested by its own use",
    r"make (benchmark|cuda|docs|docs-check|sanitize|compat|wheel)\b": "long, or bound to a machine",
    r"pip install|python setup\.py": "changes the environment",
    r"source ": "changes the shell",
    r".*(--input|WEIGHTS) (rfcn_dcn|faster_rcnn_m?d)": "others' files; tests/checkpoint",
    r"python -m pytest": "make test",
    r"git clone": "no network",
    r"python tools/run_ablation.py .*--data (voc|cityscapes)\b": "needs the data set",
    r"python tools/run_ablation.py .*--data digits_warp": "minutes for its data set",
    r"(\w+=\S+ )*(torchrun|srun|sbatch)\b|.* --num-machines": "several machines",
    r"python tools/soak\.py": "long",
}
_COMMAND = re.compile(r"^([A-Z_0-9]+=\S* )*(python|pip|make|git|source|torchrun|srun|sbatch)\b")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Example:
    """A command, or a block of Python.

    Attributes:
        page: relative to the repository.
        text: one command without its comment, or the whole block.
        is_python: which of the two.
    """

    page: str
    text: str
    is_python: bool

    @property
    def title(self) -> str:
        return self.text.strip().splitlines()[0] if self.is_python else self.text


def find_pages() -> list[str]:
    """README.md and its like first."""
    pages = ["README.md", "CONTRIBUTING.md", "csrc/README.md"]
    found = glob("docs/**/*.md", root_dir=ROOT, recursive=True)
    return [*pages, *sorted(found)]


def read_examples(page: str) -> list[Example]:
    """The commands and Python blocks of a page, in their order."""
    with open(os.path.join(ROOT, page)) as file:
        text = file.read()
    examples = []
    for language, body in _BLOCK.findall(text):
        if language == "python":
            examples.append(Example(page, body, True))
        elif language in ("", "sh", "bash", "shell"):
            for line in body.replace("\\\n", " ").splitlines():
                command = " ".join(re.sub(r"(^|\s)#\s.*", "", line).split())
                if _COMMAND.match(command):
                    examples.append(Example(page, command, False))
    return examples


def why_not(command: str) -> str | None:
    """Why a command is not run, or None."""
    return next((why for what, why in NOT_RUN.items() if re.match(what, command)), None)


def is_known(command: str) -> bool:
    """Whether a command is one that this script runs, or says why not."""
    tool = re.match(r"python (-m benchmarks\.\w+|-m d2_deform\.\w+|tools/\w+\.py)", command)
    if tool and tool.group(1).startswith("tools/"):
        return os.path.exists(os.path.join(ROOT, tool.group(1)))
    return bool(tool) or why_not(command) is not None


def shorten(command: str) -> str:
    """A command as it is run."""
    for words, others in INSTEAD.items():
        command = command.replace(words, others)
    for tool, flags in FLAGS.items():
        command = command.replace(tool, shlex.join([tool, *flags]))
    for part, options in SHORTER.items():
        if part in command:
            return f"{command} {shlex.join(options)}"
    return command


def make_workspace(folder: str) -> None:
    """A checkout's tools and configs by links, and what the pages take for granted."""
    import cv2
    import torch
    from detectron2.data import DatasetCatalog
    from detectron2.utils.file_io import PathManager
    from torchvision.models import resnet50

    from d2_deform import model_zoo
    from d2_deform.data import write_deformed_digits

    for name in os.listdir(ROOT):
        if not name.startswith(".") and name not in ("output", "build", "dist"):
            os.symlink(os.path.join(ROOT, name), os.path.join(folder, name))
    trained = os.path.join(folder, "output", "quickstart")  # as the quick start leaves it
    os.makedirs(trained)
    config = model_zoo.get_config("quickstart.yaml")
    weights = PathManager.get_local_path(model_zoo.get_checkpoint_url("quickstart.yaml"))
    shutil.copy(weights, os.path.join(trained, "model_final.pth"))
    with open(os.path.join(trained, "config.yaml"), "w") as file:
        file.write(config.dump())
    with open(os.path.join(trained, "metrics.json"), "w") as file:
        file.write('{"iteration": 19, "total_loss": 2.0}\n{"iteration": 39, "total_loss": 1.0}\n')
    for name in ("config.yaml", "model_final.pth"):
        os.symlink(os.path.join("quickstart", name), os.path.join(folder, "output", name))

    pictures = [record["file_name"] for record in DatasetCatalog.get("deformed_digits_val")[:3]]
    for name, path in zip(["picture.jpg", "a.jpg", "b.jpg"], pictures, strict=True):
        cv2.imwrite(os.path.join(folder, name), cv2.resize(cv2.imread(path), (384, 384)))
    voc = os.path.join(folder, "path", "to", "folder")
    write_deformed_digits(voc, "train", 8)
    with open(os.path.join(voc, "ImageSets", "Main", "test.txt"), "w") as file:
        file.write("000000\n000001\n")
    for split in ("train", "val"):
        for number, path in enumerate(pictures):
            of_class = os.path.join(folder, "path", "to", "imagenet", split, str(number % 2))
            os.makedirs(of_class, exist_ok=True)
            picture = cv2.resize(cv2.imread(path), (256, 256))
            cv2.imwrite(os.path.join(of_class, f"{number}.png"), picture)
    for data in ("digits_warp0", "digits", "digits_warp8"):  # studies, as far as they are read
        study = os.path.join(folder, "output", "ablation", f"{data}_deeplab")
        os.makedirs(study)
        with open(os.path.join(study, "settings.json"), "w") as file:
            of_all = {"method": "deeplab", "processes": 1, "config": {}, "rows": {}}
            json.dump({"data": data, **of_all}, file)
        with open(os.path.join(study, "runs.csv"), "w") as file:
            file.write("row,seed,sem_seg/mIoU\nplain,1,50.0\ndconv3,1,51.0\n")
    # Weights to be downloaded, or somebody's own: with none in them, a network keeps its start
    zoo = os.path.join(folder, "cache", "detectron2", "ImageNetPretrained", "MSRA")
    os.makedirs(zoo)
    for path in (f"{zoo}/R-50.pkl", f"{zoo}/R-101.pkl", f"{folder}/path/to/backbone.pkl"):
        with open(path, "wb") as file:
            pickle.dump({"model": {}, "__author__": "tools/check_docs.py"}, file)
    torch.save(resnet50().state_dict(), os.path.join(folder, "resnet50.pth"))


def run_command(command: str, folder: str) -> str:
    """Runs one command; empty, or what went wrong."""
    python = f'python() {{ "{sys.executable}" -W ignore "$@"; }}\n'
    done = subprocess.run(
        ["bash", "-c", python + shorten(command)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": ROOT, "FVCORE_CACHE": os.path.join(folder, "cache")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return ""
    lines = (done.stdout + done.stderr).strip().splitlines() or ["it printed nothing"]
    return f"exit {done.returncode}: {lines[-1]}"


# What examples take for granted
_NAMES = """
import cv2, torch
from detectron2.data import build_detection_train_loader
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from d2_deform.engine import load_config
image = cv2.imread("picture.jpg")
predictor = DefaultPredictor(
    load_config("configs/quickstart.yaml", ["MODEL.WEIGHTS", "output/quickstart/model_final.pth"])
)
model = build_model(predictor.cfg)
batch = next(iter(build_detection_train_loader(predictor.cfg)))
EventStorage().__enter__()  # as within a training
"""


def run_python(blocks: list[Example], folder: str) -> str:
    """Runs a page's Python, one block after the other, in one process."""
    script = os.path.join(folder, "page.py")
    with open(script, "w") as file:
        file.write("\n\n".join([_NAMES, *(block.text for block in blocks)]))
    return run_command("python page.py", folder)


def check(page: str) -> tuple[int, int, int]:
    """How many examples of a page ran, failed, and were not run."""
    ran = failed = left = 0
    examples = read_examples(page)
    if not examples:
        return 0, 0, 0
    blocks = [example for example in examples if example.is_python]
    jobs = [(example.title, example) for example in examples if not example.is_python]
    with tempfile.TemporaryDirectory() as folder:
        make_workspace(folder)
        for title, example in [
            *jobs,
            *([(f"{len(blocks)} Python blocks", None)] if blocks else []),
        ]:
            start = time.monotonic()
            reason = why_not(example.text) if example else None
            if reason:
                left += 1
                print(f"{page}: {title}: not run: {reason}", flush=True)
                continue
            wrong = run_command(example.text, folder) if example else run_python(blocks, folder)
            ran, failed = ran + 1, failed + bool(wrong)
            seconds = time.monotonic() - start
            print(f"{page}: {title}: {wrong or 'ok'} ({seconds:.0f} s)", flush=True)
    return ran, failed, left


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pages", nargs="*", help="Markdown files; default: all")
    pages = parser.parse_args().pages or find_pages()
    pages = [os.path.relpath(os.path.abspath(page), ROOT) for page in pages]
    ran, failed, left = map(sum, zip(*map(check, pages), strict=True))
    print(f"docs: {ran} commands and pages of Python ran, {failed} failed, {left} were not run")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
