"""Detectron2's model zoo functions for the plugin's own ``configs/``."""

import difflib
from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model
from omegaconf import DictConfig
from torch import nn

import d2_deform
from d2_deform.config import add_deform_config
from d2_deform.model_zoo.trained import find_trained

__all__ = ["get", "get_checkpoint_url", "get_config", "get_config_file", "list_configs"]

CONFIGS = Path(d2_deform.__file__).parent / "configs"


def list_configs() -> list[str]:
    """Names of all configs that stand for a network, sorted.

    Returns:
        Paths relative to ``configs/``, such as "VOC-Detection/rfcn_R_101_dconv3_dpool.yaml". Files
        that others are based on (``Base-*.yaml``) are not among them.
    """
    return sorted(
        path.relative_to(CONFIGS).as_posix()
        for path in CONFIGS.rglob("*.yaml")
        if not path.name.startswith("Base-")
    )


def get_config_file(config_path: str) -> str:
    """Where a config of the plugin lies on disk.

    Args:
        config_path: relative to ``configs/``, e.g. "VOC-Detection/rfcn_R_101_dconv3_dpool.yaml" or
            "common/models/rfcn.py".

    Raises:
        RuntimeError: there is none of that name; the line names the closest ones.
    """
    path = CONFIGS / config_path
    if not path.is_file():
        close = difflib.get_close_matches(config_path, list_configs(), n=3, cutoff=0.5)
        hint = f"; the closest are {', '.join(close)}" if close else ""
        raise RuntimeError(f"{config_path}: d2_deform has no config of this name{hint}.")
    return str(path)


def get_checkpoint_url(config_path: str) -> str:
    """Where the trained weights of a config are, for MODEL.WEIGHTS.

    Returns:
        A file of the package: docs/model_zoo.md lists them.

    Raises:
        RuntimeError: none are published, or there is no such config; the line says how to train
            them. Or the file is damaged.
    """
    path = get_config_file(config_path)
    trained = find_trained(config_path)
    if trained is not None:
        return str(trained)
    raise RuntimeError(
        f"{config_path}: no trained weights are published. Train them: "
        f"python tools/train_net.py --config-file {path}; then name the checkpoint in "
        "MODEL.WEIGHTS."
    )


def get_config(config_path: str, trained: bool = False) -> CfgNode | DictConfig:
    """A config of the plugin, on top of Detectron2's defaults and the plugin's keys.

    Args:
        config_path: as :func:`get_config_file` takes it, .yaml or .py.
        trained: set MODEL.WEIGHTS to the trained weights; else it stays what the file says, mostly
            an ImageNet backbone.

    Returns:
        A ``CfgNode`` of a .yaml file, a LazyConfig of a .py file.

    Raises:
        RuntimeError: see :func:`get_config_file` and :func:`get_checkpoint_url`.
    """
    path = get_config_file(config_path)
    if trained:
        weights = get_checkpoint_url(config_path)
    if path.endswith(".py"):
        return LazyConfig.load(path)
    cfg = get_cfg()
    add_deform_config(cfg)
    cfg.merge_from_file(path)
    if trained:
        cfg.MODEL.WEIGHTS = weights
    return cfg


def get(config_path: str, trained: bool = False, device: str | None = None) -> nn.Module:
    """The network of a config, with the weights that its MODEL.WEIGHTS names.

        >>> model = model_zoo.get("VOC-Detection/rfcn_R_101_dconv3_dpool.yaml")
        >>> model = model_zoo.get("quickstart.yaml", trained=True)

    Args:
        config_path, trained: as :func:`get_config` takes them.
        device: "cpu" or "cuda", in place of MODEL.DEVICE; None: that, or "cpu" without a GPU.

    Returns:
        The model, in training mode as Detectron2's ``model_zoo.get`` returns it.

    Raises:
        RuntimeError: see :func:`get_config`.
    """
    cfg = get_config(config_path, trained)
    if device is None and not torch.cuda.is_available():
        device = "cpu"
    if not isinstance(cfg, CfgNode):
        model = instantiate(cfg.model)
        return model if device is None else model.to(device)
    if device is not None:
        cfg.MODEL.DEVICE = device
    model = build_model(cfg)
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model
