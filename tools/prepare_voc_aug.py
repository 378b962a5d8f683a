#!/usr/bin/env python
"""Make PASCAL VOC 2012's label maps for semantic segmentation readable, and add SBD's.

Writes VOC2012/SegmentationClassAug (8-bit class indices) and ImageSets/Segmentation/trainaug.txt,
which the data sets voc_2012_sem_seg_{train,val,train_aug} read. Overwrites nothing.

Example:
    python tools/prepare_voc_aug.py --voc datasets/VOC2012 --sbd benchmark_RELEASE/dataset
"""

import argparse
import os
import sys

from d2_deform.data.voc_sem_seg import write_class_indices

COMPLETE = {"train": 1464, "val": 1449, "trainaug": 10582}  # of the published data sets


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--voc",
        default=os.path.join(os.environ.get("DETECTRON2_DATASETS", "datasets"), "VOC2012"),
        help="VOC2012's folder, with JPEGImages and SegmentationClass; default %(default)s",
    )
    parser.add_argument(
        "--sbd",
        help="SBD's folder benchmark_RELEASE/dataset, with cls, train.txt and val.txt; "
        "without it only VOC's own 2,913 label maps are made",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    numbers = write_class_indices(arguments.voc, arguments.sbd)
    print(f"Made {numbers['label maps']} label maps in {arguments.voc}/SegmentationClassAug")
    for split, complete in COMPLETE.items():
        if split in numbers:
            note = "" if numbers[split] == complete else f" (the complete data set: {complete})"
            print(f"{split}: {numbers[split]} pictures{note}")


if __name__ == "__main__":
    try:
        main()
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
