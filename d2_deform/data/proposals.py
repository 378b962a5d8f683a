"""Files of proposals made beforehand, for Detectron2's "PrecomputedProposals".

The format is what Detectron2's ``load_proposals_into_dataset`` reads and its ``COCOEvaluator``
writes: a pickled dictionary with ``ids`` (as the data set's image ids), ``boxes`` (float32
array[N, 4] for every image, in pixels of the original image), ``objectness_logits`` (float32
array[N]) and ``bbox_mode``. Ours have one more key, ``settings``: what they were made with.
"""

import os
import pickle
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode, Instances
from detectron2.utils.file_io import PathManager

_KEYS_OF_DETECTRON1 = {"indexes": "ids", "scores": "objectness_logits"}  # Detectron2 takes both
# All that a pickle of numpy arrays calls, in numpy 1 and 2 and in Python 2.
_CALLED_BY_ARRAYS = {
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *((f"numpy.{core}.multiarray", "scalar") for core in ("core", "_core")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    *(("numpy", name) for name in ("dtype", "ndarray")),
    ("_codecs", "encode"),
}
_HOW_TO_MAKE_IT = "tools/dump_proposals.py makes it"

__all__ = ["check_proposal_files", "read_settings", "write_proposals"]


def write_proposals(
    path: str, proposals: Mapping[int | str, Instances], settings: dict[str, Any]
) -> None:
    """Writes a file of proposals, whole or not at all.

    Args:
        path: the file; its folder is made. An older file is replaced once the new one is complete;
            until then the new one is ``path`` + ".tmp".
        proposals: by image id, with ``proposal_boxes`` in pixels of the original image and
            ``objectness_logits``, on CPU.
        settings: what they were made with, for :func:`read_settings`.
    """
    found = proposals.values()
    content = {
        "ids": list(proposals),
        "boxes": [p.proposal_boxes.tensor.float().numpy() for p in found],
        "objectness_logits": [p.objectness_logits.float().numpy() for p in found],
        "bbox_mode": BoxMode.XYXY_ABS.value,
        "settings": settings,
    }
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    unfinished = path + ".tmp"
    with open(unfinished, "wb") as file:
        pickle.dump(content, file, protocol=pickle.HIGHEST_PROTOCOL)
    os.replace(unfinished, path)


def read_settings(path: str) -> dict[str, Any] | None:
    """What a file of proposals was made with; None where it does not tell.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file of proposals.
    """
    return _read(path).get("settings")


def check_proposal_files(cfg: CfgNode, train: bool = True) -> None:
    """Finds, before a training, what Detectron2 would stumble over in it or after it.

    Reads every data set and file of proposals that the config names, if MODEL.LOAD_PROPOSALS.

    Args:
        cfg: its data sets are registered.
        train: False looks at the data sets of DATASETS.TEST alone.

    Raises:
        ValueError: proposals are loaded and not used, or used and not loaded; there is not one file
            for every data set; a file is missing or flawed, or has no proposals for some image.
            The line names the config key.
    """
    generator = cfg.MODEL.PROPOSAL_GENERATOR.NAME
    if generator == "PrecomputedProposals" and not cfg.MODEL.LOAD_PROPOSALS:
        raise ValueError(
            'MODEL.PROPOSAL_GENERATOR.NAME is "PrecomputedProposals", but MODEL.LOAD_PROPOSALS is '
            "False; set it to True, and name the files in DATASETS.PROPOSAL_FILES_TRAIN and _TEST."
        )
    if not cfg.MODEL.LOAD_PROPOSALS:
        return
    if generator == "RPN":
        raise ValueError(
            'MODEL.LOAD_PROPOSALS is True, but MODEL.PROPOSAL_GENERATOR.NAME is "RPN", which makes '
            'its own; set it to "PrecomputedProposals", or LOAD_PROPOSALS to False.'
        )
    if cfg.TEST.AUG.ENABLED:
        raise ValueError(
            "TEST.AUG.ENABLED is True, but Detectron2's test-time augmentation does not take "
            "precomputed proposals (MODEL.LOAD_PROPOSALS); set it to False."
        )
    for part in ("TRAIN", "TEST") if train else ("TEST",):
        names, files = cfg.DATASETS[part], cfg.DATASETS[f"PROPOSAL_FILES_{part}"]
        if len(names) != len(files):
            raise ValueError(
                f"DATASETS.PROPOSAL_FILES_{part} has {len(files)} file(s) for {len(names)} data "
                f"set(s) {', '.join(names)}; name one for each ({_HOW_TO_MAKE_IT})."
            )
        for name, path in zip(names, files, strict=True):
            try:
                _check_covers(name, path)
            except (OSError, ValueError) as error:
                raise ValueError(f"DATASETS.PROPOSAL_FILES_{part}: {error}") from error


def _check_covers(dataset_name: str, path: str) -> None:
    ids = {str(image_id) for image_id in _read(path)["ids"]}
    records = DatasetCatalog.get(dataset_name)
    missing = [record["image_id"] for record in records if str(record["image_id"]) not in ids]
    if missing:
        raise ValueError(
            f"{path} has no proposals for {len(missing)} of the {len(records)} images of "
            f"{dataset_name}, the first '{missing[0]}'; it is another data set's, or older than "
            f"this one ({_HOW_TO_MAKE_IT})."
        )


class _ArrayUnpickler(pickle.Unpickler):
    """Refuses what could run code: a file of proposals may come from anywhere."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _CALLED_BY_ARRAYS:
            raise pickle.UnpicklingError(f"it calls {module}.{name}, which no array needs")
        return super().find_class(module, name)


def _read(path: str) -> dict[str, Any]:
    if not PathManager.isfile(path):
        raise FileNotFoundError(f"there is no file {path} ({_HOW_TO_MAKE_IT}).")
    try:
        with PathManager.open(path, "rb") as file:
            content = _ArrayUnpickler(file, encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError) as error:
        raise ValueError(f"{path} is no pickle, or a damaged one ({error}).") from error
    if isinstance(content, dict):
        content = {_KEYS_OF_DETECTRON1.get(key, key): value for key, value in content.items()}
    wanted = ("ids", "boxes", "objectness_logits")
    if not isinstance(content, dict) or not set(wanted) <= set(content):
        raise ValueError(f"{path} is no file of proposals; it lacks one of {', '.join(wanted)}.")
    if len({len(content[key]) for key in wanted}) != 1:
        raise ValueError(f"{path} is flawed: {', '.join(wanted)} are of different lengths.")
    return content
