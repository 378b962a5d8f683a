"""Checks and conversions of arguments that all operators share. Messages name the argument."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._library import DEVICES

FEATURE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    """(height, width) from a number or two of them, each at least ``least``."""
    numbers = tuple(value) if isinstance(value, (tuple, list, torch.Size)) else (value, value)
    if len(numbers) != 2 or any(isinstance(n, (float, str, Tensor)) for n in numbers):
        raise ValueError(f"{name}: expected an int or two ints, got {value!r}")
    if numbers[0] < least or numbers[1] < least:
        raise ValueError(f"{name}: expected at least {least}, got {value!r}")
    return numbers


def check_features(name: str, tensor: Tensor) -> None:
    """A feature map: (N, C, H, W), of a floating type, on a device the operators were built for."""
    check_tensor(name, tensor)
    if tensor.dim() != 4:
        raise ValueError(f"{name}: expected shape (N, C, H, W), got {tuple(tensor.shape)}")
    if tensor.dtype not in FEATURE_DTYPES:
        accepted = ", ".join(str(d).removeprefix("torch.") for d in FEATURE_DTYPES)
        raise ValueError(f"{name}: expected one of {accepted}, got {tensor.dtype}")
    if tensor.device.type not in DEVICES:
        raise RuntimeError(
            f"{name}: is on {tensor.device}, but d2_deform's operators were built for "
            f"{', '.join(sorted(DEVICES - {'meta'}))} only; move the model and its input there"
        )


def check_tensor(name: str, tensor: object) -> None:
    """A tensor at all."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")


def check_beside(name: str, tensor: Tensor, features: Tensor, *, float32_too: bool) -> None:
    """On the features' device, of their type or (``float32_too``) float32 beside a half type."""
    check_tensor(name, tensor)
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


def autocast_features(*features: Tensor | None) -> list[Tensor | None]:
    """Casts features as autocast asks, where it is on; offsets, masks, boxes are not for it."""
    device = next(t for t in features if t is not None).device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return list(features)
    dtype = torch.get_autocast_dtype(device)
    return [
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in features
    ]


def at_least_float32(tensor: Tensor | None, features: Tensor) -> Tensor | None:
    """Widens an offset, mask or box of a half type that is not the features' (autocast does so)."""
    if not isinstance(tensor, Tensor) or tensor.dtype == features.dtype:
        return tensor  # what is no tensor is refused by the checks
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def suggested_format(tensor: Tensor) -> torch.memory_format:
    """Memory format of a result beside ``tensor``: channels-last only if unmistakably so."""
    if tensor.is_contiguous():
        return torch.contiguous_format
    if tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def register_no_double_backward(name: str) -> None:
    """Makes differentiating the backward operator ``name`` a clear error."""

    def backward(ctx: object, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{name} cannot be differentiated again: d2_deform has no double backward; "
            "call backward without create_graph=True"
        )

    torch.library.register_autograd(f"d2_deform::{name}", backward)
