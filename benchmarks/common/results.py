"""Results of one script: a JSON file that grows part by part."""

import json
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .goals import judge
from .machine import describe_machine
from .parts import Row, Settings

__all__ = ["Results"]

ROOT = Path(__file__).resolve().parents[2]


class Results:
    """What a script has measured, written to ``path`` after every part.

    A file that is there already keeps its other parts if machine, versions, compiled operators and
    settings are the same; else it is begun anew.

    Attributes:
        data: "benchmark", "machine", "settings", "parts": {part: {"measured", "commit",
            "other load", "rows", "goals"}}.
    """

    def __init__(self, path: Path, benchmark: str, settings: Settings) -> None:
        self.path = path
        self.data: dict[str, Any] = {
            "benchmark": benchmark,
            "machine": describe_machine(),
            "settings": asdict(settings),
            "parts": {},
        }
        if path.exists():
            old = json.loads(path.read_text())
            if all(old.get(key) == self.data[key] for key in ("machine", "settings")):
                self.data["parts"] = old["parts"]

    def write(self, part: str, rows: list[Row], other_load: float | None) -> None:
        """Replaces one part. Goals are not for quick runs, whose sizes are others."""
        name = self.data["benchmark"]
        quick = self.data["settings"]["quick"]
        self.data["parts"][part] = {
            "measured": time.strftime("%Y-%m-%d %H:%M"),
            "commit": _commit(),
            "other load": other_load,
            "rows": rows,
            "goals": [] if quick else [goal for row in rows for goal in judge(name, part, row)],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rounded = json.loads(json.dumps(self.data), parse_float=lambda x: float(f"{float(x):.4g}"))
        self.path.write_text(json.dumps(rounded, indent=1) + "\n")

    @property
    def goals(self) -> list[dict[str, Any]]:
        return [goal for part in self.data["parts"].values() for goal in part["goals"]]


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return result.stdout.strip() or "not in git"
