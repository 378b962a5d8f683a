#!/usr/bin/env python
"""Make a split of Deformed Digits of any size, and a contact sheet of its first pictures.

Example:
    python tools/make_deformed_digits.py --split train --num-images 2000 --output digits/train
    python tools/make_deformed_digits.py --split val --num-images 18 --output digits/val \
        --contact-sheet sheet.png
"""

import argparse
import os
import sys

import cv2
import numpy as np
from PIL import Image

from d2_deform.data.deformed_digits import write_deformed_digits
from d2_deform.data.deformed_digits_drawing import CLASS_NAMES, SPLITS, DeformedDigitsSettings
from d2_deform.data.voc_folder import load_voc_folder

BOX_COLOURS = [  # one a class, BGR
    (75, 25, 230),
    (75, 180, 60),
    (25, 225, 255),
    (200, 130, 0),
    (48, 130, 245),
    (180, 30, 145),
    (240, 240, 70),
    (230, 50, 240),
    (60, 245, 210),
    (190, 190, 250),
]


def parse_arguments() -> argparse.Namespace:
    defaults = DeformedDigitsSettings()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", required=True, help="folder to make, in PASCAL VOC layout")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image-size", type=int, default=defaults.image_size, help="pixels")
    parser.add_argument(
        "--warp",
        type=float,
        default=defaults.warp,
        help="strength of the elastic warp, as a share of a digit's height",
    )
    parser.add_argument("--contact-sheet", metavar="PNG", help="draw the first pictures here")
    parser.add_argument("--columns", type=int, default=6, help="of the contact sheet")
    parser.add_argument("--rows", type=int, default=3, help="of the contact sheet")
    return parser.parse_args()


def draw_contact_sheet(dirname: str, split: str, columns: int, rows: int) -> np.ndarray:
    """The first pictures of a split with their boxes, side by side; uint8 BGR."""
    records = load_voc_folder(dirname, split, CLASS_NAMES)[: columns * rows]
    tiles = [_draw_boxes(record) for record in records]
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    return np.vstack(
        [np.hstack(tiles[start : start + columns]) for start in range(0, len(tiles), columns)]
    )


def _draw_boxes(record: dict) -> np.ndarray:
    picture = cv2.imread(record["file_name"])
    assert picture is not None, record["file_name"]
    for annotation in record["annotations"]:
        x1, y1, x2, y2 = (int(value) for value in annotation["bbox"])
        label = annotation["category_id"]
        colour = BOX_COLOURS[label]
        cv2.rectangle(picture, (x1 - 1, y1 - 1), (x2, y2), colour, 1)
        tag_x, tag_y = max(x1 - 1, 0), max(y1 - 11, 0)
        cv2.rectangle(picture, (tag_x, tag_y), (tag_x + 8, tag_y + 10), colour, -1)
        cv2.putText(
            picture,
            CLASS_NAMES[label],
            (tag_x + 1, tag_y + 9),
            cv2.FONT_HERSHEY_SIMPLEX,
            0.32,
            (0, 0, 0),
            1,
            cv2.LINE_AA,
        )
    return cv2.copyMakeBorder(picture, 2, 2, 2, 2, cv2.BORDER_CONSTANT, value=(255, 255, 255))


def main() -> None:
    arguments = parse_arguments()
    settings = DeformedDigitsSettings(image_size=arguments.image_size, warp=arguments.warp)
    if os.path.exists(arguments.output):
        raise ValueError(f"{arguments.output} exists; name a folder that does not, or remove it.")
    write_deformed_digits(
        arguments.output, arguments.split, arguments.num_images, arguments.seed, settings
    )
    print(f"Made {arguments.num_images} pictures in {arguments.output}")
    if arguments.contact_sheet:
        os.makedirs(os.path.dirname(arguments.contact_sheet) or ".", exist_ok=True)
        sheet = draw_contact_sheet(
            arguments.output, arguments.split, arguments.columns, arguments.rows
        )
        fewer_shades = sheet // 8 * 8 + 4  # halves the PNG; the eye hardly sees it
        Image.fromarray(fewer_shades[..., ::-1]).save(arguments.contact_sheet, optimize=True)
        print(f"Drew {arguments.contact_sheet}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
