"""Training, as Detectron2's engine does it, with what deformable networks need on top."""

from d2_deform.engine.backbone_file import write_backbone
from d2_deform.engine.classification import ClassificationTrainer
from d2_deform.engine.command_line import run_tool
from d2_deform.engine.defaults import ConfigError, load_config, setup
from d2_deform.engine.hooks import OffsetMonitor
from d2_deform.engine.pictures import find_pictures, read_picture, write_new_file
from d2_deform.engine.predictor import build_predictor
from d2_deform.engine.proposals import dump_proposals
from d2_deform.engine.scaling import scale_to_world_size
from d2_deform.engine.trainer import DeformTrainer
from d2_deform.engine.weights import load_backbone_weights

__all__ = [
    "ClassificationTrainer",
    "ConfigError",
    "DeformTrainer",
    "OffsetMonitor",
    "build_predictor",
    "dump_proposals",
    "find_pictures",
    "load_backbone_weights",
    "load_config",
    "read_picture",
    "run_tool",
    "scale_to_world_size",
    "setup",
    "write_backbone",
    "write_new_file",
]
