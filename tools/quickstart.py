#!/usr/bin/env python
"""Train a small deformable R-FCN on Deformed Digits, evaluate it and predict with it.

`make quickstart` runs this. Trainer, evaluator and DefaultPredictor are Detectron2's. Options at
the end change the config, e.g. `tools/quickstart.py MODEL.DEFORM.NUM_LAYERS 0`.
"""

import argparse
import datetime
import json
import os
import sys
import tempfile
import time
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultPredictor

from d2_deform.engine import ConfigError, DeformTrainer, setup
from d2_deform.visualization import draw_prediction_figure

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NUM_PICTURES = 3  # the first of the test set


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--config-file",
        default=os.path.join(REPOSITORY, "configs", "quickstart.yaml"),
        metavar="FILE",
    )
    parser.add_argument("--output", metavar="FOLDER", help="instead of the config's OUTPUT_DIR")
    parser.add_argument("--iterations", type=int, help="instead of the config's SOLVER.MAX_ITER")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config options, KEY VALUE ...")
    return parser


def read_config(args: argparse.Namespace) -> CfgNode:
    opts = list(args.opts)
    if args.output:
        opts += ["OUTPUT_DIR", args.output]
    if args.iterations is not None:
        opts += ["SOLVER.MAX_ITER", str(args.iterations)]
    return setup(
        argparse.Namespace(
            config_file=args.config_file, opts=opts, num_gpus=1, resume=False, eval_only=False
        )
    )


def train(cfg: CfgNode) -> tuple[DeformTrainer, float]:
    """Trains from the beginning.

    Returns:
        The trainer, and the seconds that training took.
    """
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.TEST.EVAL_PERIOD == 0:
        cfg.DATASETS.TEST = ()  # evaluated by a step of its own, so that its time is its own
    trainer = DeformTrainer(cfg)
    trainer.resume_or_load(resume=False)
    start = time.perf_counter()
    trainer.train()
    return trainer, time.perf_counter() - start


def draw_pictures(cfg: CfgNode, weights: str, path: str) -> None:
    """Predicts the first test pictures as any user of the weights would, and draws them."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = weights
    predictor = DefaultPredictor(cfg)
    rows = []
    for record in DatasetCatalog.get(cfg.DATASETS.TEST[0])[:NUM_PICTURES]:
        image = cv2.imread(record["file_name"], cv2.IMREAD_COLOR)
        assert image is not None, record["file_name"]
        rows.append(draw_prediction_figure(predictor, image))
    width = max(row.shape[1] for row in rows)
    rows = [
        np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255)
        for row in rows
    ]
    cv2.imwrite(path, np.vstack(rows)[:, :, ::-1])


def write_json(path: str, content: dict[str, Any]) -> None:
    """Writes the file whole or not at all."""
    folder = os.path.dirname(path)
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
        json.dump(content, file, indent=2)
        file.write("\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = get_parser().parse_args(argv)

    def say(step: str) -> None:
        print(f"\n==> {step}", flush=True)

    say("Quick start: a deformable R-FCN on Deformed Digits, from scratch")
    cfg = read_config(args)
    output = os.path.abspath(cfg.OUTPUT_DIR)
    summary_path = os.path.join(output, "summary.json")
    if os.path.exists(summary_path):
        os.remove(summary_path)  # it would tell of an earlier run if this one failed

    say(f"1/4 Data: {', '.join((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))}, made where missing")
    numbers = {
        name: len(DatasetCatalog.get(name)) for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    }
    print(", ".join(f"{name}: {number} pictures" for name, number in numbers.items()))

    say(
        f"2/4 Training: {cfg.SOLVER.MAX_ITER} iterations of {cfg.SOLVER.IMS_PER_BATCH} pictures on "
        f"{cfg.MODEL.DEVICE}, {torch.get_num_threads()} thread(s)"
    )
    trainer, train_seconds = train(cfg)
    weights = os.path.join(output, "model_final.pth")

    say(f"3/4 Evaluating on {', '.join(cfg.DATASETS.TEST)}")
    start = time.perf_counter()
    results = DeformTrainer.test(cfg, trainer.model)["bbox"]
    test_seconds = time.perf_counter() - start

    say("4/4 Predicting with DefaultPredictor")
    picture = os.path.join(output, "prediction.png")
    draw_pictures(cfg, weights, picture)

    summary = {
        **{metric: round(float(value), 2) for metric, value in results.items()},
        "iterations": cfg.SOLVER.MAX_ITER,
        "train_seconds": round(train_seconds, 1),
        "test_seconds": round(test_seconds, 1),
        "device": cfg.MODEL.DEVICE,
        "threads": torch.get_num_threads(),
        "pictures": numbers,
        "picture": picture,
        "weights": weights,
        "config": os.path.join(output, "config.yaml"),
        "log": os.path.join(output, "log.txt"),
    }
    write_json(summary_path, summary)

    duration = datetime.timedelta(seconds=round(train_seconds))
    say(f"Done: AP50 {summary['AP50']}, AP {summary['AP']} after {duration} of training")
    for title, path in {
        "Summary": summary_path,
        "Picture": picture,
        "Weights": weights,
        "Config": summary["config"],
        "Log": summary["log"],
    }.items():
        print(f"{title + ':':9}{path}")
    return summary


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
