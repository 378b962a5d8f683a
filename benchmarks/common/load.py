"""What other processes take of the machine while something is timed."""

import os
from pathlib import Path

__all__ = ["ALLOWED", "OtherLoad"]

ALLOWED = 0.05
"""Share of the processor beyond which times of all threads are not to be trusted."""


class OtherLoad:
    """Counts from its creation on; Linux only, elsewhere the share is not known."""

    def __init__(self) -> None:
        self.start = _processor_seconds()

    def share(self) -> float | None:
        """Of all cores' time, 0 to 1, what neither this process nor its children took."""
        if self.start is None:
            return None
        end = _processor_seconds()
        assert end is not None
        total, busy, own = (after - before for before, after in zip(self.start, end, strict=True))
        return max(0.0, busy - own) / total if total else 0.0


def _processor_seconds() -> tuple[float, float, float] | None:
    """Of all cores, those of them that were not idle, and those of this process."""
    path = Path("/proc/stat")
    if not path.exists():
        return None
    ticks = [int(word) for word in path.read_text().partition("\n")[0].split()[1:9]]
    idle = ticks[3] + ticks[4]  # idle and waiting for a disk; the last of all: the hypervisor's
    per_second = os.sysconf("SC_CLK_TCK")
    return sum(ticks) / per_second, (sum(ticks) - idle) / per_second, sum(os.times()[:4])
