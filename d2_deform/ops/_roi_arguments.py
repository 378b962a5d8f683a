"""Checks that deformable RoI pooling and its position-sensitive kind share."""

from torch import Tensor

from ._arguments import check_beside, check_features, check_shape, check_tensor


def check_pooling(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: tuple[int, int],
    out_channels: int,
    sampling_ratio: int,
) -> None:
    """Raises TypeError or ValueError, naming the argument, unless the kernels can run."""
    check_features("input", input)
    if input.shape[2] == 0 or input.shape[3] == 0:
        raise ValueError(f"input: the feature map is empty, got {tuple(input.shape)}")
    check_beside("rois", rois, input, float32_too=True)
    if rois.dim() != 2 or rois.shape[1] != 5:
        raise ValueError(
            f"rois: expected shape (R, 5) = (batch index, x1, y1, x2, y2), got {tuple(rois.shape)}"
        )
    if not isinstance(sampling_ratio, int) or sampling_ratio < 1:
        raise ValueError(f"sampling_ratio: expected an int of at least 1, got {sampling_ratio!r}")
    if offset is None:
        return
    check_tensor("offset", offset)
    check_beside("offset", offset, input, float32_too=True)
    if offset.dim() != 4 or offset.shape[1] == 0 or offset.shape[1] % 2:
        raise ValueError(f"offset: expected shape (R, 2*K, Ph, Pw), got {tuple(offset.shape)}")
    if out_channels % (offset.shape[1] // 2):
        raise ValueError(
            f"offset: its K = {offset.shape[1] // 2} groups must divide the {out_channels} output "
            f"channels, got {tuple(offset.shape)}"
        )
    check_shape(
        "offset", offset, (rois.shape[0], offset.shape[1], *output_size), "(R, 2*K, Ph, Pw)"
    )
