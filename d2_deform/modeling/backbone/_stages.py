"""What the backbones have in common: their four stages, which end is deformable, their checks."""

from collections.abc import Sequence

from detectron2.config import CfgNode

__all__ = [
    "STAGES",
    "check",
    "check_deform_on_per_stage",
    "check_dilations",
    "count_stages",
    "first_stride",
    "spread_from_end",
]

STAGES = ("res2", "res3", "res4", "res5")


def check(name: str, given: object, accepted: bool, what_is_accepted: str) -> None:
    """Raises a ValueError that names an argument, what was given and what is accepted."""
    if not accepted:
        raise ValueError(f"{name}: {given} given, accepted: {what_is_accepted}")


def check_dilations(res4_dilation: int, res5_dilation: int) -> None:
    """Raises a ValueError unless both are 1 or more."""
    for key, dilation in (("RES4_DILATION", res4_dilation), ("RES5_DILATION", res5_dilation)):
        check(f"{key.lower()} (MODEL.RESNETS.{key})", dilation, dilation >= 1, "1 or more")


def check_deform_on_per_stage(cfg: CfgNode) -> None:
    """Raises a ValueError if Detectron2's own key is used, which would do nothing here."""
    given = cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE
    check(
        "MODEL.RESNETS.DEFORM_ON_PER_STAGE",
        given,
        not any(given),
        "False for every stage in this backbone, where MODEL.DEFORM.NUM_LAYERS takes its place",
    )


def count_stages(out_features: Sequence[str]) -> int:
    """How many of the four stages have to be built for these features.

    Raises:
        ValueError: there is none, or one is neither "stem" nor a stage.
    """
    known = ("stem", *STAGES)
    check(
        "out_features (MODEL.RESNETS.OUT_FEATURES)",
        list(out_features),
        len(out_features) > 0 and set(out_features) <= set(known),
        f"one or more of {', '.join(known)}",
    )
    return max(known.index(name) for name in out_features)


def first_stride(stage: str, dilation: int) -> int:
    """Stride of a stage's first block; a dilated stage keeps the resolution it is given."""
    return 1 if stage == "res2" or dilation > 1 else 2


def spread_from_end(count: int, num_blocks: Sequence[int], per_block: int = 1) -> list[list[int]]:
    """How many of the last ``count`` units lie in each block, stage by stage.

    Args:
        count: units, counted from the network's end.
        num_blocks: blocks of each stage.
        per_block: units of each block.
    """
    stages = []
    for blocks in reversed(num_blocks):
        stage = []
        for _ in range(blocks):
            stage.append(min(count, per_block))
            count -= stage[-1]
        stages.append(stage[::-1])
    return stages[::-1]
