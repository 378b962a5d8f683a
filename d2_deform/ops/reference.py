"""The operators' executable specification: slow, readable, differentiable twins in plain PyTorch.

Each function has the name and the arguments of its compiled counterpart in `d2_deform.ops` and
defines what that one must return, values and gradients. Arguments are taken to be valid; the
compiled operators check them.

Source: Dai et al., "Deformable Convolutional Networks", ICCV 2017, and its official release.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["deform_conv2d", "deform_ps_roi_pool", "deform_roi_pool"]

MIN_ROI_SIZE = 0.1


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = (1, 1),
    padding: int | tuple[int, int] = (0, 0),
    dilation: int | tuple[int, int] = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """Deformable convolution (paper section 2.1); with `mask`, the modulated one (v2).

    Tap (i, j) of output cell (ho, wo) reads the input, bilinearly, at

        y = ho * stride_y - padding_y + i * dilation_y + offset_y
        x = wo * stride_x - padding_x + j * dilation_x + offset_x

    A tap counts where -1 < y < H and -1 < x < W; neighbours outside the map are 0 (the rule of
    torchvision, Detectron2 and the release's updated operator). A tap that does not count, NaN and
    infinite offsets included, contributes 0 and receives gradient 0. The derivative with respect to
    y and x at integer positions is the right-hand one.

    Args:
        input (Tensor[N, C, H, W]): features; float64, float32, float16 or bfloat16.
        offset (Tensor[N, 2 * G * kh * kw, Ho, Wo]): displacement in input cells; for each of the G
            deformable groups of C / G consecutive channels and each tap (row by row): y, then x.
            float32 or `input`'s dtype.
        weight (Tensor[Cout, C / groups, kh, kw]): `input`'s dtype; groups follows from its shape.
        bias (Tensor[Cout], optional): `input`'s dtype.
        stride (int or (int, int)): (y, x).
        padding (int or (int, int)): (y, x).
        dilation (int or (int, int)): (y, x).
        mask (Tensor[N, G * kh * kw, Ho, Wo], optional): factor of each tap. float32 or `input`'s
            dtype.

    Returns:
        Tensor[N, Cout, Ho, Wo] of `input`'s dtype. Coordinates, interpolation and sums are in
        float32 at least.
    """
    stride_y, stride_x = _pair(stride)
    padding_y, padding_x = _pair(padding)
    dilation_y, dilation_x = _pair(dilation)
    batch, channels, height, width = input.shape
    out_channels, group_channels, kernel_y, kernel_x = weight.shape
    out_height, out_width = offset.shape[2:]
    taps = kernel_y * kernel_x
    weight_groups = channels // group_channels
    offset_groups = offset.size(1) // (2 * taps)
    dtype = _compute_dtype(input)

    def steps(count: int, step: int) -> Tensor:
        return torch.arange(count, device=input.device) * step

    rows = steps(out_height, stride_y)[:, None] - padding_y
    columns = steps(out_width, stride_x)[None, :] - padding_x
    tap_y = steps(kernel_y, dilation_y).repeat_interleave(kernel_x)[:, None, None]
    tap_x = steps(kernel_x, dilation_x).repeat(kernel_y)[:, None, None]
    moves = offset.to(dtype).reshape(batch, offset_groups, taps, 2, out_height, out_width)
    y = (rows + tap_y) + moves[:, :, :, 0]
    x = (columns + tap_x) + moves[:, :, :, 1]

    maps = input.to(dtype).reshape(
        batch, offset_groups, channels // offset_groups, 1, 1, 1, height, width
    )
    sampled = _sample_zero_padded(maps, y.unsqueeze(2), x.unsqueeze(2))
    if mask is not None:
        factors = mask.to(dtype).reshape(batch, offset_groups, taps, out_height, out_width)
        # A NaN in the mask of a tap that does not count is nobody's.
        factors = torch.where(_counts(y, x, height, width), factors, 0.0)
        sampled = sampled * factors.unsqueeze(2)

    sampled = sampled.reshape(batch, weight_groups, group_channels, taps, out_height, out_width)
    kernels = weight.to(dtype).reshape(
        weight_groups, out_channels // weight_groups, group_channels, taps
    )
    output = torch.einsum("ngctyx,goct->ngoyx", sampled, kernels)
    output = output.reshape(batch, out_channels, out_height, out_width)
    if bias is not None:
        output = output + bias.to(dtype)[:, None, None]
    return output.to(input.dtype)


def deform_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None = None,
    output_size: int | tuple[int, int] = 7,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 4,
    gamma: float = 0.1,
    aligned: bool = True,
) -> Tensor:
    """Deformable RoI pooling (paper section 2.2, equation 5): every bin reads every channel.

    It is `deform_ps_roi_pool` with one group: see there for the arguments and for where a bin's
    samples lie. Output channels are the input's.

    Returns:
        Tensor[R, C, Ph, Pw] of `input`'s dtype.
    """
    return deform_ps_roi_pool(
        input, rois, offset, output_size, 1, spatial_scale, sampling_ratio, gamma, aligned
    )


def deform_ps_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None = None,
    output_size: int | tuple[int, int] = 7,
    group_size: int = 7,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 4,
    gamma: float = 0.1,
    aligned: bool = True,
) -> Tensor:
    """Deformable position-sensitive RoI pooling (paper section 2.2).

    A bin is the mean of sampling_ratio x sampling_ratio bilinear samples. Samples outside
    [-0.5, W - 0.5] x [-0.5, H - 0.5], NaN included, are left out of sum and count; a bin without
    samples is 0. The others are clamped to [0, W - 1] x [0, H - 1], with derivative 0 where that
    moves them. Along x, in cells (y alike):

    aligned=True, Detectron2's continuous coordinates:
        start = x1 * scale - 0.5, end = x2 * scale - 0.5;
        sample i = start + pw * bin + shift + (i + 0.5) * bin / S;
        the derivative with respect to x at integers is the right-hand one.
    aligned=False, the release's rule:
        start = round(x1) * scale - 0.5, end = (round(x2) + 1) * scale - 0.5;
        sample i = start + pw * bin + shift + i * bin / S;
        the derivative with respect to x at integers is 0.

    width = max(end - start, 0.1), and 0.1 where that is NaN; bin = width / Pw; shift = offset *
    gamma * width; round() takes halves away from zero.

    Args:
        input (Tensor[N, C, H, W]): features, C = Cout * group_size**2; bin (ph, pw) of output
            channel c reads channel (c * group_size + gh) * group_size + gw with gh = floor(ph *
            group_size / Ph), gw alike. float64, float32, float16 or bfloat16.
        rois (Tensor[R, 5]): batch index, x1, y1, x2, y2 in pixels of the input image. A RoI whose
            batch index is no image's, NaN included, gives zeros and no gradient. float32 or
            `input`'s dtype. Receives no gradient.
        offset (Tensor[R, 2 * K, Ph, Pw], optional): channel 2k = x, 2k + 1 = y of class group k, in
            RoI widths / heights before `gamma`. K divides Cout; output channel c uses group
            c // (Cout / K). float32 or `input`'s dtype. None: the rigid operator.
        output_size (int or (int, int)): bins, (Ph, Pw).
        group_size (int): parts of the score map along each axis.
        spatial_scale (float): cells per image pixel.
        sampling_ratio (int): samples of a bin along each axis, S.
        gamma (float): factor of `offset`.
        aligned (bool): see above.

    Returns:
        Tensor[R, Cout, Ph, Pw] of `input`'s dtype. Coordinates, interpolation and sums are in
        float32 at least.
    """
    bins_y, bins_x = _pair(output_size)
    batch, channels, height, width = input.shape
    count = rois.size(0)
    out_channels = channels // group_size**2
    groups = 1 if offset is None else offset.size(1) // 2
    dtype = _compute_dtype(input)
    boxes = rois.detach().to(dtype)

    def sample_positions(low: int, high: int, bins: int, bin_index: Tensor, axis: int) -> Tensor:
        """Positions (R, K, Ph, Pw, S) along one axis from the RoIs' columns `low` and `high`."""
        first, last = boxes[:, low], boxes[:, high]
        if aligned:
            start, end = first * spatial_scale - 0.5, last * spatial_scale - 0.5
        else:
            start = _round_half_away(first) * spatial_scale - 0.5
            end = (_round_half_away(last) + 1) * spatial_scale - 0.5
        size = torch.where(end - start >= MIN_ROI_SIZE, end - start, MIN_ROI_SIZE)
        bin_size = size / bins
        within = torch.arange(sampling_ratio, device=input.device) + (0.5 if aligned else 0.0)

        def per_roi(values: Tensor) -> Tensor:
            return values[:, None, None, None]

        corner = per_roi(start) + bin_index * per_roi(bin_size)
        if offset is not None:
            shifts = offset.to(dtype).reshape(count, groups, 2, bins_y, bins_x)[:, :, axis]
            reach = per_roi(size * gamma)
            # An infinite box would turn the skipped samples' gradient into 0 * inf.
            reach = torch.where(reach.isfinite(), reach, 0.0)
            corner = corner + shifts * reach
        return corner[..., None] + within * per_roi(bin_size / sampling_ratio)[..., None]

    bin_y = torch.arange(bins_y, device=input.device)[:, None].expand(bins_y, bins_x)
    bin_x = torch.arange(bins_x, device=input.device)[None, :].expand(bins_y, bins_x)
    y = sample_positions(2, 4, bins_y, bin_y, axis=1)[..., :, None]
    x = sample_positions(1, 3, bins_x, bin_x, axis=0)[..., None, :]

    image = boxes[:, 0]
    image_exists = (image >= 0) & (image < batch)
    image = torch.where(image_exists, image, 0.0).long()
    channel = torch.arange(out_channels, device=input.device)[:, None, None] * group_size
    channel = (channel + bin_y * group_size // bins_y) * group_size
    channel = channel + bin_x * group_size // bins_x
    plane = image[:, None, None, None] * channels + channel
    plane = plane.reshape(count, groups, out_channels // groups, bins_y, bins_x, 1, 1)

    kept = (y >= -0.5) & (y <= height - 0.5) & (x >= -0.5) & (x <= width - 0.5)
    kept = kept & image_exists.reshape(count, 1, 1, 1, 1, 1)
    sampled = _sample_clamped(
        input.to(dtype), plane, y.unsqueeze(2), x.unsqueeze(2), kept.unsqueeze(2), aligned
    )
    number = kept.sum(dim=(-2, -1)).clamp(min=1).unsqueeze(2)
    output = sampled.sum(dim=(-2, -1)) / number
    return output.reshape(count, out_channels, bins_y, bins_x).to(input.dtype)


def _counts(y: Tensor, x: Tensor, height: int, width: int) -> Tensor:
    """Whether a tap at y, x is one of those that count; NaN is not."""
    return (y > -1) & (y < height) & (x > -1) & (x < width)


def _sample_zero_padded(maps: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Reads maps (*B, H, W) bilinearly at y, x, broadcastable with B, as if zeros lay around."""
    height, width = maps.shape[-2:]
    counts = _counts(y, x, height, width)
    # Before any arithmetic: a NaN that autograd multiplies by 0 stays NaN.
    y, x = torch.where(counts, y, 0.0), torch.where(counts, x, 0.0)
    y0, x0 = y.floor(), x.floor()
    plane_shape = maps.shape[:-2]
    plane = torch.arange(plane_shape.numel(), device=maps.device).reshape(plane_shape)
    cells = _with_zero_cell(maps)
    terms = [
        _cells_at(
            cells,
            plane,
            row,
            column,
            (height, width),
            counts & (row >= 0) & (row < height) & (column >= 0) & (column < width),
        )
        * (weight_y * weight_x)
        for row, weight_y in ((y0, y0 + 1 - y), (y0 + 1, y - y0))
        for column, weight_x in ((x0, x0 + 1 - x), (x0 + 1, x - x0))
    ]
    return torch.stack(terms).sum(0)


def _sample_clamped(
    maps: Tensor, plane: Tensor, y: Tensor, x: Tensor, kept: Tensor, right_hand: bool
) -> Tensor:
    """Reads plane `plane` of maps (N, C, H, W) bilinearly at y, x clamped to it; 0 unless `kept`.

    `right_hand` chooses the derivative at integers: the right-hand one, else 0.
    """
    height, width = maps.shape[-2:]
    y = _clamped(torch.where(kept, y, 0.0), height - 1)
    x = _clamped(torch.where(kept, x, 0.0), width - 1)
    y0, x0 = y.floor(), x.floor()
    # Two equal neighbours have no difference, hence no derivative.
    y1 = (y0 + 1).clamp(max=height - 1) if right_hand else y.ceil()
    x1 = (x0 + 1).clamp(max=width - 1) if right_hand else x.ceil()
    cells = _with_zero_cell(maps)
    terms = [
        _cells_at(cells, plane, row, column, (height, width), kept) * (weight_y * weight_x)
        for row, weight_y in ((y0, y0 + 1 - y), (y1, y - y0))
        for column, weight_x in ((x0, x0 + 1 - x), (x1, x - x0))
    ]
    return torch.stack(terms).sum(0)


def _clamped(values: Tensor, last: int) -> Tensor:
    """clamp(0, last), but values on a limit, which it does not move, keep their derivative."""
    values = torch.where(values < 0, 0.0, values)
    return torch.where(values > last, float(last), values)


def _with_zero_cell(maps: Tensor) -> Tensor:
    """All cells in one row, and after the last a 0 for what is not to be read."""
    return torch.cat([maps.reshape(-1), maps.new_zeros(1)])


def _cells_at(
    cells: Tensor, plane: Tensor, row: Tensor, column: Tensor, size: tuple[int, int], exists: Tensor
) -> Tensor:
    height, width = size
    index = (plane * height + row.long()) * width + column.long()
    return cells[torch.where(exists, index, cells.numel() - 1)]


def _round_half_away(values: Tensor) -> Tensor:
    """C's round(): halves go away from zero, where torch.round takes them to the even number."""
    whole = values.trunc()
    return whole + ((values - whole).abs() >= 0.5) * values.sign()


def _compute_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
