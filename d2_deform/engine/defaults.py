"""From a command line to a config that is ready to train with."""

import argparse
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_setup
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from d2_deform.config import add_deform_config
from d2_deform.data.classification_mapper import ClassificationMapper
from d2_deform.data.image_folder import CONFIG_PREFIX as IMAGE_FOLDER_PREFIX
from d2_deform.data.image_folder import register_image_folder_from_config
from d2_deform.data.proposals import check_proposal_files
from d2_deform.data.voc_folder import CONFIG_PREFIX, register_voc_folder_from_config
from d2_deform.engine.config_values import check_values, suggest
from d2_deform.modeling import backbone
from d2_deform.modeling.box_selector import BoxSelector
from d2_deform.modeling.test_time_augmentation import build_tta_model
from d2_deform.ops import built_devices
from d2_deform.solver import LearningRateFactors

logger = logging.getLogger(__name__)

__all__ = ["ConfigError", "load_config", "setup"]

DETECTORS = ("RFCN", "GeneralizedRCNN", "CategoryAwareRPN")  # classes: MODEL.ROI_HEADS.NUM_CLASSES
POSITIVE_KEYS = {
    "RFCN": (
        "ROI_BOX_HEAD.POOLER_RESOLUTION",
        "ROI_HEADS.NUM_CLASSES",
        "RFCN.CONV_DIM",
        "RFCN.SAMPLING_RATIO",
    ),
    "GeneralizedRCNN": ("ROI_BOX_HEAD.POOLER_RESOLUTION", "ROI_HEADS.NUM_CLASSES"),
    "CategoryAwareRPN": ("ROI_HEADS.NUM_CLASSES", "CATEGORY_AWARE_RPN.CONV_DIM"),
    "SemanticSegmentor": ("SEM_SEG_HEAD.NUM_CLASSES", "SEM_SEG_HEAD.CONVS_DIM"),
    "ImageClassifier": ("IMAGE_CLASSIFIER.NUM_CLASSES",),
}


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
    try:
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="d2_deform")
    except OSError as error:
        raise _unwritable(cfg, error) from error
    _choose_device(cfg, use_gpu=args.num_gpus > 0)
    _prepare_data(cfg)
    _check_proposal_files(cfg, train=not args.eval_only)
    _check_model(cfg)
    if not (cfg.DATASETS.TRAIN or args.eval_only):
        raise ConfigError("DATASETS.TRAIN is empty, so there is nothing to train on.")
    if not args.resume:
        _check_weights(cfg)
        if not args.eval_only:
            _warn_of_random_frozen_layers(cfg)
    cfg.freeze()
    try:
        default_setup(cfg, args)
    except OSError as error:
        raise _unwritable(cfg, error) from error
    return cfg


