"""The official release's networks, written in its own terms: array names, order of classes and
anchors, boxes whose last pixel belongs to them. Independent of this package.

After github.com/msracver/Deformable-ConvNets: */symbols/resnet_v1_101_*.py, lib/rpn,
lib/bbox/bbox_transform.py, rfcn/operator_cxx/deformable_psroi_pooling.cu, lib/utils/image.py.
"""

import numpy as np
import torch
from torch.nn import functional as F
from torchvision.ops import deform_conv2d, roi_pool

BLOCKS = {
    2: ("a", "b", "c"),
    3: ("a", "b1", "b2", "b3"),
    4: ("a", *(f"b{n}" for n in range(1, 23))),
    5: ("a", "b", "c"),
}
BINS = 7


def shapes(
    kind,  # "rfcn", "rcnn", "deeplab" or "resnet"
    *,
    classes,  # with the background
    anchors=9,
    groups=0,  # deformable groups; 0: the plain network
    stem=64,
    narrow=64,  # channels of res2's 3x3 convolutions
    res2=256,
    conv_new=None,
    rpn=512,
    fc=1024,
):
    """Every array's shape by its name in the file."""
    table = {"arg:conv1_weight": (stem, 3, 7, 7), **_norm("bn_conv1", stem)}
    before, wide = stem, res2
    for stage, blocks in BLOCKS.items():
        for block in blocks:
            layers = {"2a": (narrow, before, 1), "2b": (narrow, narrow, 3), "2c": (wide, narrow, 1)}
            if block == "a":
                layers["1"] = (wide, before, 1)
            for branch, (after, inputs, kernel) in layers.items():
                name = f"{stage}{block}_branch{branch}"
                table[f"arg:res{name}_weight"] = (after, inputs, kernel, kernel)
                table |= _norm(f"bn{name}", after)
            if stage == 5 and groups:
                offset = f"res{stage}{block}_branch2b_offset"
                table |= _layer(offset, 18 * groups, narrow, 3, 3)
            before = wide
        narrow, wide = 2 * narrow, 2 * wide
    if kind == "resnet":
        return table | _layer("fc1000", classes, before)
    if kind == "deeplab":
        dim = conv_new or 1024
        table |= _layer("fc6", dim, before, 1, 1) | _layer("score", classes, dim, 1, 1)
        return table | {"arg:upsampling_weight": (classes, 1, 32, 32)}
    table |= _layer("rpn_conv_3x3", rpn, before // 2, 3, 3)
    table |= _layer("rpn_cls_score", 2 * anchors, rpn, 1, 1)
    table |= _layer("rpn_bbox_pred", 4 * anchors, rpn, 1, 1)
    if kind == "rfcn":
        dim = conv_new or 1024
        outputs = {"rfcn_cls": classes, "rfcn_bbox": 8, "rfcn_bbox_test": 8}
        if groups:
            outputs |= {"rfcn_cls_offset_t": 2 * classes, "rfcn_bbox_offset_t": 2}
        table |= _layer("conv_new_1", dim, before, 1, 1)
        for name, number in outputs.items():
            table |= _layer(name, number * BINS**2, dim, 1, 1)
    else:
        dim = conv_new or 256
        table |= _layer("conv_new_1", dim, before, 1, 1)
        if groups:
            table |= _layer("offset", 2 * BINS**2, dim * BINS**2)
        table |= _layer("fc_new_1", fc, dim * BINS**2) | _layer("fc_new_2", fc, fc)
        table |= _layer("cls_score", classes, fc)
        table |= _layer("bbox_pred", 4 * classes, fc) | _layer("bbox_pred_test", 4 * classes, fc)
    return {_test_last(name): shape for name, shape in table.items()}


def _layer(name, outputs, *inputs):
    return {f"arg:{name}_weight": (outputs, *inputs), f"arg:{name}_bias": (outputs,)}


def _norm(name, channels):
    arrays = ("arg:{}_gamma", "arg:{}_beta", "aux:{}_moving_mean", "aux:{}_moving_var")
    return {array.format(name): (channels,) for array in arrays}


def _test_last(name):
    """The file has "bbox_pred_weight_test", not "bbox_pred_test_weight"."""
    head, test, tail = name.partition("_test_")
    return f"{head}_{tail}_test" if test else name


def fill(table, seed=0):
    """Numbers that keep a deep network's maps, offsets and scores of size 1."""
    generator = torch.Generator().manual_seed(seed)
    arrays = {}
    for name, shape in table.items():
        value = torch.randn(shape, generator=generator)
        fan_in = max(1, int(np.prod(shape[1:])))
        if name.endswith(("gamma", "moving_var")):
            value = 0.5 + torch.rand(shape, generator=generator)
            if "branch2c_gamma" in name:
                value *= 0.1
        elif name.endswith(("beta", "moving_mean", "bias")):
            value *= 0.1
        elif "offset" in name:
            value *= (0.2 if "branch2b" in name else 1) / fan_in**0.5
        elif name.endswith("_weight"):
            value *= (2 / fan_in) ** 0.5 * {
                "arg:conv1_weight": 1 / 64,
                "arg:rpn_conv_3x3_weight": 0.2,
            }.get(name, 1)
        if "bbox" in name:
            value *= 0.1
        arrays[name] = value
    for name in [name for name in arrays if name.endswith("_test")]:
        trained = arrays[name.removesuffix("_test")]
        bins = BINS**2 if "rfcn" in name else 1
        stds = torch.tensor([0.1, 0.1, 0.2, 0.2]).repeat_interleave(bins)
        stds = stds.repeat(len(trained) // len(stds))
        arrays[name] = trained * stds.reshape(-1, *[1] * (trained.dim() - 1))
    if "arg:upsampling_weight" in arrays:
        ramp = 1 - (torch.arange(32) - 15.5).abs() / 16
        arrays["arg:upsampling_weight"][:] = ramp[:, None] * ramp
    return arrays


class Release:
    """Runs a network of the release on its arrays, in float64."""

    def __init__(self, arrays, groups):
        self.arrays = {name.partition(":")[2]: value.double() for name, value in arrays.items()}
        for name in [name for name in self.arrays if "_test" in name]:  # load_param(process=True)
            self.arrays[name.replace("_test", "")] = self.arrays.pop(name)
        self.groups = groups

    def data(self, picture_bgr):
        """(1, 3, H, W) RGB less the mean, from uint8 (H, W, 3) BGR."""
        means_bgr = [103.06, 115.90, 123.15]
        planes = [
            torch.as_tensor(picture_bgr[:, :, 2 - i].astype(np.float64)) - means_bgr[2 - i]
            for i in range(3)
        ]
        return torch.stack(planes)[None]

    def conv(self, name, x, **kwargs):
        bias = self.arrays.get(f"{name}_bias")
        return F.conv2d(x, self.arrays[f"{name}_weight"], bias, **kwargs)

    def fc(self, name, x):
        return x.flatten(1) @ self.arrays[f"{name}_weight"].T + self.arrays[f"{name}_bias"]

    def norm(self, name, x):
        gamma, beta, mean, var = (
            self.arrays[f"{name}_{part}"][:, None, None]
            for part in ("gamma", "beta", "moving_mean", "moving_var")
        )
        return gamma * (x - mean) / (var + 1e-5).sqrt() + beta

    def body(self, x, offset_dilation):
        """conv4 and conv5."""
        x = self.norm("bn_conv1", self.conv("conv1", x, stride=2, padding=3)).relu()
        x = F.max_pool2d(x, kernel_size=3, stride=2, ceil_mode=True)
        for stage, blocks in BLOCKS.items():
            for block in blocks:
                stride = 2 if block == "a" and stage in (3, 4) else 1
                x = self.block(f"{stage}{block}_branch", x, stride, offset_dilation)
            if stage == 4:
                conv4 = x
        return conv4, x

    def block(self, name, x, stride, offset_dilation):
        out = self.norm(f"bn{name}2a", self.conv(f"res{name}2a", x, stride=stride)).relu()
        dilation = 2 if name.startswith("5") else 1
        if f"res{name}2b_offset_weight" in self.arrays:
            d = offset_dilation
            offset = self.conv(f"res{name}2b_offset", out, padding=d, dilation=d)
            assert offset.shape[1] == 18 * self.groups
            weight = self.arrays[f"res{name}2b_weight"]
            out = deform_conv2d(out, offset, weight, padding=2, dilation=2)
        else:
            out = self.conv(f"res{name}2b", out, padding=dilation, dilation=dilation)
        out = self.norm(f"bn{name}2b", out).relu()
        out = self.norm(f"bn{name}2c", self.conv(f"res{name}2c", out))
        if f"res{name}1_weight" in self.arrays:
            x = self.norm(f"bn{name}1", self.conv(f"res{name}1", x, stride=stride))
        return (x + out).relu()

    def proposals(self, conv4, scales):
        """Every anchor's box (its last pixel inclusive) and probability.

        Returns:
            Tensors (rows, columns, ratios, scales, 4) and (rows, columns, ratios, scales).
        """
        hidden = self.conv("rpn_conv_3x3", conv4, padding=1).relu()
        scores, deltas = self.conv("rpn_cls_score", hidden), self.conv("rpn_bbox_pred", hidden)
        _, channels, rows, columns = scores.shape
        probability = scores.reshape(2, channels // 2, rows, columns).softmax(dim=0)[1]
        anchors = generate_anchors(scales=scales)  # (A, 4)
        y, x = np.meshgrid(np.arange(rows) * 16, np.arange(columns) * 16, indexing="ij")
        shifts = torch.as_tensor(np.stack([x, y, x, y], axis=-1))
        anchors = (shifts[:, :, None] + torch.as_tensor(anchors)).reshape(-1, 4)
        boxes = nonlinear_pred(anchors, deltas[0].permute(1, 2, 0).reshape(-1, 4))
        grid = (rows, columns, 3, len(scales))
        return boxes.reshape(*grid, 4), probability.permute(1, 2, 0).reshape(grid)

    def rfcn(self, conv5, rois):
        """Probabilities (R, C + 1), background first, and boxes (R, 4) of the objects."""
        feature = self.conv("conv_new_1", conv5).relu()
        cls, bbox = self.conv("rfcn_cls", feature), self.conv("rfcn_bbox", feature)
        cls_trans = ps_pool(self.conv("rfcn_cls_offset_t", feature), rois, None, BINS)
        bbox_trans = ps_pool(self.conv("rfcn_bbox_offset_t", feature), rois, None, BINS)
        scores = ps_pool(cls, rois, cls_trans, BINS).mean(dim=(2, 3))
        deltas = ps_pool(bbox, rois, bbox_trans, BINS).mean(dim=(2, 3))
        return scores.softmax(dim=1), nonlinear_pred(rois[:, 1:], deltas[:, 4:])

    def rcnn(self, conv5, rois):
        """Probabilities (R, C + 1), background first, and boxes (R, 4 * (C + 1))."""
        feature = self.conv("conv_new_1", conv5).relu()
        if "offset_weight" in self.arrays:
            trans = self.fc("offset", ps_pool(feature, rois, None, 1)).reshape(-1, 2, BINS, BINS)
            pooled = ps_pool(feature, rois, trans, 1)
        else:
            pooled = roi_pool(feature, rois, BINS, 1 / 16)
        hidden = self.fc("fc_new_2", self.fc("fc_new_1", pooled).relu()).relu()
        deltas = self.fc("bbox_pred", hidden)
        return self.fc("cls_score", hidden).softmax(dim=1), nonlinear_pred(rois[:, 1:], deltas)

    def deeplab(self, conv5, height, width):
        """Logits (1, K, height, width)."""
        score = self.conv("score", self.conv("fc6", conv5).relu())
        weight = self.arrays["upsampling_weight"]
        up = F.conv_transpose2d(score, weight, stride=16, groups=len(weight))
        return up[:, :, 8 : 8 + height, 8 : 8 + width]


def generate_anchors(base_size=16, ratios=(0.5, 1, 2), scales=(8, 16, 32)):
    """(ratios * scales, 4), last pixel inclusive; ratio by ratio."""
    anchors = []
    centre = (base_size - 1) / 2
    for ratio in ratios:
        width = np.round(np.sqrt(base_size * base_size / ratio))
        height = np.round(width * ratio)
        for scale in scales:
            half = np.array([width * scale - 1, height * scale - 1]) / 2
            anchors.append([*(centre - half), *(centre + half)])
    return np.array(anchors)


def nonlinear_pred(boxes, deltas):
    """Boxes (R, 4 * n), last pixel inclusive, from boxes (R, 4) and deltas (R, 4 * n)."""
    widths, heights = boxes[:, 2] - boxes[:, 0] + 1, boxes[:, 3] - boxes[:, 1] + 1
    x, y = boxes[:, 0] + 0.5 * (widths - 1), boxes[:, 1] + 0.5 * (heights - 1)
    dx, dy, dw, dh = deltas.reshape(len(boxes), -1, 4).unbind(dim=2)
    x, y = dx * widths[:, None] + x[:, None], dy * heights[:, None] + y[:, None]
    half_w = 0.5 * (dw.exp() * widths[:, None] - 1)
    half_h = 0.5 * (dh.exp() * heights[:, None] - 1)
    corners = torch.stack([x - half_w, y - half_h, x + half_w, y + half_h], dim=2)
    return corners.flatten(1)


def ps_pool(data, rois, trans, group, scale=1 / 16, samples=4, trans_std=0.1):
    """DeformablePSROIPooling of one picture's maps (1, D * group ** 2, H, W), RoI by RoI.

    trans: (R, 2 * classes, 7, 7), x before y; None: no_trans.
    """
    _, channels, height, width = data.shape
    depth = channels // group**2
    maps = data[0].reshape(depth, group, group, height, width)
    output = data.new_zeros(len(rois), depth, BINS, BINS)
    for r, roi in enumerate(rois.tolist()):
        x1, y1 = (round_away(v) * scale - 0.5 for v in roi[1:3])
        x2, y2 = ((round_away(v) + 1) * scale - 0.5 for v in roi[3:5])
        roi_w, roi_h = max(x2 - x1, 0.1), max(y2 - y1, 0.1)
        bin_w, bin_h = roi_w / BINS, roi_h / BINS
        for ph in range(BINS):
            for pw in range(BINS):
                positions = maps[:, ph * group // BINS, pw * group // BINS]
                dx = dy = data.new_zeros(depth)
                if trans is not None:
                    moved = trans[r, :, ph, pw].reshape(-1, 2)
                    moved = moved.repeat_interleave(depth // len(moved), dim=0)
                    dx, dy = moved[:, 0] * trans_std * roi_w, moved[:, 1] * trans_std * roi_h
                step = torch.arange(samples, dtype=data.dtype) / samples
                w = (pw * bin_w + x1 + dx)[:, None] + step * bin_w
                h = (ph * bin_h + y1 + dy)[:, None] + step * bin_h
                w, h = torch.broadcast_tensors(w[:, None, :], h[:, :, None])
                inside = (w >= -0.5) & (w <= width - 0.5) & (h >= -0.5) & (h <= height - 0.5)
                value = bilinear(positions, h.clamp(0, height - 1), w.clamp(0, width - 1))
                count = inside.sum(dim=(1, 2))
                output[r, :, ph, pw] = (value * inside).sum(dim=(1, 2)) / count.clamp(min=1)
    return output


def round_away(value):
    """C's round."""
    return np.floor(value + 0.5) if value >= 0 else np.ceil(value - 0.5)


def bilinear(maps, h, w):
    """maps (D, H, W) at (D, S, S) places inside of them."""
    h0, w0 = h.floor().long(), w.floor().long()
    h1, w1 = h.ceil().long(), w.ceil().long()
    d = torch.arange(len(maps))[:, None, None]
    fh, fw = h - h0, w - w0
    top = (1 - fw) * maps[d, h0, w0] + fw * maps[d, h0, w1]
    bottom = (1 - fw) * maps[d, h1, w0] + fw * maps[d, h1, w1]
    return (1 - fh) * top + fh * bottom
