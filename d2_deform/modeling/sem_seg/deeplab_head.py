"""The paper's DeepLab: class scores by a 1x1 convolution, upsampled to the picture."""

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F

from d2_deform.modeling.new_layers import build_conv_new, init_new_layer

__all__ = ["DeepLabHead"]


@SEM_SEG_HEADS_REGISTRY.register()
class DeepLabHead(nn.Module):
    """DeepLab's head as in the paper's section 3, for Detectron2's ``SemanticSegmentor``.

    On the backbone's last feature map: ``conv_new`` 1x1 + ReLU, ``score`` 1x1 to the classes, fixed
    bilinear upsampling by the map's stride. No atrous pyramid and no CRF. In the official release
    the two layers are named ``fc6`` and ``score``.

    Upsampling is ``align_corners=False``: with stride s, cell j is the score at the middle of its s
    pixels, at index s * j + (s - 1) / 2. The release's fixed deconvolution (32 x 32, stride 16,
    cropped at offset 8) computes the same wherever a pixel lies between two cells. In the map's
    outer s / 2 pixels it reads zeros from beyond the map, which fades a pixel's scores by a common
    factor, about 1/2 at the edge: the classes are the same there, the loss is not. Here the
    outermost cells go on.

    The backbones' cell j has its receptive field centred on pixel s * j, half a stride before the
    place where its score is put. The learnt weights make up for it, as in the release, whose
    pooling without padding moves the centre to 2 pixels nearer.
    """

    @configurable
    def __init__(
        self,
        *,
        in_feature: str,
        in_channels: int,
        stride: int,
        num_classes: int,
        conv_dim: int = 1024,
        ignore_value: int = 255,
        loss_weight: float = 1.0,
    ) -> None:
        """
        Args:
            in_feature: name of the backbone's feature map.
            in_channels: its channels.
            stride: image pixels a cell of it, in each direction.
            num_classes: K, background included where the data set has one (21 for PASCAL VOC).
            conv_dim: channels of ``conv_new``.
            ignore_value: label of the pixels that are not learnt from.
            loss_weight: factor of the loss.
        """
        if num_classes < 1:
            raise ValueError(
                f"DeepLab needs at least one class, got num_classes={num_classes}; "
                "set MODEL.SEM_SEG_HEAD.NUM_CLASSES"
            )
        if 0 <= ignore_value < num_classes:
            raise ValueError(
                f"label {ignore_value} would be class {ignore_value} of {num_classes} and ignored "
                "too; set MODEL.SEM_SEG_HEAD.IGNORE_VALUE to no class's number, such as 255"
            )
        super().__init__()
        self.in_feature = in_feature
        self.stride = stride
        self.ignore_value = ignore_value
        self.loss_weight = loss_weight
        self.conv_new = build_conv_new(in_channels, conv_dim)
        self.score = nn.Conv2d(conv_dim, num_classes, kernel_size=1)
        init_new_layer(self.score)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        head = cfg.MODEL.SEM_SEG_HEAD
        if len(head.IN_FEATURES) != 1:
            raise ValueError(
                "DeepLabHead reads one feature map; MODEL.SEM_SEG_HEAD.IN_FEATURES is "
                f"{list(head.IN_FEATURES)}, expected one name such as ['res5']"
            )
        feature = input_shape.get(head.IN_FEATURES[0])
        if feature is None:
            raise ValueError(
                f"the backbone gives {sorted(input_shape)}, not MODEL.SEM_SEG_HEAD.IN_FEATURES' "
                f"{head.IN_FEATURES[0]!r}; name it in MODEL.RESNETS.OUT_FEATURES"
            )
        return {
            "in_feature": head.IN_FEATURES[0],
            "in_channels": feature.channels,
            "stride": feature.stride,
            "num_classes": head.NUM_CLASSES,
            "conv_dim": head.CONVS_DIM,
            "ignore_value": head.IGNORE_VALUE,
            "loss_weight": head.LOSS_WEIGHT,
        }

    def forward(
        self, features: dict[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """As Detectron2's heads for semantic segmentation.

        Args:
            features: feature maps by name, each Tensor[N, channels, h, w].
            targets: labels of the (padded) pictures' pixels, Tensor[N, H, W] of int64 with
                H <= stride * h and W <= stride * w; needed in training.

        Returns:
            In training None and ``loss_sem_seg``; in inference the logits
            (Tensor[N, K, stride * h, stride * w]) and an empty dict. Both begin at the pictures'
            upper left corner and may reach beyond their lower right one; SemanticSegmentor cuts
            them.
        """
        scores = self.score(self.conv_new(features[self.in_feature]))
        logits = F.interpolate(
            scores.float(), scale_factor=self.stride, mode="bilinear", align_corners=False
        )
        if not self.training:
            return logits, {}
        assert targets is not None, "'targets' argument is required during training"
        return None, self.losses(logits, targets)

    def losses(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Softmax cross-entropy, the mean over all pixels of the batch that have a class.

        It is taken at the network's input resolution, as in the release, and is 0 where every
        pixel is to be ignored.

        Args:
            logits: Tensor[N, K, H', W'], H' >= H and W' >= W.
            targets: Tensor[N, H, W] of int64.
        """
        height, width = targets.shape[-2:]
        total = F.cross_entropy(
            logits[:, :, :height, :width],
            targets,
            reduction="sum",
            ignore_index=self.ignore_value,
        )
        num_pixels = (targets != self.ignore_value).sum().clamp(min=1)
        return {"loss_sem_seg": self.loss_weight * total / num_pixels}
