"""MMDetection's Faster R-CNN on FPN, written in its own terms: names of its state_dict, mmcv's
channels of offsets and factors, its normalisation. Independent of this package.

After mmdet/models (resnet.py, fpn.py, rpn_head.py, bbox_head.py, single_level_roi_extractor.py) and
mmcv/ops (deform_conv.py, modulated_deform_conv.py); "dpool" as mmdet/ops/dcn had it when the
published model was trained.
"""

import math

import torch
from release_network import BINS, ps_pool
from torch.nn import functional as F
from torchvision.ops import deform_conv2d, roi_align

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # RGB
DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
STRIDES = (4, 8, 16, 32)


def shapes(
    *,
    depth=50,
    classes=80,
    dcn=0,  # channels of conv_offset for each group and tap: 2 (DCN), 3 (DCNv2), 0 without
    groups=1,
    dpool=False,
    mask=False,
    width=64,
    fpn=256,
    fc=1024,
):
    """Every tensor's shape by its name; stages 2 to 4 are deformable."""
    table = {"backbone.conv1.weight": (width, 3, 7, 7), **_norm("backbone.bn1", width)}
    before = width
    for stage, blocks in enumerate(DEPTHS[depth]):
        narrow, wide = width * 2**stage, 4 * width * 2**stage
        for block in range(blocks):
            name = f"backbone.layer{stage + 1}.{block}"
            for conv, outputs, inputs, kernel in (
                (1, narrow, before, 1),
                (2, narrow, narrow, 3),
                (3, wide, narrow, 1),
            ):
                table[f"{name}.conv{conv}.weight"] = (outputs, inputs, kernel, kernel)
                table |= _norm(f"{name}.bn{conv}", outputs)
            if dcn and stage > 0:
                table |= _layer(f"{name}.conv2.conv_offset", dcn * 9 * groups, narrow, 3, 3)
            if block == 0:
                table[f"{name}.downsample.0.weight"] = (wide, before, 1, 1)
                table |= _norm(f"{name}.downsample.1", wide)
            before = wide
        table |= _layer(f"neck.lateral_convs.{stage}.conv", fpn, wide, 1, 1)
        table |= _layer(f"neck.fpn_convs.{stage}.conv", fpn, fpn, 3, 3)
        if dpool:
            head = f"roi_head.bbox_roi_extractor.roi_layers.{stage}.offset_fc"
            widths = (fpn * BINS**2, 1024, 1024, 2 * BINS**2)
            for index in range(3):
                table |= _layer(f"{head}.{2 * index}", widths[index + 1], widths[index])
    table |= _layer("rpn_head.rpn_conv", fpn, fpn, 3, 3)
    table |= _layer("rpn_head.rpn_cls", 3, fpn, 1, 1) | _layer("rpn_head.rpn_reg", 12, fpn, 1, 1)
    head = "roi_head.bbox_head"
    table |= _layer(f"{head}.fc_cls", classes + 1, fc) | _layer(f"{head}.fc_reg", 4 * classes, fc)
    table |= _layer(f"{head}.shared_fcs.0", fc, fpn * BINS**2)
    table |= _layer(f"{head}.shared_fcs.1", fc, fc)
    if mask:
        for index in range(4):
            table |= _layer(f"roi_head.mask_head.convs.{index}.conv", fpn, fpn, 3, 3)
        table["roi_head.mask_head.upsample.weight"] = (fpn, fpn, 2, 2)
        table["roi_head.mask_head.upsample.bias"] = (fpn,)
        table |= _layer("roi_head.mask_head.conv_logits", classes, fpn, 1, 1)
    return table


def _layer(name, outputs, *inputs):
    return {f"{name}.weight": (outputs, *inputs), f"{name}.bias": (outputs,)}


def _norm(name, channels):
    parts = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{part}": (channels,) for part in parts} | {f"{name}.num_batches_tracked": ()}


