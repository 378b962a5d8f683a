"""Small networks with random weights whose outputs mean something."""

import os

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from d2_deform.analysis import fit_batch_norms
from d2_deform.engine import load_config

CONFIGS = os.path.join(os.path.dirname(__file__), "..", "..", "configs")

TINY = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""),
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.NORM", "BN"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "4", "MODEL.RESNETS.RES2_OUT_CHANNELS", "4"),
    *("MODEL.RPN.PRE_NMS_TOPK_TEST", "50", "MODEL.RPN.POST_NMS_TOPK_TEST", "12"),
    *("MODEL.ROI_HEADS.NUM_CLASSES", "3", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.1"),
    *("TEST.DETECTIONS_PER_IMAGE", "20"),
]
SHALLOW = [  # res3 is the last stage: half of the time that an export takes
    *("MODEL.RESNETS.OUT_FEATURES", "['res3']", "MODEL.DEFORM.NUM_LAYERS", "2"),
    *("MODEL.RPN.IN_FEATURES", "['res3']", "MODEL.ROI_HEADS.IN_FEATURES", "['res3']"),
    *("MODEL.SEM_SEG_HEAD.IN_FEATURES", "['res3']", "MODEL.IMAGE_CLASSIFIER.IN_FEATURE", "res3"),
]
NETWORKS = {
    "rfcn": ("quickstart.yaml", [*SHALLOW, "MODEL.RFCN.CONV_DIM", "8"]),
    "faster_rcnn": (
        "Deformed-Digits/faster_rcnn_thin_R_18_dconv3_dpool.yaml",
        [*SHALLOW, "MODEL.DEFORM_ROI_HEADS.CONV_DIM", "8", "MODEL.ROI_BOX_HEAD.FC_DIM", "16"],
    ),
    "category_aware_rpn": (
        "Deformed-Digits/category_aware_rpn_thin_R_18_dconv3.yaml",
        [*SHALLOW, "MODEL.CATEGORY_AWARE_RPN.CONV_DIM", "16", "MODEL.DEFORM.MODULATED", "True"],
    ),
    "deeplab": (
        "Deformed-Digits/deeplab_thin_R_18_dconv3.yaml",
        [*SHALLOW, "MODEL.SEM_SEG_HEAD.CONVS_DIM", "8"],
    ),
    "classifier": (
        "Image-Folder/classifier_thin_R_18.yaml",
        [*SHALLOW, "MODEL.IMAGE_CLASSIFIER.NUM_CLASSES", "3"],
    ),
    "fpn": (
        "COCO-Detection/faster_rcnn_R_50_FPN_mdconv13.yaml",
        [
            *("MODEL.DEFORM.NUM_LAYERS_PER_STAGE", "[0, 0, 0, 2]", "MODEL.FPN.OUT_CHANNELS", "8"),
            *(
                "MODEL.RPN.IN_FEATURES",
                "['p4', 'p5']",
                "MODEL.ROI_HEADS.IN_FEATURES",
                "['p4', 'p5']",
            ),
            *("MODEL.ANCHOR_GENERATOR.SIZES", "[[24], [48]]"),
            *("MODEL.RPN.CONV_DIMS", "[8]", "MODEL.ROI_BOX_HEAD.FC_DIM", "16"),
            *("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "DeformRoIPool"),
            *("MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", "2"),
        ],
    ),
}


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """Blotches of grey levels, (3, height, width)."""
    torch.manual_seed(seed)
    coarse = 255 * torch.rand(1, 3, height // 12 + 2, width // 12 + 2)
    return nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")[0].clamp(0, 255)


def build(name: str, *opts: str) -> tuple[CfgNode, nn.Module]:
    """One of ``NETWORKS``, with offsets, distinct scores and boxes of many sizes."""
    config, own = NETWORKS[name]
    cfg = load_config(os.path.join(CONFIGS, config), [*TINY, *own, *opts], with_data=False)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    for layer_name, parameter in model.named_parameters():
        if "offset" in layer_name:
            nn.init.normal_(parameter, std=0.2)
        elif any(part in layer_name for part in ("cls_", "bbox_pred", "objectness", "anchor_del")):
            nn.init.normal_(parameter, std=0.3)
    fit_batch_norms(model, [{"image": picture(96, 128)}])
    return cfg, model


def predict(model: nn.Module, image: Tensor) -> tuple[Tensor, ...]:
    """What the network itself says, in the order of an exported one's outputs."""
    with torch.no_grad():
        (output,) = model([{"image": image}])
    if "instances" in output:
        found = output["instances"]
        return found.pred_boxes.tensor, found.scores, found.pred_classes
    return tuple(output.values())
