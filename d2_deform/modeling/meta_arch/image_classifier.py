"""A backbone with an image classifier on top, which is how backbones are pre-trained."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import CNNBlockBase
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ImageClassifier"]


@META_ARCH_REGISTRY.register()
class ImageClassifier(nn.Module):
    """Normalisation, a backbone, the average of its last map, and one fully connected layer.

    The backbone is the child ``backbone``, as in Detectron2's detectors, whose checkpoints
    therefore have the same names for its weights. The layer ``linear`` is initialised as that of
    Detectron2's classifier form of ``ResNet``.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        in_feature: str = "res5",
        label_smoothing: float = 0.0,
        zero_init_residual: bool = False,
    ) -> None:
        """
        Args:
            backbone: any of Detectron2's.
            num_classes: K, 1 or more.
            pixel_mean, pixel_std: of every channel, in grey levels and in the pictures' order of
                channels. A network that starts from these weights needs the same.
            in_feature: name of the map that is classified.
            label_smoothing: 0 to 1, the share of the target that is spread evenly over all classes.
            zero_init_residual: the last norm of every residual block starts at zero, so that blocks
                start as their shortcuts (Goyal et al., "Accurate, Large Minibatch SGD", 5.1).

        Raises:
            ValueError: an argument is out of its range, or the backbone lacks the map.
        """
        super().__init__()
        given = backbone.output_shape()
        if in_feature not in given:
            raise ValueError(
                f"in_feature (MODEL.IMAGE_CLASSIFIER.IN_FEATURE): {in_feature} given, but the "
                f"backbone gives {list(given)} (MODEL.RESNETS.OUT_FEATURES)"
            )
        if not 0 <= label_smoothing <= 1:
            raise ValueError(
                "label_smoothing (MODEL.IMAGE_CLASSIFIER.LABEL_SMOOTHING): "
                f"{label_smoothing} given, accepted: 0 to 1"
            )
        self.backbone = backbone
        self.in_feature = in_feature
        self.label_smoothing = label_smoothing
        if zero_init_residual:
            _zero_last_norms(backbone)
        self.linear = nn.Linear(given[in_feature].channels, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {
            "backbone": build_backbone(cfg),
            "num_classes": cfg.MODEL.IMAGE_CLASSIFIER.NUM_CLASSES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "in_feature": cfg.MODEL.IMAGE_CLASSIFIER.IN_FEATURE,
            "label_smoothing": cfg.MODEL.IMAGE_CLASSIFIER.LABEL_SMOOTHING,
            "zero_init_residual": cfg.MODEL.IMAGE_CLASSIFIER.ZERO_INIT_RESIDUAL,
        }

    @property
    def device(self) -> torch.device:
        return self.linear.weight.device

    def forward(
        self, batched_inputs: list[dict[str, Any]]
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """
        Args:
            batched_inputs: for every picture "image", a Tensor[C, H, W] of grey levels, all of one
                size; in training also "label", the class's number from 0.

        Returns:
            In training {"loss_cls": the mean cross-entropy}. In inference for every picture
            {"scores": Tensor[K]}, probabilities that sum to 1.
        """
        images = torch.stack([given["image"] for given in batched_inputs]).to(self.device)
        images = (images - self.pixel_mean) / self.pixel_std
        features = self.backbone(images)[self.in_feature]
        logits = self.linear(features.mean(dim=(2, 3)))
        if self.training:
            labels = torch.tensor([given["label"] for given in batched_inputs], device=self.device)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
            return {"loss_cls": loss}
        return [{"scores": scores} for scores in logits.float().softmax(dim=1)]


def _zero_last_norms(backbone: nn.Module) -> None:
    """Of BasicBlock conv2's, of BottleneckBlock conv3's, of InceptionResNetBlock conv_out's."""
    for block in backbone.modules():
        if not isinstance(block, CNNBlockBase):
            continue
        convolutions = (getattr(block, name, None) for name in ("conv_out", "conv3", "conv2"))
        last = next((convolution for convolution in convolutions if convolution is not None), None)
        if last is not None and last.norm is not None:  # the stem has none of them
            nn.init.zeros_(last.norm.weight)
