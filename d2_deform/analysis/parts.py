"""Parameters, FLOPs, activations and forward time of a model, and which part has how much."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.export import TracingAdapter
from detectron2.utils.analysis import FlopCountAnalysis
from fvcore.nn import ActivationCountAnalysis
from fvcore.nn.jit_analysis import JitModelAnalysis
from torch import nn

from d2_deform.layers.zero_init import ZeroConv2d, ZeroLinear

from .operators import ACTIVATION_HANDLES, FLOP_HANDLES

__all__ = [
    "ByPart",
    "activations_by_part",
    "assign_parts",
    "flops_by_part",
    "parameters_by_part",
    "runtime_by_part",
]

logger = logging.getLogger(__name__)

ByPart = dict[str, float]
Inputs = list[dict[str, Any]]

REST = "rest"
# Modules whose children are parts of their own
OPENED = frozenset({"", "backbone", "roi_heads", "sem_seg_head", "head"})
OPENED_WITH_FPN = OPENED - {"backbone"} | {"backbone.bottom_up"}


def assign_parts(model: nn.Module) -> dict[str, str]:
    """To which part of a model each of its modules belongs.

    Parts are the children of the model, but those of ``backbone`` (with FPN: of its ``bottom_up``,
    the pyramid's own layers being part "backbone"), ``roi_heads``, ``sem_seg_head`` and ``head`` in
    their place: "backbone.res5", "proposal_generator", "roi_heads.cls_pool". The layers of a part
    that predict offsets are a part beside it, "backbone.res5.offsets". What such a module does
    itself is called by its name, and what the model does itself "rest".

    Args:
        model: a meta-architecture of Detectron2's or this package's.

    Returns:
        For the name of every module, "" too, its part; parts in the order of the modules.
    """
    with_fpn = hasattr(getattr(model, "backbone", None), "bottom_up")
    opened = OPENED_WITH_FPN if with_fpn else OPENED
    parts = {}
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        if name == "":
            parts[name] = REST
        elif isinstance(module, (ZeroConv2d, ZeroLinear)):  # every layer that predicts offsets
            parts[name] = f"{parts[parent]}.offsets"
        else:
            parts[name] = name if parent in opened else parts[parent]
    return parts


def parameters_by_part(model: nn.Module) -> ByPart:
    """Numbers of parameters, trained or not; FrozenBN has none.

    Returns:
        The number for each part, 0 included.
    """
    parts = assign_parts(model)
    counts: ByPart = dict.fromkeys(parts.values(), 0)
    for name, parameter in model.named_parameters():
        counts[parts[name.rpartition(".")[0]]] += parameter.numel()
    return counts


def flops_by_part(model: nn.Module, inputs: Inputs) -> ByPart:
    """Multiply-adds of one forward pass: Detectron2's count and our operators'.

    Elementwise and reducing operations are not counted, nor is RoI pooling that is not ours.

    Args:
        model: in evaluation mode.
        inputs: for one picture, as the model takes them.

    Returns:
        The number for each part.
    """
    analysis = FlopCountAnalysis(model, inputs).set_op_handle(**FLOP_HANDLES)
    return _count(model, analysis)


def activations_by_part(model: nn.Module, inputs: Inputs) -> ByPart:
    """Elements of the outputs of convolutions, matrix products and our operators.

    Args:
        model, inputs: as :func:`flops_by_part` takes them.

    Returns:
        The number for each part.
    """
    adapter = TracingAdapter(model, inputs, allow_non_tensor=True)
    analysis = ActivationCountAnalysis(adapter, adapter.flattened_inputs)
    return _count(model, analysis.set_op_handle(**ACTIVATION_HANDLES))


def runtime_by_part(model: nn.Module, inputs: Inputs, num_runs: int = 5) -> ByPart:
    """Time of one forward pass with post-processing, after one to warm up.

    Args:
        model: in evaluation mode, on any device.
        inputs: as the model takes them.
        num_runs: > 0.

    Returns:
        Seconds for each part, of the run whose total is the median of all.
    """
    with torch.no_grad():
        model(inputs)
        runs = []
        for _ in range(num_runs):
            with _stopwatch(model) as seconds:
                model(inputs)
            runs.append(seconds)
    return sorted(runs, key=lambda seconds: sum(seconds.values()))[num_runs // 2]


def _count(model: nn.Module, analysis: JitModelAnalysis) -> ByPart:
    """Sums a count by part, each operator in the module that calls it."""
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.tracer_warnings("none")
    within = {  # of a module and all modules in it
        name.removeprefix("model").removeprefix("."): count
        for name, count in analysis.by_module().items()
    }
    own = dict(within)
    for name, count in within.items():
        if name:
            own[name.rpartition(".")[0]] -= count
    parts = assign_parts(model)
    counts: ByPart = dict.fromkeys(parts.values(), 0)
    for name, part in parts.items():
        counts[part] += int(own[name])
    return counts


@contextmanager
def _stopwatch(model: nn.Module) -> Iterator[ByPart]:
    """Measures one call of the model; the seconds of each part are there afterwards."""
    parts = assign_parts(model)
    seconds: ByPart = dict.fromkeys(parts.values(), 0.0)
    running: list[str] = []
    since = 0.0
    synchronize = _synchronization(model)

    def charge() -> None:
        nonlocal since
        synchronize()
        now = time.perf_counter()
        if running:
            seconds[running[-1]] += now - since
        since = now

    def enter(part: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if not running or running[-1] != part:
                charge()
            running.append(part)

        return hook

    def leave(*_: Any) -> None:
        if len(running) < 2 or running[-2] != running[-1]:
            charge()
        running.pop()

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(parts[name])))
        handles.append(module.register_forward_hook(leave))
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


def _synchronization(model: nn.Module) -> Callable[[], None]:
    device = next(model.parameters()).device
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None
