"""Checks and conversions of arguments that all operators share. Messages name the argument."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._library import built_devices

FEATURE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_count(name: str, value: object, least: int) -> None:
    """A whole number (an int, or a symbolic one under torch.compile) of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value!r}")


def pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    """(height, width) from a number or two of them, each at least ``least``."""
    numbers = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(numbers) != 2:
        raise ValueError(f"{name}: expected an int or two ints, got {value!r}")
    for number in numbers:
        check_count(name, number, least)
    return numbers


def check_features(name: str, tensor: Tensor) -> None:
    """A feature map: (N, C, H, W), of a floating type, on a device the operators were built for."""
    _check_tensor(name, tensor)
    if tensor.dim() != 4 or 0 in tensor.shape[1:]:
        raise ValueError(
            f"{name}: expected shape (N, C, H, W) with C, H, W of at least 1, got "
            f"{tuple(tensor.shape)}"
        )
    if tensor.dtype not in FEATURE_DTYPES:
        accepted = ", ".join(str(d).removeprefix("torch.") for d in FEATURE_DTYPES)
        raise ValueError(f"{name}: expected one of {accepted}, got {tensor.dtype}")
    if tensor.device.type not in built_devices():
        raise RuntimeError(
            f"{name}: is on {tensor.device}, but d2_deform's operators were built for "
            f"{', '.join(sorted(built_devices() - {'meta'}))} only; move the model and its input "
            "there"
        )


def check_beside(name: str, tensor: Tensor, features: Tensor, *, float32_too: bool) -> None:
    """On the features' device, of their type or (``float32_too``) float32 beside a half type."""
    _check_tensor(name, tensor)
    if tensor.device != features.device:
        raise ValueError(
            f"{name}: is on {tensor.device} but input is on {features.device}; move them together"
        )
    half = features.dtype in (torch.float16, torch.bfloat16)
    if tensor.dtype == features.dtype or (float32_too and half and tensor.dtype == torch.float32):
        return
    expected = f"{features.dtype} (input's)"
    if float32_too and half:
        expected += " or torch.float32"
    raise ValueError(f"{name}: expected {expected}, got {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, expected: Sequence[int], meaning: str) -> None:
    """Exactly the shape ``expected``, whose dimensions ``meaning`` explains."""
    if tensor.dim() != len(expected) or tuple(tensor.shape) != tuple(expected):
        raise ValueError(
            f"{name}: expected shape {tuple(expected)} = {meaning}, got {tuple(tensor.shape)}"
        )


def under_autocast(device_type: str) -> bool:
    """Whether autocast is on for the device."""
    return device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type)


def autocast_features(*features: Tensor | None) -> list[Tensor | None]:
    """Features in the type that autocast asks for, where it is on."""
    device_type = next(t for t in features if t is not None).device.type
    if not under_autocast(device_type):
        return list(features)
    dtype = torch.get_autocast_dtype(device_type)
    return [
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in features
    ]


def autocast_coordinates(tensor: Tensor | None, features: Tensor) -> Tensor | None:
    """Under autocast, an offset, mask or box of a half type other than the features' in float32."""
    if not isinstance(tensor, Tensor) or not under_autocast(features.device.type):
        return tensor  # what is no tensor is refused by the checks
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.float() if half and tensor.dtype != features.dtype else tensor


def empty_beside(input: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialised result of ``shape``, of input's type, device and memory format.

    Channels-last only where ``input`` is dense in that format and in no other.
    """
    channels_last = not input.is_contiguous() and input.is_contiguous(
        memory_format=torch.channels_last
    )
    return torch.empty(
        shape,
        dtype=input.dtype,
        device=input.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


def register_no_double_backward(name: str) -> None:
    """Makes differentiating the backward operator ``name`` a clear error."""

    def backward(ctx: object, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{name} cannot be differentiated again: d2_deform has no double backward; "
            "call backward without create_graph=True"
        )

    torch.library.register_autograd(f"d2_deform::{name}", backward)


def _check_tensor(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
