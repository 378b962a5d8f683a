#!/usr/bin/env python
"""Train or evaluate a detector with Detectron2, deformable networks included.

    python tools/train_net.py --config-file configs/<name>.yaml [--num-gpus 8] [KEY VALUE ...]
    python tools/train_net.py --config-file configs/<name>.yaml --resume
    python tools/train_net.py --config-file configs/<name>.yaml --eval-only MODEL.WEIGHTS <file>

`--num-gpus 0` trains on CPU; so does a machine without a GPU, or operators built for CPU only.
"""

import argparse
import sys
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import default_argument_parser, hooks, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from d2_deform.engine import ConfigError, DeformTrainer, setup
from d2_deform.ops import built_devices


def main(args: argparse.Namespace) -> dict[str, Any] | None:
    """Runs one process of a training or an evaluation.

    Returns:
        The evaluation results with ``--eval-only``; else what ``DefaultTrainer.train`` returns.
    """
    cfg = setup(args)
    if args.eval_only:
        model = DeformTrainer.build_model(cfg)
        DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
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


def check_gpus(wanted: int) -> None:
    """Ends the program where several GPUs are asked for that cannot be used."""
    found = torch.cuda.device_count()
    if wanted > max(found, 1):
        reason = f"this machine has {found}"
    elif wanted > 1 and "cuda" not in built_devices():
        reason = "d2_deform's operators are built for CPU only"
    else:
        return
    sys.exit(f"error: --num-gpus {wanted}: {reason}; --num-gpus 0 trains on CPU.")


def invoke_main() -> None:
    args = default_argument_parser().parse_args()
    check_gpus(args.num_gpus)
    try:
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    invoke_main()
