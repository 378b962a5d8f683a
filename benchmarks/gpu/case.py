"""One row of a table: the same computation by several libraries on several sets of inputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .timing import Call

__all__ = ["PRECISIONS", "Case", "Libraries", "set_precision"]

PRECISIONS = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}

CACHE_BYTES = 128 << 20
"""All sets of inputs together: more than twice an H100's level-2 cache."""


def set_precision(name: str) -> torch.dtype:
    """Lets float32 products be TF32 for "tf32" alone; the type of the tensors."""
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    return PRECISIONS[name]


@dataclass
class Libraries:
    """The calls of each library, "ours" first; libraries that refuse are noted with their reason.

    Attributes:
        backward: whether to time the gradients rather than the outputs.
        alone: whether "ours" is all that is wanted.
    """

    backward: bool
    alone: bool = False
    sets: dict[str, list[Call]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, operator: Callable[..., Tensor], tensors: Sequence[Tensor]) -> None:
        """Adds the call on one set of inputs; of ours also the deterministic gradients."""
        if self.alone and name != "ours":
            return
        leaves = [t.detach().requires_grad_(self.backward) for t in tensors]
        try:
            output = operator(*leaves)
            gradient = torch.randn_like(output)
            if self.backward:
                torch.autograd.grad(output, leaves, gradient, retain_graph=True)
        except (RuntimeError, NotImplementedError) as error:
            self.absent[name] = str(error).splitlines()[0][:120]
            return
        if not self.backward:
            self.sets.setdefault(name, []).append(lambda: operator(*leaves))
            return

        def gradients(deterministic: bool = False) -> object:
            torch.use_deterministic_algorithms(deterministic)
            result = torch.autograd.grad(output, leaves, gradient, retain_graph=True)
            torch.use_deterministic_algorithms(False)
            return result

        self.sets.setdefault(name, []).append(gradients)
        if name == "ours":
            reproducible = self.sets.setdefault("ours deterministic", [])
            reproducible.append(lambda: gradients(deterministic=True))


@dataclass(frozen=True)
class Case:
    """A row to measure.

    Attributes:
        part: the table, "convolution forward" for example.
        precision: a key of ``PRECISIONS``.
        flop: of the products and the samples, a multiply-add is two.
        moved: bytes of inputs and outputs, each moved once.
        input_bytes: of one set of inputs.
        add: adds the calls on one more set of inputs.
        alone: whether only "ours" is measured.
    """

    part: str
    name: str
    precision: str
    flop: float
    moved: float
    input_bytes: int
    add: Callable[[Libraries, torch.dtype], None]
    alone: bool = False

    @property
    def backward(self) -> bool:
        return self.part.endswith("backward")

    def libraries(self) -> Libraries:
        """Sets of inputs, so many that the cache does not hold them."""
        libraries = Libraries(self.backward, self.alone)
        dtype = set_precision(self.precision)
        for _ in range(max(2, min(8, CACHE_BYTES // self.input_bytes + 1))):
            self.add(libraries, dtype)
        return libraries
