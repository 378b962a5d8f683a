"""Names of ResNets as torchvision has them, which timm and MMDetection follow."""

import re

__all__ = ["rename_resnet"]

_NORM = "weight|bias|running_mean|running_var|num_batches_tracked"
_RULES = [
    (re.compile(r"conv1\.weight"), "stem.conv1.weight"),
    (re.compile(rf"bn1\.({_NORM})"), r"stem.conv1.norm.\1"),
    (re.compile(r"layer(\d)\.(\d+)\.conv(\d)\.weight"), r"{stage}.\2.conv\3.weight"),
    (re.compile(rf"layer(\d)\.(\d+)\.bn(\d)\.({_NORM})"), r"{stage}.\2.conv\3.norm.\4"),
    (re.compile(r"layer(\d)\.(\d+)\.downsample\.0\.weight"), r"{stage}.\2.shortcut.weight"),
    (re.compile(rf"layer(\d)\.(\d+)\.downsample\.1\.({_NORM})"), r"{stage}.\2.shortcut.norm.\3"),
    # mmcv's deformable convolution owns its branch; before its version 2 it was a sibling
    (
        re.compile(r"layer(\d)\.(\d+)\.conv(\d)(?:\.conv)?_offset\.(weight|bias)"),
        r"{stage}.\2.conv\3_offset.\4",
    ),
]


def rename_resnet(name: str) -> str | None:
    """A parameter's name in Detectron2's ResNet, or None if it is none of a ResNet's body.

    Args:
        name: such as "layer4.2.conv2.weight", which is "res5.2.conv2.weight".
    """
    for pattern, form in _RULES:
        found = pattern.fullmatch(name)
        if found:
            stage = f"res{int(found[1]) + 1}" if "{stage}" in form else ""
            return found.expand(form.replace("{stage}", stage))
    return None