def fill(table, seed=0):
    """Numbers that keep maps, offsets and scores of size 1."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in table.items():
        value = torch.randn(shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            value = torch.tensor(7330)
        elif len(shape) > 1:
            fan_in = math.prod(shape[1:])
            small = 0.05 if "reg" in name else 0.3 if "offset" in name else 1
            value *= small * (2 / fan_in) ** 0.5
        elif name.endswith("running_var") or (".bn" in name and name.endswith(".weight")):
            value = 0.5 + torch.rand(shape, generator=generator)
            if name.endswith("bn3.weight"):
                value *= 0.2
        else:
            value *= 0.1
        weights[name] = value
    return weights


class MMDet:
    """Runs a network on its weights."""

    def __init__(self, weights, depth=50, groups=1):
        self.weights, self.depth, self.groups = weights, depth, groups

    def data(self, picture_bgr):
        rgb = torch.as_tensor(picture_bgr[:, :, ::-1].copy()).double().permute(2, 0, 1)
        mean, std = (torch.tensor(v, dtype=rgb.dtype)[:, None, None] for v in (MEAN, STD))
        return ((rgb - mean) / std)[None].float()

    def conv(self, name, x, **kwargs):
        return F.conv2d(
            x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"), **kwargs
        )

    def fc(self, name, x):
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def norm(self, name, x):
        parts = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(self.weights[f"{name}.{part}"] for part in parts), eps=1e-5)

    def neck(self, x):
        """The maps of strides 4 to 64."""
        x = self.norm("backbone.bn1", self.conv("backbone.conv1", x, stride=2, padding=3)).relu()
        x = F.max_pool2d(x, 3, 2, 1)
        laterals = []
        for stage, blocks in enumerate(DEPTHS[self.depth]):
            for block in range(blocks):
                stride = 2 if block == 0 and stage > 0 else 1
                x = self.block(f"backbone.layer{stage + 1}.{block}", x, stride)
            laterals.append(self.conv(f"neck.lateral_convs.{stage}.conv", x))
        for level in (3, 2, 1):
            size = laterals[level - 1].shape[-2:]
            laterals[level - 1] = laterals[level - 1] + F.interpolate(laterals[level], size)
        outs = [
            self.conv(f"neck.fpn_convs.{level}.conv", lateral, padding=1)
            for level, lateral in enumerate(laterals)
        ]
        return [*outs, F.max_pool2d(outs[-1], 1, stride=2)]

    def block(self, name, x, stride):
        """Style "pytorch": the 3x3 convolution has the stride."""
        out = self.norm(f"{name}.bn1", self.conv(f"{name}.conv1", x)).relu()
        if f"{name}.conv2.conv_offset.weight" in self.weights:
            raw = self.conv(f"{name}.conv2.conv_offset", out, stride=stride, padding=1)
            mask = None
            if raw.shape[1] == 27 * self.groups:
                first, second, factors = torch.chunk(raw, 3, dim=1)
                raw, mask = torch.cat((first, second), dim=1), torch.sigmoid(factors)
            weight = self.weights[f"{name}.conv2.weight"]
            out = deform_conv2d(out, raw, weight, stride=stride, padding=1, mask=mask)
        else:
            out = self.conv(f"{name}.conv2", out, stride=stride, padding=1)
        out = self.norm(f"{name}.bn2", out).relu()
        out = self.norm(f"{name}.bn3", self.conv(f"{name}.conv3", out))
        if f"{name}.downsample.0.weight" in self.weights:
            x = self.norm(
                f"{name}.downsample.1", self.conv(f"{name}.downsample.0", x, stride=stride)
            )
        return (out + x).relu()

    def proposals(self, level, x):
        """Boxes (rows * columns * 3, 4) and probabilities of one map, before any choice."""
        hidden = self.conv("rpn_head.rpn_conv", x, padding=1).relu()
        scores = self.conv("rpn_head.rpn_cls", hidden)[0].permute(1, 2, 0).reshape(-1).sigmoid()
        deltas = self.conv("rpn_head.rpn_reg", hidden)[0].permute(1, 2, 0).reshape(-1, 4)
        stride, rows, columns = 4 * 2**level, *x.shape[-2:]
        ratios = torch.tensor([0.5, 1.0, 2.0])
        half_h, half_w = 8 * stride * ratios.sqrt() / 2, 8 * stride / ratios.sqrt() / 2
        base = torch.stack([-half_w, -half_h, half_w, half_h], dim=1)
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        shifts = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4) * stride
        return delta2bbox((shifts + base).reshape(-1, 4), deltas, (1.0, 1, 1, 1)), scores

    def heads(self, outs, rois):
        """Probabilities (R, C + 1), background last, and boxes (R, 4 * C)."""
        sizes = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
        levels = (sizes / 56 + 1e-6).log2().floor().clamp(0, 3).long()
        pooled = outs[0].new_zeros(len(rois), outs[0].shape[1], BINS, BINS)
        for level in range(4):
            chosen = rois[levels == level]
            pooled[levels == level] = self.pool(level, outs[level], chosen)
        x = pooled.flatten(1)
        for index in (0, 1):
            x = self.fc(f"roi_head.bbox_head.shared_fcs.{index}", x).relu()
        probabilities = self.fc("roi_head.bbox_head.fc_cls", x).softmax(dim=1)
        deltas = self.fc("roi_head.bbox_head.fc_reg", x)
        return probabilities, delta2bbox(rois[:, 1:], deltas, (0.1, 0.1, 0.2, 0.2))

    def pool(self, level, x, rois):
        scale, name = 1 / STRIDES[level], f"roi_head.bbox_roi_extractor.roi_layers.{level}"
        if f"{name}.offset_fc.0.weight" not in self.weights:
            return roi_align(x, rois, BINS, scale, sampling_ratio=-1, aligned=True)
        hidden = ps_pool(x, rois, None, 1, scale).flatten(1)
        for index in (0, 2):
            hidden = self.fc(f"{name}.offset_fc.{index}", hidden).relu()
        trans = self.fc(f"{name}.offset_fc.4", hidden).reshape(-1, 2, BINS, BINS)
        return ps_pool(x, rois, trans, 1, scale)


def delta2bbox(rois, deltas, stds):
    """Boxes (R, 4 * n) from boxes (R, 4) and deltas (R, 4 * n)."""
    dx, dy, dw, dh = (deltas.reshape(len(rois), -1, 4) * torch.tensor(stds)).unbind(dim=2)
    w, h = (rois[:, 2] - rois[:, 0])[:, None], (rois[:, 3] - rois[:, 1])[:, None]
    x, y = (rois[:, 0] + rois[:, 2])[:, None] / 2, (rois[:, 1] + rois[:, 3])[:, None] / 2
    x, y, w, h = x + w * dx, y + h * dy, w * dw.exp(), h * dh.exp()
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=2).flatten(1)
