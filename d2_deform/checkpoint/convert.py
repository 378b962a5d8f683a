"""From a checkpoint of another code base to one that a config's network loads."""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor

import d2_deform.modeling  # noqa: F401  registers the parts
from d2_deform.engine.defaults import ConfigError

from .conversion import Conversion
from .from_classifier import convert_classifier
from .from_detectron2 import convert_detectron2
from .from_mmdet import convert_mmdet
from .from_release import convert_release

__all__ = ["SOURCES", "Account", "convert", "pack"]

SOURCES: dict[str, Callable[[Mapping[str, Tensor], CfgNode], Conversion]] = {
    "detectron2": convert_detectron2,
    "mmdet": convert_mmdet,
    "release": convert_release,
    "timm": convert_classifier,
    "torchvision": convert_classifier,
}
_COUNTER = ".num_batches_tracked"


@dataclass
class Account:
    """Where every weight of a conversion comes from or goes.

    Attributes:
        weights: what the network loads, float32, by its names.
        new: names in the network outside of what the source is for (a classifier has no RPN), and
            offset layers above a plain backbone; they start as in a new network.
        left_out: reason by name in the source.
        missing: names in the network that the source should have and has not.
        misshapen: (name in the network, its shape there, shape from the source).
        unexpected: names, as the network would have them, that this config's network has not.
        unknown: names in the source that no rule is about, or that would take another name's place.
        counters: how many counters of batch norms are left out.
    """

    weights: dict[str, Tensor]
    new: list[str]
    left_out: dict[str, str]
    missing: list[str]
    misshapen: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    unexpected: list[str]
    unknown: list[str]
    counters: int = 0

    @property
    def complete(self) -> bool:
        """Nothing is amiss."""
        return not (self.missing or self.misshapen or self.unexpected or self.unknown)

    def lines(self) -> list[str]:
        """The account in words, a line for each name that needs one."""
        lines = [f"{len(self.weights)} weights of the network come from the file."]
        lines += [f"new, as in an untrained network: {name}" for name in self.new]
        lines += [f"left out: {name}: {why}" for name, why in self.left_out.items()]
        if self.counters:
            lines.append(
                f"left out: {self.counters} names that end in {_COUNTER}: frozen batch norms do "
                "not count"
            )
        lines += [f"MISSING in the file: {name}" for name in self.missing]
        lines += [
            f"WRONG SHAPE: {name} is {there} in the network, {given} from the file"
            for name, there, given in self.misshapen
        ]
        lines += [f"NOT IN THE NETWORK of the config: {name}" for name in self.unexpected]
        lines += [f"UNKNOWN name in the file: {name}" for name in self.unknown]
        return lines


def convert(
    source: Mapping[str, Tensor],
    source_name: str,
    cfg: CfgNode,
    box_layer: str | None = None,
) -> Account:
    """Converts weights for the network of a config.

    Args:
        source: weights by their names in the source.
        source_name: one of ``SOURCES``.
        cfg: of the network; MODEL.WEIGHTS and MODEL.DEVICE are not read.
        box_layer: see :func:`~d2_deform.checkpoint.from_release.convert_release`.

    Raises:
        ConfigError: the weights fit the config's network by name, but it would compute something
            else; or the source is of a kind that cannot be converted.
    """
    if source_name == "release":
        done = convert_release(source, cfg, box_layer)
    else:
        done = SOURCES[source_name](source, cfg)
    with torch.device("meta"):
        network = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    there = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    account = Account({}, [], dict(done.left_out), [], [], [], list(done.unknown))
    for name, value in done.weights.items():
        if name not in there:
            if name.endswith(_COUNTER):
                account.counters += 1
            else:
                account.unexpected.append(name)
        elif there[name] != tuple(value.shape):
            account.misshapen.append((name, there[name], tuple(value.shape)))
        else:
            account.weights[name] = value.float() if value.is_floating_point() else value
    for name in there:
        if name in done.weights or name.endswith(_COUNTER):
            continue
        starts_new = not name.startswith(done.part) or (done.part and "_offset." in name)
        (account.new if starts_new else account.missing).append(name)
    return account


def pack(weights: Mapping[str, Tensor]) -> bytes:
    """The content of a file for MODEL.WEIGHTS; every name is the network's own."""
    if not weights:
        raise ConfigError("not one weight of the file belongs to the network of the config.")
    buffer = io.BytesIO()
    torch.save(
        {
            "model": {name: value.contiguous() for name, value in weights.items()},
            "__author__": "d2_deform",
        },
        buffer,
    )
    return buffer.getvalue()