def load_config(
    config_file: str = "",
    opts: Sequence[str] = (),
    use_gpu: bool = True,
    with_data: bool = True,
) -> CfgNode:
    """Detectron2's defaults, the plugin's keys, a file and single options, in this order.

    A PASCAL-VOC-layout folder named by DATASETS.VOC_FOLDER.ROOT is registered, and gives
    MODEL.ROI_HEADS.NUM_CLASSES if DATASETS.TRAIN or .TEST use it; so does an ImageNet-layout folder
    named by DATASETS.IMAGE_FOLDER.ROOT with MODEL.IMAGE_CLASSIFIER.NUM_CLASSES. MODEL.DEVICE
    becomes "cpu" where no GPU can or shall be used.

    Args:
        config_file: a yaml file; "" for none.
        opts: key, value, key, value, ... as a command line ends with.
        use_gpu: False asks for the CPU.
        with_data: False is for prediction, which needs no data set: the VOC folder gives its
            classes where it is there; where it is not, the config's own NUM_CLASSES counts.

    Returns:
        The config, not frozen.

    Raises:
        ConfigError: the file is missing or no yaml; a key or data set is unknown; a value does not
            fit its key, the model or the data; data are missing or flawed; the weights are missing.
    """
    cfg = _read(config_file, opts)
    setup_logger(name="d2_deform")
    _choose_device(cfg, use_gpu)
    if with_data:
        _prepare_data(cfg)
    else:
        _take_classes_if_there(cfg)
    _check_model(cfg)
    _check_weights(cfg)
    return cfg


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
    known = list(flatten(cfg))
    for key in opts[::2]:
        if key not in known:
            raise ConfigError(f"options: there is no config key {key}.{suggest(key, known)}")
    try:
        if config_file:
            cfg.merge_from_file(config_file)
    except KeyError as error:
        key = str(error.args[0]).rpartition(": ")[2]
        raise ConfigError(
            f"{config_file}: there is no config key {key}.{suggest(key, known)}"
        ) from error
    except (AssertionError, OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{config_file}: {error}") from error
    except (AttributeError, TypeError) as error:  # where yaml gives no dictionary
        raise ConfigError(
            f"{config_file}: it, a file that it is based on or a section of it is empty or has no "
            "'KEY: value' lines."
        ) from error
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        try:
            cfg.merge_from_list([key, value])
        except (AssertionError, KeyError, ValueError) as error:
            raise ConfigError(f"options: {key} {value}: {error}") from error
    try:
        check_values(cfg)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return cfg


def _unwritable(cfg: CfgNode, error: OSError) -> ConfigError:
    return ConfigError(f"OUTPUT_DIR: {cfg.OUTPUT_DIR} cannot be written to ({error}).")


def flatten(node: CfgNode, prefix: str = "") -> dict[str, Any]:
    """All values below a node of a config by their full names, "MODEL.WEIGHTS"."""
    flat: dict[str, Any] = {}
    for name, value in node.items():
        if isinstance(value, CfgNode):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def _choose_device(cfg: CfgNode, use_gpu: bool) -> None:
    if not cfg.MODEL.DEVICE.startswith("cuda"):
        return
    if use_gpu and not torch.cuda.is_available():
        logger.info("No GPU is found: MODEL.DEVICE is set to cpu.")
    elif use_gpu and "cuda" not in built_devices() and not _is_plain_classifier(cfg):
        if comm.get_world_size() > 1:  # Detectron2 has them talk by NCCL, which knows GPUs alone
            raise ConfigError(
                "d2_deform's operators are built for CPU only; hide the GPUs from several "
                "processes by the environment variable CUDA_VISIBLE_DEVICES= (empty)."
            )
        logger.info("d2_deform's operators are built for CPU only: MODEL.DEVICE is set to cpu.")
    elif use_gpu:
        return
    cfg.MODEL.DEVICE = "cpu"


def _is_plain_classifier(cfg: CfgNode) -> bool:
    """Whether the network can do without this package's operators."""
    return cfg.MODEL.META_ARCHITECTURE == "ImageClassifier" and not (
        cfg.MODEL.DEFORM.NUM_LAYERS or any(cfg.MODEL.DEFORM.NUM_LAYERS_PER_STAGE)
    )


def _prepare_data(cfg: CfgNode) -> None:
    """Registers the folders and checks every data set that the config uses."""
    _prepare_image_folder(cfg)
    try:
        _register_voc_folder(cfg)
        for name in _used_datasets(cfg):
            if name in DatasetCatalog and name.startswith(CONFIG_PREFIX):
                _check_annotations(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"DATASETS.VOC_FOLDER: {error}") from error
    for name in _used_datasets(cfg):
        _check_is_registered(cfg, name)
        _check_is_on_disk(name)
        _check_has_what_is_learnt(cfg, name)
        _check_number_of_classes(cfg, name)


def _prepare_image_folder(cfg: CfgNode) -> None:
    """Registers the folder's splits that are used, and takes the number of classes from it."""
    try:
        class_names = register_image_folder_from_config(cfg)
        for name in _used_datasets(cfg):
            if name in DatasetCatalog and name.startswith(IMAGE_FOLDER_PREFIX):
                DatasetCatalog.get(name)  # says which class has no picture
    except (OSError, ValueError) as error:
        raise ConfigError(f"DATASETS.IMAGE_FOLDER: {error}") from error
    if class_names:
        cfg.MODEL.IMAGE_CLASSIFIER.NUM_CLASSES = len(class_names)
        logger.info(
            "%s: MODEL.IMAGE_CLASSIFIER.NUM_CLASSES is %d (%s)",
            cfg.DATASETS.IMAGE_FOLDER.ROOT,
            len(class_names),
            ", ".join(class_names[:20]) + (", ..." if len(class_names) > 20 else ""),
        )


def _take_classes_if_there(cfg: CfgNode) -> None:
    """Takes the VOC folder's classes; prediction goes on without them."""
    try:
        _register_voc_folder(cfg)
    except (OSError, ValueError) as error:
        logger.info(
            "%s So classes are shown as numbers, %d of them (MODEL.ROI_HEADS.NUM_CLASSES).",
            error,
            cfg.MODEL.ROI_HEADS.NUM_CLASSES,
        )


def _used_datasets(cfg: CfgNode) -> list[str]:
    return list(dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)))


