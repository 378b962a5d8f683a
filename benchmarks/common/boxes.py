"""Boxes for pooling."""

import torch
from torch import Tensor

__all__ = ["random_boxes"]


def random_boxes(count: int, batch: int, height: float, width: float) -> Tensor:
    """Boxes that lie inside the picture: samples outside are skipped, which would flatter us.

    The upper left corner is uniform in the upper left quarter; sides are uniform from 20 pixels (in
    pictures below 40, from half a side) to half the picture's.

    Args:
        count: of each picture.
        batch: number of pictures.
        height, width: of the picture, in pixels.

    Returns:
        Tensor[batch * count, 5]: batch index, x1, y1, x2, y2 in pixels.
    """
    half = torch.tensor([width, height]) / 2
    least = torch.minimum(torch.tensor(20.0), half / 2)
    corners = torch.rand(batch * count, 2) * half
    sides = least + torch.rand(batch * count, 2) * (half - least)
    index = torch.arange(batch).repeat_interleave(count)[:, None]
    return torch.cat([index, corners, corners + sides], dim=1)
