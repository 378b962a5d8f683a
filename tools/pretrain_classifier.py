#!/usr/bin/env python
"""Train a backbone as an image classifier, for detectors to start from (docs/pretraining.md).

    python tools/pretrain_classifier.py --config-file configs/ImageNet-Classification/<name>.yaml \\
        --num-gpus 8 DATASETS.IMAGE_FOLDER.ROOT <folder with train/ and val/> [KEY VALUE ...]
    python tools/pretrain_classifier.py --config-file ... --resume ...
    python tools/pretrain_classifier.py --config-file ... --eval-only ... MODEL.WEIGHTS <file>

At its end <OUTPUT_DIR>/backbone.pth is what a detector names as MODEL.WEIGHTS. `--num-gpus 0`
trains on CPU.
"""

import argparse
from typing import Any

from detectron2.evaluation import verify_results
from detectron2.utils import comm

from d2_deform.engine import ClassificationTrainer, ConfigError, run_tool, setup
from d2_deform.engine.checkpointer import WholeCheckpointer


def main(args: argparse.Namespace) -> dict[str, Any] | None:
    """Runs one process of a training or an evaluation.

    Returns:
        The evaluation results with ``--eval-only``; else what ``DefaultTrainer.train`` returns.
    """
    cfg = setup(args)
    if cfg.MODEL.META_ARCHITECTURE != "ImageClassifier":
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}; this tool trains "
            "ImageClassifier, tools/train_net.py the others."
        )
    if args.eval_only:
        model = ClassificationTrainer.build_model(cfg)
        WholeCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=args.resume
        )
        results = ClassificationTrainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results

    trainer = ClassificationTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    run_tool(main, needs_operators=False)
