"""Proposals of a trained RPN, written to files that detectors train on."""

import hashlib
import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import nn

from d2_deform.data.proposals import read_settings, write_proposals
from d2_deform.engine.defaults import ConfigError, flatten
from d2_deform.evaluation import ProposalEvaluator

logger = logging.getLogger(__name__)

__all__ = ["dump_proposals", "proposal_file"]


def proposal_file(output_dir: str, dataset_name: str) -> str:
    """Where :func:`dump_proposals` writes the proposals of a data set."""
    return os.path.join(output_dir, f"{dataset_name}_proposals.pkl")


def dump_proposals(cfg: CfgNode, output_dir: str) -> dict[str, dict[str, float]]:
    """Runs a trained RPN over every data set of a config and writes its proposals.

    So the paper's VOC ablations are trained: R-FCN and Faster R-CNN on the fixed proposals of an
    RPN that was trained by itself and shares no features with them. The proposals are those of a
    test (INPUT.MIN_SIZE_TEST, MODEL.RPN.PRE_NMS_TOPK_TEST and POST_NMS_TOPK_TEST), on training
    pictures too, flipped ones by Detectron2's transform of them.

    Args:
        cfg: of a ``ProposalNetwork``, or of any detector whose proposals come from an RPN.
            MODEL.WEIGHTS are its trained weights; the data sets are all of DATASETS.TRAIN and
            DATASETS.TEST.
        output_dir: the folder for the files, named by :func:`proposal_file`. A file made with the
            same settings is made anew.

    Returns:
        For every data set the results of
        :class:`~d2_deform.evaluation.ProposalEvaluator`; nothing in processes but the main one.

    Raises:
        ConfigError: no data set; no weights, or weights without an RPN; no RPN in the config; a
            file is there that was made with other settings.
    """
    names = list(dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)))
    if not names:
        raise ConfigError("DATASETS.TRAIN and DATASETS.TEST are empty; name the data sets.")
    if cfg.MODEL.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals":
        raise ConfigError(
            'MODEL.PROPOSAL_GENERATOR.NAME is "PrecomputedProposals", so the network makes none; '
            "take the config that the RPN was trained with."
        )
    if not cfg.MODEL.WEIGHTS:
        raise ConfigError("MODEL.WEIGHTS is empty; name the weights of the trained RPN.")
    cfg = cfg.clone()
    cfg.defrost()
    # The parts that make proposals have the same names in every GeneralizedRCNN.
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    cfg.MODEL.LOAD_PROPOSALS = False
    settings = _settings(cfg)
    for name in names:
        _check_may_write(proposal_file(output_dir, name), {**settings, **_source(name)})

    model = _load_model(cfg)
    results = {}
    for name in names:
        evaluator = ProposalEvaluator(name)
        measured = inference_on_dataset(model, build_detection_test_loader(cfg, name), evaluator)
        if comm.is_main_process():
            results[name] = measured["box_proposals"]
            path = proposal_file(output_dir, name)
            write_proposals(path, evaluator.proposals, {**settings, **_source(name)})
            logger.info("%s: %s; written to %s", name, _describe(results[name]), path)
    return results


def _load_model(cfg: CfgNode) -> nn.Module:
    model = build_model(cfg)
    generator = model.proposal_generator
    before = {name: value.clone() for name, value in generator.named_parameters()}
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    # Detectron2 warns of parameters that a file lacks and goes on with random ones.
    untouched = [
        name
        for name, value in generator.named_parameters()
        if value.any() and torch.equal(value, before[name])
    ]
    if untouched:
        raise ConfigError(
            f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS} has no proposal_generator.{untouched[0]} that fits "
            "the config; name the weights of an RPN trained with it."
        )
    return model


def _settings(cfg: CfgNode) -> dict[str, Any]:
    """What the proposals depend on, by full key."""
    flat = {**flatten(cfg.MODEL, "MODEL."), **flatten(cfg.INPUT, "INPUT.")}
    del flat["MODEL.DEVICE"]
    del flat["MODEL.WEIGHTS"]
    path = PathManager.get_local_path(cfg.MODEL.WEIGHTS.partition("?")[0])
    with open(path, "rb") as file:
        flat["MODEL.WEIGHTS (sha256)"] = hashlib.sha256(file.read()).hexdigest()
    return flat


def _source(dataset_name: str) -> dict[str, Any]:
    metadata = MetadataCatalog.get(dataset_name)
    return {"data set": metadata.get("json_file") or metadata.get("dirname")}


def _check_may_write(path: str, settings: Mapping[str, Any]) -> None:
    if not os.path.exists(path):
        return
    try:
        found = read_settings(path)
    except ValueError as error:
        raise ConfigError(f"--output: {error} Move it away.") from error
    if found is None:
        raise ConfigError(f"--output: {path} does not tell how it was made; move it away.")
    keys = [key for key in {**found, **settings} if found.get(key) != settings.get(key)]
    if keys:
        raise ConfigError(
            f"--output: {path} was made with other settings: {keys[0]} was "
            f"{found.get(keys[0])!r}, is {settings.get(keys[0])!r}"
            + (f", and {len(keys) - 1} more" if len(keys) > 1 else "")
            + ". Choose another folder or delete the file."
        )


def _describe(result: Mapping[str, float]) -> str:
    line = f"{result['proposals']:.1f} proposals an image"
    if "AR" in result:
        line += (
            f", recall {result['R50']:.1f} % at IoU 0.5, {result['R70']:.1f} % at 0.7, "
            f"{result['AR']:.1f} % on average over 0.5:0.95"
        )
    return line
