"""Every file under ``configs/`` merges, builds, and says what the paper or the release says."""

from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

import d2_deform.modeling  # noqa: F401  registers the parts
from d2_deform.config import add_deform_config

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))


def load(name: str) -> CfgNode:
    cfg = get_cfg()
    add_deform_config(cfg)
    cfg.merge_from_file(str(CONFIGS / name))
    cfg.MODEL.WEIGHTS = ""
    return cfg


def build_without_memory(cfg: CfgNode) -> nn.Module:
    with torch.device("meta"):
        return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def flatten(node: CfgNode, prefix: str = "") -> dict[str, object]:
    leaves: dict[str, object] = {}
    for key, value in node.items():
        if isinstance(value, CfgNode):
            leaves.update(flatten(value, f"{prefix}{key}."))
        else:
            leaves[prefix + key] = value
    return leaves


def differing_keys(one: CfgNode, other: CfgNode) -> set[str]:
    left, right = flatten(one), flatten(other)
    return {key for key in left if left[key] != right[key]}


@pytest.mark.parametrize("name", FILES)
def test_builds(name: str) -> None:
    cfg = load(name)
    model = build_without_memory(cfg)
    offsets = {key.split("offset")[0] for key in model.state_dict() if "offset" in key}
    expected = cfg.MODEL.DEFORM.NUM_LAYERS + (2 if cfg.MODEL.RFCN.DEFORM_POOL else 0)
    assert len(offsets) == expected


@pytest.mark.parametrize("data", ["VOC", "COCO"])
@pytest.mark.parametrize("depth", [50, 101])
def test_plain_and_deformable_differ_in_nothing_else(data: str, depth: int) -> None:
    deformable = load(f"{data}-Detection/deform_rfcn_R_{depth}.yaml")
    plain = load(f"{data}-Detection/rfcn_R_{depth}.yaml")
    assert differing_keys(plain, deformable) == {
        "MODEL.DEFORM.NUM_LAYERS",
        "MODEL.RFCN.DEFORM_POOL",
    }


def test_backbones_for_own_folders_differ_in_nothing_else() -> None:
    thin = load("VOC-Folder/deform_rfcn_thin_R_50.yaml")
    full = load("VOC-Folder/deform_rfcn_R_50.yaml")
    assert differing_keys(thin, full) == {
        "MODEL.PIXEL_MEAN",
        "MODEL.RESNETS.RES2_OUT_CHANNELS",
        "MODEL.RESNETS.WIDTH_PER_GROUP",
    }


def test_parameters_added_to_rfcn() -> None:
    """Table 4: 47.1 M -> 49.5 M. One deformable group, 20 classes."""
    plain = build_without_memory(load("VOC-Detection/rfcn_R_101.yaml"))
    deformable = build_without_memory(load("VOC-Detection/deform_rfcn_R_101.yaml"))
    convolutions = 3 * (512 * 3 * 3 + 1) * 18
    pooling = 2 * 7 * 7 * (21 + 1) * (1024 + 1)
    assert (convolutions, pooling) == (248_886, 2_209_900)
    assert count_parameters(deformable) - count_parameters(plain) == convolutions + pooling

    release = build_without_memory(load("VOC-Detection/deform_rfcn_R_101_release.yaml"))
    assert count_parameters(release) - count_parameters(plain) == 4 * convolutions + pooling


@pytest.mark.parametrize("data, iterations", [("VOC", 30_000), ("COCO", 240_000)])
def test_schedule_is_the_papers_at_the_releases_rate(data: str, iterations: int) -> None:
    solver = load(f"{data}-Detection/deform_rfcn_R_101.yaml").SOLVER
    pictures = solver.IMS_PER_BATCH
    assert pictures == 8
    assert solver.BASE_LR == pytest.approx(5e-4 * pictures)
    assert solver.WEIGHT_DECAY == pytest.approx(5e-4 / pictures)
    assert solver.MAX_ITER == iterations
    assert solver.STEPS == (iterations * 2 // 3,)
