"""What the tests of RoI heads feed them: two pictures' boxes and proposals, the same every time."""

import torch
from detectron2.structures import Boxes, ImageList, Instances

PICTURE_SIZE = (128, 160)


def make_boxes(count: int, seed: int) -> Boxes:
    """Boxes inside the picture, at least 20 pixels wide and high."""
    generator = torch.Generator().manual_seed(seed)
    height, width = PICTURE_SIZE
    corners = torch.rand(count, 2, generator=generator) * torch.tensor([width / 2, height / 2])
    sizes = 20 + torch.rand(count, 2, generator=generator) * torch.tensor([width / 3, height / 3])
    return Boxes(torch.cat([corners, corners + sizes], dim=1))


def make_proposals(*counts: int) -> list[Instances]:
    return [
        Instances(
            PICTURE_SIZE,
            proposal_boxes=make_boxes(count, seed),
            objectness_logits=torch.ones(count),
        )
        for seed, count in enumerate(counts)
    ]


def make_images(pictures: int = 2) -> ImageList:
    return ImageList(torch.zeros(pictures, 3, *PICTURE_SIZE), [PICTURE_SIZE] * pictures)
