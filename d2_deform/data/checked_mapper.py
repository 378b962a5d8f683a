"""Pictures that cannot be read are named."""

from collections.abc import Callable
from typing import Any

from detectron2.data.detection_utils import SizeMismatchError

__all__ = ["CheckedMapper", "UnreadablePicture"]


class UnreadablePicture(ValueError):
    """A file that is no picture, or a damaged one."""


class CheckedMapper:
    """A mapper whose errors name the picture; Detectron2's "image file is truncated" does not."""

    def __init__(self, mapper: Callable[[dict[str, Any]], Any]) -> None:
        """
        Args:
            mapper: takes a record with "file_name" and perhaps "sem_seg_file_name".
        """
        self._mapper = mapper

    def __call__(self, record: dict[str, Any]) -> Any:
        """
        Raises:
            UnreadablePicture: a file of the record is missing, no picture, or damaged, or has
                another size than its annotation says.
        """
        try:
            return self._mapper(record)
        except (OSError, SyntaxError, SizeMismatchError) as error:  # Pillow's, by kind of damage
            files = [record[k] for k in ("file_name", "sem_seg_file_name") if record.get(k)]
            raise UnreadablePicture(
                f"{' or '.join(files)} cannot be read as a picture ({error}); replace or delete it."
            ) from error
