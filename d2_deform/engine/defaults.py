"""From a command line to a config that is ready to train with."""

import argparse
import difflib
import logging
import os
from collections.abc import Sequence

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from d2_deform.config import add_deform_config
from d2_deform.data.voc_folder import (
    collect_class_names,
    read_class_names,
    register_voc_folder_from_config,
)

logger = logging.getLogger(__name__)

__all__ = ["ConfigError", "load_config", "setup"]


class ConfigError(ValueError):
    """A config that cannot be used; the message says why and what to do."""


def setup(args: argparse.Namespace) -> CfgNode:
    """What ``tools/train_net.py`` does first, as Detectron2's own ``setup(args)``.

    Args:
        args: of ``default_argument_parser()``. ``num_gpus`` 0 trains on CPU.

    Returns:
        The frozen config. Data sets are registered, loggers and seed are set, and the config is
        written to OUTPUT_DIR/config.yaml.

    Raises:
        ConfigError: see :func:`load_config`.
    """
    cfg = _read(args.config_file, args.opts or ())
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="d2_deform")
    _prepare(cfg, use_gpu=args.num_gpus > 0)
    if not args.resume:
        _check_weights(cfg)
    cfg.freeze()
    default_setup(cfg, args)
    return cfg


def load_config(config_file: str = "", opts: Sequence[str] = (), use_gpu: bool = True) -> CfgNode:
    """Detectron2's defaults, the plugin's keys, a file and single options, in this order.

    A PASCAL-VOC-layout folder named by DATASETS.VOC_FOLDER.ROOT is registered, and gives
    MODEL.ROI_HEADS.NUM_CLASSES. MODEL.DEVICE becomes "cpu" where no GPU can or shall be used.

    Args:
        config_file: a yaml file; "" for none.
        opts: key, value, key, value, ... as a command line ends with.
        use_gpu: False asks for the CPU.

    Returns:
        The config, not frozen.

    Raises:
        ConfigError: the file is missing or no yaml; a key or data set is unknown; a value does not
            fit its key; the VOC folder is flawed; the weights are missing.
    """
    cfg = _read(config_file, opts)
    setup_logger(name="d2_deform")
    _prepare(cfg, use_gpu)
    _check_weights(cfg)
    return cfg


def _prepare(cfg: CfgNode, use_gpu: bool) -> None:
    _choose_device(cfg, use_gpu)
    _register_voc_folder(cfg)
    _check_datasets(cfg)


def _read(config_file: str, opts: Sequence[str]) -> CfgNode:
    cfg = get_cfg()
    add_deform_config(cfg)
    if config_file and not os.path.isfile(config_file) and "://" not in config_file:
        raise ConfigError(f"--config-file {config_file}: there is no such file.")
    if len(opts) % 2:
        raise ConfigError(
            f"options: '{' '.join(opts)}' is not a list of KEY VALUE pairs; "
            f"'{opts[-1]}' has no value."
        )
    known = _keys(cfg)
    for key in opts[::2]:
        if key not in known:
            raise ConfigError(f"options: there is no config key {key}.{_suggest(key, known)}")
    try:
        if config_file:
            cfg.merge_from_file(config_file)
    except KeyError as error:
        key = str(error.args[0]).rpartition(": ")[2]
        raise ConfigError(
            f"{config_file}: there is no config key {key}.{_suggest(key, known)}"
        ) from error
    except (AssertionError, OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{config_file}: {error}") from error
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        try:
            cfg.merge_from_list([key, value])
        except (AssertionError, KeyError, ValueError) as error:
            raise ConfigError(f"options: {key} {value}: {error}") from error
    return cfg


def _keys(node: CfgNode, prefix: str = "") -> list[str]:
    """Full names of all keys below a node."""
    keys = []
    for name, value in node.items():
        keys.append(prefix + name)
        if isinstance(value, CfgNode):
            keys += _keys(value, f"{prefix}{name}.")
    return keys


def _suggest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _choose_device(cfg: CfgNode, use_gpu: bool) -> None:
    if not cfg.MODEL.DEVICE.startswith("cuda"):
        return
    if not use_gpu:
        cfg.MODEL.DEVICE = "cpu"
    elif not torch.cuda.is_available():
        logger.info("No GPU is found: MODEL.DEVICE is set to cpu.")
        cfg.MODEL.DEVICE = "cpu"


def _register_voc_folder(cfg: CfgNode) -> None:
    """Registers the folder and takes the number of classes from it."""
    folder = cfg.DATASETS.VOC_FOLDER
    if not folder.ROOT:
        return
    try:
        if folder.CLASSES_FILE:
            class_names = read_class_names(folder.CLASSES_FILE)
        else:
            class_names = collect_class_names(os.path.expanduser(folder.ROOT))
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(class_names)
        names = register_voc_folder_from_config(cfg)
    except (OSError, ValueError) as error:
        raise ConfigError(f"DATASETS.VOC_FOLDER: {error}") from error
    logger.info(
        "%s: data sets %s; MODEL.ROI_HEADS.NUM_CLASSES is %d (%s)",
        folder.ROOT,
        ", ".join(names),
        len(class_names),
        ", ".join(class_names),
    )


def _check_datasets(cfg: CfgNode) -> None:
    known = DatasetCatalog.list()
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        if name in known:
            continue
        if name.startswith("voc_folder_") and not cfg.DATASETS.VOC_FOLDER.ROOT:
            hint = " Set DATASETS.VOC_FOLDER.ROOT to your folder."
        elif name.startswith("voc_folder_"):
            found = [other for other in known if other.startswith("voc_folder_")]
            hint = f" The folder has {', '.join(found)}."
        else:
            hint = _suggest(name, known)
        raise ConfigError(f"DATASETS: no data set named {name} is registered.{hint}")


def _check_weights(cfg: CfgNode) -> None:
    path = cfg.MODEL.WEIGHTS.partition("?")[0]  # DetectionCheckpointer takes options behind a "?"
    if path and "://" not in path and not os.path.isfile(path):
        raise ConfigError(f"MODEL.WEIGHTS: there is no file {path}.")
