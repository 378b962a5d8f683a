"""What is measured: one computation, ours and its peers'."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

__all__ = ["Absent", "Call", "Case", "Operator", "Problem", "Series", "sides"]

Call = Callable[[], Tensor]


class Absent(Exception):
    """A peer or a case that cannot be measured here; the message says why."""


@dataclass
class Problem:
    """The same computation by several libraries, on the same tensors.

    Attributes:
        leaves: the tensors whose gradients the backward pass computes, those a peer has none of
            (the dense convolution's offsets) excepted.
        calls: what to time, "ours" first.
        absent: the reason for each peer that is not there.
    """

    leaves: list[Tensor]
    calls: dict[str, Call]
    absent: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, leaves: list[Tensor], ours: Call, peers: Mapping[str, Callable[[], Call]]
    ) -> "Problem":
        """Asks every peer for its call; one that raises :class:`Absent` is noted."""
        problem = cls(leaves, {"ours": ours})
        for name, build in peers.items():
            try:
                problem.calls[name] = build()
            except Absent as reason:
                problem.absent[name] = str(reason)
        return problem


@dataclass(frozen=True)
class Case:
    """A named size.

    Attributes:
        samples: bilinear samples of one forward pass; slow peers' time goes by it.
        build: makes the tensors; raises :class:`Absent` where the case cannot be measured.
    """

    name: str
    description: str
    samples: int
    build: Callable[[], Problem]


@dataclass(frozen=True)
class Series:
    """The same computation at 1, 2, 4 ... times the work."""

    name: str
    cases: dict[int, Case]

    @classmethod
    def of(cls, name: str, factors: Iterable[int], make: Callable[[int], Case]) -> "Series":
        """The cases that ``make`` gives for every factor, named by it."""
        return cls(name, {n: replace(make(n), name=f"{name} x{n}") for n in factors})


def sides(factor: int) -> tuple[int, int]:
    """Splits a power of two for height and width: 1, 2, 4, 8 -> 1x1, 1x2, 2x2, 2x4."""
    high = 2 ** ((factor.bit_length() - 1) // 2)
    return high, factor // high


@dataclass(frozen=True)
class Operator:
    """All that one operator's script measures.

    Attributes:
        module: of the script, which has a function ``operator(quick) -> Operator``.
    """

    module: str
    cases: list[Case]
    threads: list[Case]
    growth: list[Series]
    memory: list[Series]

    @property
    def name(self) -> str:
        return self.module.rpartition(".")[2]