def _register_voc_folder(cfg: CfgNode) -> None:
    """Registers the folder and, if it is used, takes the number of classes from it."""
    names, class_names = register_voc_folder_from_config(cfg)
    if set(names) & set(_used_datasets(cfg)):
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(class_names)
        logger.info(
            "%s: data sets %s; MODEL.ROI_HEADS.NUM_CLASSES is %d (%s)",
            cfg.DATASETS.VOC_FOLDER.ROOT,
            ", ".join(names),
            len(class_names),
            ", ".join(class_names),
        )


def _check_annotations(name: str) -> None:
    """Reads a split of the VOC folder, which raises an error that names any flaw."""
    if not any(record["annotations"] for record in DatasetCatalog.get(name)):
        raise ValueError(f"no picture of {name} has a box; annotate some or choose another split.")


def _check_is_registered(cfg: CfgNode, name: str) -> None:
    known = DatasetCatalog.list()
    if name in known:
        return
    if name.startswith(CONFIG_PREFIX) and not cfg.DATASETS.VOC_FOLDER.ROOT:
        hint = " Set DATASETS.VOC_FOLDER.ROOT to your folder."
    elif name.startswith(CONFIG_PREFIX):
        found = [other for other in known if other.startswith(CONFIG_PREFIX)]
        hint = f" The folder has {', '.join(found)}."
    elif name.startswith(IMAGE_FOLDER_PREFIX):
        hint = " Set DATASETS.IMAGE_FOLDER.ROOT to your folder."
    else:
        hint = suggest(name, known)
    raise ConfigError(f"DATASETS: no data set named {name} is registered.{hint}")


def _check_is_on_disk(name: str) -> None:
    """Detectron2 looks for its own data sets (COCO, PASCAL VOC, ...) below one folder."""
    root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    metadata = MetadataCatalog.get(name)
    for key in ("json_file", "dirname", "image_dir", "gt_dir"):
        path = metadata.get(key) or ""
        if path.startswith(os.path.join(root, "")) and not os.path.exists(path):
            raise ConfigError(
                f"DATASETS: {name} should be in {path}, which is missing; set the environment "
                f"variable DETECTRON2_DATASETS to the folder with your data sets (now: {root})."
            )
    if name.startswith("voc_2012_sem_seg_"):
        try:
            DatasetCatalog.get(name)  # says which list, picture or label map is missing
        except (OSError, ValueError) as error:
            raise ConfigError(f"DATASETS: {name}: {error}") from error


def _check_has_what_is_learnt(cfg: CfgNode, name: str) -> None:
    """Classifiers learn from classes of whole pictures, and nothing else does."""
    is_image_folder = MetadataCatalog.get(name).get("evaluator_type") == "image_folder"
    if cfg.MODEL.META_ARCHITECTURE == "ImageClassifier":
        if not is_image_folder:
            raise ConfigError(
                f"DATASETS: {name} has no classes of whole pictures, from which ImageClassifier "
                f"learns; name an {IMAGE_FOLDER_PREFIX}<split> of DATASETS.IMAGE_FOLDER.ROOT."
            )
    elif is_image_folder:
        raise ConfigError(
            f"DATASETS: {name} has classes of whole pictures, from which "
            f"{cfg.MODEL.META_ARCHITECTURE} (MODEL.META_ARCHITECTURE) cannot learn; "
            "ImageClassifier can."
        )


def _check_number_of_classes(cfg: CfgNode, name: str) -> None:
    metadata = MetadataCatalog.get(name)
    if cfg.MODEL.META_ARCHITECTURE == "SemanticSegmentor":
        if metadata.get("evaluator_type") == "sem_seg" and metadata.get("stuff_classes") is None:
            DatasetCatalog.get(name)  # COCO's label maps are drawn now; then the classes are known
        section, class_names = "SEM_SEG_HEAD", metadata.get("stuff_classes")
    elif cfg.MODEL.META_ARCHITECTURE in DETECTORS:
        section, class_names = "ROI_HEADS", metadata.get("thing_classes")
    else:
        return
    given = cfg.MODEL[section].NUM_CLASSES
    if class_names is not None and len(class_names) != given:
        raise ConfigError(
            f"MODEL.{section}.NUM_CLASSES is {given}, but {name} has {len(class_names)} classes; "
            f"set it to {len(class_names)}."
        )


