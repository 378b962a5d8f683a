"""Makes the last convolutions of somebody else's network deformable."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .deform_conv import DeformConv2d, ModulatedDeformConv2d
from .offset_conv import OffsetConv2d

__all__ = ["convert_to_deformable"]


def convert_to_deformable(
    model: nn.Module,
    last: int = 3,
    *,
    kernel_size: int = 3,
    modulated: bool = False,
    deform_groups: int = 1,
    example_input: Tensor | None = None,
) -> dict[str, DeformConv2d]:
    """Swaps the last 3x3 convolutions of a network, in place, for deformable ones.

        >>> model = torchvision.models.resnet50(weights="DEFAULT")
        >>> swapped = convert_to_deformable(model, last=3)
        >>> list(swapped)
        ['layer4.0.conv2', 'layer4.1.conv2', 'layer4.2.conv2']

    A new layer holds the very parameters of the old one, ``weight`` and ``bias``, under the same
    names, and beside them its offset branch, ``conv_offset``. As the offsets start at zero, the
    network computes what it did (modulated: each of these layers starts with half its output).

    Any 3x3 ``nn.Conv2d`` counts, whatever its stride, dilation and groups; depthwise ones, too,
    whose offset branch costs more than they do themselves. Some cannot be swapped: subclasses that
    compute something else (padding as TensorFlow's, standardised weights, a norm of their own),
    other padding than a number of zeros, hooks and parametrisations, which would be lost. They are
    passed over, and a warning names those behind the first one that was swapped.

    Args:
        model: changed in place.
        last: how many, counted from the end.
        kernel_size: of the convolutions meant: 7 for ConvNeXt.
        modulated: DCNv2's, with a learnt factor for every tap.
        deform_groups: groups of input channels with offsets of their own.
        example_input: the model is run on it once, in evaluation mode, without gradients; the order
            is then that in which layers run for the last time, and those that do not run do not
            count. None: the order in which the model has registered them, which is the same for
            networks of one path from input to output.

    Returns:
        The new layers by name, in order. Their branches' parameters need an optimizer.

    Raises:
        ValueError: there are fewer such convolutions than ``last``; ``deform_groups`` does not fit.
            The model is then as it was.
    """
    if last < 1:
        raise ValueError(f"last: {last} given, accepted is 1 or more")
    if isinstance(model, nn.Conv2d):
        raise ValueError(
            "model: is a convolution itself, which cannot be swapped in place; use "
            "DeformConv2d.from_conv2d(model)"
        )
    convs = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and not isinstance(module, OffsetConv2d)
    }
    if example_input is not None:
        convs = _sort_by_execution(model, convs, example_input)
    meant = {n: conv for n, conv in convs.items() if conv.kernel_size == (kernel_size,) * 2}
    obstacles = {name: _find_obstacle(conv) for name, conv in meant.items()}
    chosen = [name for name, obstacle in obstacles.items() if obstacle is None][-last:]
    if len(chosen) < last:
        raise ValueError(_describe_lack(last, kernel_size, convs, obstacles))

    layer_class = ModulatedDeformConv2d if modulated else DeformConv2d
    swapped: dict[str, DeformConv2d] = {}
    for name in chosen:
        try:
            swapped[name] = layer_class.from_conv2d(meant[name], deform_groups=deform_groups)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    _warn_of_passed_over(obstacles, chosen)
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            for name, layer in swapped.items():
                if child is meant[name]:
                    setattr(parent, child_name, layer)
    return swapped


def _sort_by_execution(
    model: nn.Module, convs: dict[str, nn.Conv2d], example_input: Tensor
) -> dict[str, nn.Conv2d]:
    """Those that run, by their last run."""
    order: dict[str, nn.Conv2d] = {}

    def note(name: str) -> None:
        order.pop(name, None)
        order[name] = convs[name]

    handles = [
        conv.register_forward_pre_hook(lambda *_, name=name: note(name))
        for name, conv in convs.items()
    ]
    try:
        with torch.no_grad(), _evaluation_mode(model):
            model(example_input)
    finally:
        for handle in handles:
            handle.remove()
    return order


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _find_obstacle(conv: nn.Conv2d) -> str | None:
    """Why a deformable layer cannot stand in for this one; None: it can."""
    if isinstance(conv, DeformConv2d):
        return "is deformable already"
    if (
        type(conv).forward is not nn.Conv2d.forward
        or type(conv)._conv_forward is not nn.Conv2d._conv_forward
    ):
        return f"{type(conv).__name__} computes more than nn.Conv2d"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"pads with {conv.padding_mode} by {conv.padding!r}"
    if is_parametrized(conv):
        return "has a parametrisation"
    if conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks:
        return "has hooks"
    return None


def _describe_lack(
    last: int,
    kernel_size: int,
    convs: dict[str, nn.Conv2d],
    obstacles: dict[str, str | None],
) -> str:
    usable = sum(obstacle is None for obstacle in obstacles.values())
    message = (
        f"last: {last} given, but the model has {usable} {kernel_size}x{kernel_size} "
        "convolution(s) that could be deformable"
    )
    refused = [f"{name} {obstacle}" for name, obstacle in obstacles.items() if obstacle]
    if refused:
        message += f"; passed over: {'; '.join(refused[-3:])}"
    sizes = sorted({"x".join(map(str, conv.kernel_size)) for conv in convs.values()})
    return f"{message}. The kernels of its convolutions: {', '.join(sizes) or 'it has none'}"


def _warn_of_passed_over(obstacles: dict[str, str | None], chosen: list[str]) -> None:
    names = list(obstacles)
    behind = names[names.index(chosen[0]) :]
    refused = [f"{name} {obstacles[name]}" for name in behind if obstacles[name]]
    if refused:
        warnings.warn(
            f"convert_to_deformable passed over: {'; '.join(refused)}; swapped: "
            f"{', '.join(chosen)}",
            stacklevel=3,
        )
