#!/usr/bin/env python
"""Train or evaluate a detector with Detectron2, deformable networks included.

    python tools/train_net.py --config-file configs/<name>.yaml [--num-gpus 8] [KEY VALUE ...]
    python tools/train_net.py --config-file configs/<name>.yaml --resume
    python tools/train_net.py --config-file configs/<name>.yaml --eval-only MODEL.WEIGHTS <file>
    torchrun --nproc-per-node 8 tools/train_net.py --config-file configs/<name>.yaml

`--num-gpus 0` trains on CPU; so does a machine without a GPU, or operators built for CPU only.
"""

import argparse
from typing import Any

from detectron2.engine import hooks
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from d2_deform.engine import ConfigError, DeformTrainer, run_tool, setup
from d2_deform.engine.checkpointer import WholeCheckpointer


def main(args: argparse.Namespace) -> dict[str, Any] | None:
    """Runs one process of a training or an evaluation.

    Returns:
        The evaluation results with ``--eval-only``; else what ``DefaultTrainer.train`` returns.
    """
    cfg = setup(args)
    if cfg.MODEL.META_ARCHITECTURE == "ImageClassifier":
        raise ConfigError(
            "MODEL.META_ARCHITECTURE is ImageClassifier, which tools/pretrain_classifier.py trains."
        )
    if args.eval_only:
        model = DeformTrainer.build_model(cfg)
        WholeCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=args.resume
        )
        results = DeformTrainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(DeformTrainer.test_with_TTA(cfg, model))
        if comm.is_main_process():
            verify_results(cfg, results)
        return results

    trainer = DeformTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    if cfg.TEST.AUG.ENABLED:
        trainer.register_hooks(
            [hooks.EvalHook(0, lambda: trainer.test_with_TTA(cfg, trainer.model))]
        )
    return trainer.train()


if __name__ == "__main__":
    run_tool(main)