def _check_model(cfg: CfgNode) -> None:
    """Finds the values that would end in an error deep inside the network."""
    model = cfg.MODEL
    try:
        LearningRateFactors.from_config(cfg)
        if model.BACKBONE.NAME not in backbone.__all__:
            return
        with torch.device("meta"):  # takes no memory
            features = list(build_backbone(cfg).output_shape())
        _check_features(cfg, features)
        for key in POSITIVE_KEYS.get(model.META_ARCHITECTURE, ()):
            section, _, name = key.partition(".")
            if model[section][name] < 1:
                raise ConfigError(f"MODEL.{key} is {model[section][name]}; expected 1 or more.")
        with torch.device("meta"):
            network = META_ARCH_REGISTRY.get(model.META_ARCHITECTURE)(cfg)
        if model.META_ARCHITECTURE == "ImageClassifier":
            ClassificationMapper(cfg, is_train=True)
        _check_test(cfg, network)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_features(cfg: CfgNode, given: Sequence[str]) -> None:
    """Checks that the backbone gives the maps that the rest of the network reads."""
    model = cfg.MODEL
    used = {"SEM_SEG_HEAD": model.META_ARCHITECTURE == "SemanticSegmentor"}
    used["ROI_HEADS"] = model.META_ARCHITECTURE in ("RFCN", "GeneralizedRCNN")
    used["RPN"] = (
        model.META_ARCHITECTURE not in ("SemanticSegmentor", "ImageClassifier")
        and model.PROPOSAL_GENERATOR.NAME == "RPN"
    )
    for section, is_used in used.items():
        names = model[section].IN_FEATURES
        if is_used and not set(names) <= set(given):
            raise ConfigError(
                f"MODEL.{section}.IN_FEATURES is {list(names)}, but the backbone gives "
                f"{list(given)} (MODEL.RESNETS.OUT_FEATURES)."
            )


def _check_test(cfg: CfgNode, network: nn.Module) -> None:
    """Checks that what the test is asked to do will be done; it comes after the training."""
    if cfg.TEST.AUG.ENABLED:
        build_tta_model(cfg, network)
        return  # which chooses among the boxes of any detector
    parts = (getattr(module, "box_selector", None) for module in network.modules())
    if any(isinstance(part, BoxSelector) for part in parts):
        return
    for name in ("SOFT_NMS", "BOX_VOTING"):
        if cfg.TEST[name].ENABLED:
            raise ConfigError(
                f"TEST.{name}.ENABLED is True, but {type(network).__name__} (ROI_HEADS.NAME "
                f"{cfg.MODEL.ROI_HEADS.NAME}) would not obey it; set it to False, or use "
                "RFCNROIHeads, DeformROIHeads or CategoryAwareRPN."
            )


def _check_proposal_files(cfg: CfgNode, train: bool) -> None:
    try:
        check_proposal_files(cfg, train=train)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _warn_of_random_frozen_layers(cfg: CfgNode) -> None:
    if cfg.MODEL.WEIGHTS or cfg.MODEL.BACKBONE.NAME not in backbone.__all__:
        return
    if cfg.MODEL.BACKBONE.FREEZE_AT > 0 or cfg.MODEL.RESNETS.NORM == "FrozenBN":
        logger.warning(
            "MODEL.WEIGHTS is empty, so the backbone starts at random, but parts of it are frozen "
            "(MODEL.BACKBONE.FREEZE_AT %d, MODEL.RESNETS.NORM %s). Name ImageNet weights, or train "
            'from scratch with FREEZE_AT 0 and NORM "BN".',
            cfg.MODEL.BACKBONE.FREEZE_AT,
            cfg.MODEL.RESNETS.NORM,
        )


def _check_weights(cfg: CfgNode) -> None:
    path = cfg.MODEL.WEIGHTS.partition("?")[0]  # DetectionCheckpointer takes options behind a "?"
    if path and "://" not in path and not os.path.isfile(path):
        raise ConfigError(f"MODEL.WEIGHTS: there is no file {path}.")
