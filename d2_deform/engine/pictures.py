"""Pictures that a person names on a command line."""

import glob
import os
from collections.abc import Sequence

import cv2
import numpy as np

from d2_deform.engine.defaults import ConfigError
from d2_deform.engine.whole_file import write_whole

__all__ = ["PICTURE_SUFFIXES", "find_pictures", "read_picture", "write_new_file"]

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def find_pictures(inputs: Sequence[str]) -> list[str]:
    """Expands folders and patterns, in order, each picture once.

    Raises:
        ConfigError: nothing is found for one of the inputs.
    """
    paths: dict[str, None] = {}
    for given in inputs:
        given = os.path.expanduser(given)
        if os.path.isdir(given):
            found = [
                os.path.join(given, name)
                for name in sorted(os.listdir(given))
                if name.lower().endswith(PICTURE_SUFFIXES)
            ]
        else:
            found = [given] if os.path.isfile(given) else sorted(glob.glob(given))
        if not found:
            raise ConfigError(f"--input {given}: no picture is found there.")
        paths.update(dict.fromkeys(found))
    return list(paths)


def read_picture(path: str) -> np.ndarray:
    """
    Returns:
        uint8 (H, W, 3), BGR.

    Raises:
        ConfigError: the file is missing or no picture.
    """
    image = cv2.imread(path, cv2.IMREAD_COLOR)
    if image is None:
        raise ConfigError(f"--input {path}: it cannot be read as a picture.")
    return image


def write_new_file(path: str, content: bytes) -> None:
    """Writes a file, with its folder, where there is none or the same; whole or not at all.

    Raises:
        ConfigError: a file with other contents is there, and stays; or it cannot be written.
    """
    try:
        if os.path.exists(path):
            with open(path, "rb") as file:
                if file.read() == content:
                    return
            raise ConfigError(
                f"{path} exists with other contents and stays; choose another place, or delete it."
            )
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from error
