"""One training step of every network in mixed precision on CPU."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from d2_deform import model_zoo
from d2_deform.engine.mixed_precision import CPUAMPTrainer
from d2_deform.layers import (
    DeformConv2d,
    DeformPSRoIPool,
    DeformRoIPool,
    OffsetConv2d,
)
from d2_deform.layers.zero_init import ZeroConv2d, ZeroLinear
from d2_deform.solver import build_optimizer

SIZE = 64
NETWORKS = {
    "R-FCN": ("quickstart.yaml", []),
    "R-FCN, FrozenBN, DCNv2": (
        "quickstart.yaml",
        ["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.DEFORM.MODULATED", True],
    ),
    "R-FCN, OHEM": ("quickstart.yaml", ["MODEL.OHEM.ENABLED", True]),
    "Faster R-CNN": ("Deformed-Digits/faster_rcnn_thin_R_18_dconv3_dpool.yaml", []),
    "category-aware RPN": ("Deformed-Digits/category_aware_rpn_thin_R_18_dconv3.yaml", []),
    "DeepLab": ("Deformed-Digits/deeplab_thin_R_18_dconv3.yaml", []),
    "classifier, ResNet": (
        "Image-Folder/classifier_thin_R_18.yaml",
        ["MODEL.DEFORM.NUM_LAYERS", 3, "MODEL.IMAGE_CLASSIFIER.ZERO_INIT_RESIDUAL", False],
    ),
    "classifier, AIR": (
        "Image-Folder/classifier_thin_AIR.yaml",
        ["MODEL.DEFORM.NUM_LAYERS", 1, "MODEL.IMAGE_CLASSIFIER.ZERO_INIT_RESIDUAL", False],
    ),
}
OFFSET_LAYERS = (OffsetConv2d, ZeroConv2d, ZeroLinear)
SAMPLING_LAYERS = (DeformConv2d, DeformRoIPool, DeformPSRoIPool)


def make_cfg(name, opts):
    cfg = model_zoo.get_config(name)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *opts])
    return cfg


def make_batch():
    generator = torch.Generator().manual_seed(0)
    instances = Instances((SIZE, SIZE))
    instances.gt_boxes = Boxes([[8.0, 8, 40, 56], [30, 4, 60, 36]])
    instances.gt_classes = torch.tensor([3, 7])
    sem_seg = torch.zeros(SIZE, SIZE, dtype=torch.long)
    sem_seg[8:56, 8:40] = 4
    image = torch.randint(0, 256, (3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    return [{"image": image, "instances": instances, "sem_seg": sem_seg, "label": 2}] * 2


def record_types(model, classes):
    """Notes the type of what each layer of ``classes`` returns, by the layer's name."""
    types = {}
    for name, module in model.named_modules():
        if isinstance(module, classes):
            module.register_forward_hook(
                lambda _, inputs, output, name=name: types.update({name: output.dtype})
            )
    return types


@pytest.mark.parametrize("network", NETWORKS)
def test_a_step_in_bfloat16(network):
    torch.manual_seed(0)
    cfg = make_cfg(*NETWORKS[network])
    model = build_model(cfg)
    offsets = record_types(model, OFFSET_LAYERS)
    sampled = record_types(model, SAMPLING_LAYERS)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    trainer = CPUAMPTrainer(model, [make_batch()], build_optimizer(cfg, model))
    trainer.iter = 0
    with EventStorage() as storage:
        trainer.run_step()
        assert storage.latest()["total_loss"][0] < 10

    assert set(offsets.values()) == {torch.float32}
    assert set(sampled.values()) == {torch.bfloat16}
    for key, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.isfinite().all(), key
        if "offset" in key and key.endswith("bias"):
            assert parameter.grad.any() and not torch.equal(parameter, before[key]), key


@pytest.mark.parametrize("network", NETWORKS)
def test_losses_and_predictions_in_float16(network):
    """The types that Detectron2's AMPTrainer has on CUDA."""
    torch.manual_seed(0)
    model = build_model(make_cfg(*NETWORKS[network]))
    offsets = record_types(model, OFFSET_LAYERS)
    with EventStorage(), torch.autocast("cpu", dtype=torch.float16):
        losses = model(make_batch())
    sum(losses.values()).backward()
    assert set(offsets.values()) == {torch.float32}
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        assert len(model(make_batch())) == 2


class _Fails(nn.Module):
    def forward(self, batch):
        assert torch.is_autocast_enabled("cpu")
        raise ZeroDivisionError


def test_a_failed_step_leaves_the_model_as_it_was():
    model = _Fails()
    with pytest.raises(ZeroDivisionError):
        CPUAMPTrainer(model, [None], None).run_step()
    assert "forward" not in vars(model)
    assert not torch.is_autocast_enabled("cpu")
