"""From a picture's file to what a classifier learns from."""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data.detection_utils import read_image
from torch import Tensor
from torchvision.transforms import v2 as T

from d2_deform.data.checked_mapper import UnreadablePicture

__all__ = ["ClassificationMapper"]


class ClassificationMapper:
    """Reads a picture and cuts out the square that a classifier sees, as is usual on ImageNet.

    In training a random part of the picture, of any share of its area above a least one and of an
    aspect between 3/4 and 4/3, is brought to the square, and mirrored at random. At test the
    picture's shorter side is brought to a size, and the square is its middle. The parts are
    torchvision's.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        crop_size: int = 224,
        min_crop_area: float = 0.08,
        random_flip: str = "horizontal",
        min_size_test: int = 256,
        image_format: str = "BGR",
    ) -> None:
        """
        Args:
            is_train: random parts, or the middle.
            crop_size: side of the square, in pixels.
            min_crop_area: least share of the picture's area, above 0, at most 1.
            random_flip: "horizontal", "vertical" or "none".
            min_size_test: the picture's shorter side at test, in pixels; at least ``crop_size``.
            image_format: order of the channels, as Detectron2's ``read_image`` takes it.

        Raises:
            ValueError: an argument is out of its range; the line names it and its config key.
        """
        flips = {
            "horizontal": [T.RandomHorizontalFlip()],
            "vertical": [T.RandomVerticalFlip()],
            "none": [],
        }
        for name, given, accepted, what_is_accepted in (
            ("CLASSIFICATION.CROP_SIZE", crop_size, crop_size >= 1, "1 or more"),
            (
                "CLASSIFICATION.MIN_CROP_AREA",
                min_crop_area,
                0 < min_crop_area <= 1,
                "above 0, at most 1",
            ),
            ("RANDOM_FLIP", random_flip, random_flip in flips, f"one of {', '.join(flips)}"),
            (
                "MIN_SIZE_TEST",
                min_size_test,
                min_size_test >= crop_size,
                f"INPUT.CLASSIFICATION.CROP_SIZE ({crop_size}) or more",
            ),
        ):
            if not accepted:
                raise ValueError(f"INPUT.{name}: {given} given, accepted: {what_is_accepted}")
        self.image_format = image_format
        if is_train:
            crop = T.RandomResizedCrop(crop_size, scale=(min_crop_area, 1.0), antialias=True)
            self.augmentation = T.Compose([crop, *flips[random_flip]])
        else:
            resize = T.Resize(min_size_test, antialias=True)
            self.augmentation = T.Compose([resize, T.CenterCrop(crop_size)])

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool) -> dict[str, Any]:
        return {
            "is_train": is_train,
            "crop_size": cfg.INPUT.CLASSIFICATION.CROP_SIZE,
            "min_crop_area": cfg.INPUT.CLASSIFICATION.MIN_CROP_AREA,
            "random_flip": cfg.INPUT.RANDOM_FLIP,
            "min_size_test": cfg.INPUT.MIN_SIZE_TEST,
            "image_format": cfg.INPUT.FORMAT,
        }

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            record: "file_name" and "label".

        Returns:
            The same with "image", a uint8 Tensor[3, crop_size, crop_size].

        Raises:
            UnreadablePicture: the file is missing, no picture, or damaged.
        """
        return {**record, "image": self.augmentation(self._read(record["file_name"]))}

    def _read(self, path: str) -> Tensor:
        """The whole picture, uint8 Tensor[3, H, W]."""
        try:
            picture = read_image(path, format=self.image_format)
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's, by kind of damage
            raise UnreadablePicture(
                f"{path} cannot be read as a picture ({error}); replace or delete it."
            ) from error
        return torch.as_tensor(picture.copy()).permute(2, 0, 1)
