"""What a run writes down while it goes on, and how it is asked to stop."""

import json
import resource
import signal
import sys
from pathlib import Path

import torch


class Metrics:
    """metrics.jsonl: one JSON object a line. A resumed run drops the lines after its checkpoint."""

    def __init__(self, path: Path, resumed_step: int | None = None):
        lines = []
        if resumed_step is not None and path.exists():
            lines = [line for line in map(_json_or_none, path.read_text().splitlines()) if line]
            lines = [line for line in lines if line["step"] <= resumed_step and not line.get("final")]
        self.path, self.lines = path, lines
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def validation(self, step: int) -> dict[str, float]:
        """The held-out figures written for `step`, or nothing."""
        found = [line for line in self.lines if line["step"] == step and any(key.startswith("val_") for key in line)]
        return {key: value for line in found for key, value in line.items() if key != "step"}

    def write(self, **figures) -> None:
        line = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in figures.items()}
        self.lines.append(line)
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


def _json_or_none(line: str) -> dict | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # a line that a killed run left half written
        return None


class StopSignals:
    """Ctrl-C and SIGTERM ask for a stop after the step under way; a second one stops at once, unless torchrun is there:
    it may pass on a signal that has already come."""

    def __init__(self, second_stops: bool):
        self.second_stops = second_stops

    def __enter__(self) -> "StopSignals":
        self.caught: str | None = None
        self._before = {number: signal.signal(number, self._catch) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _catch(self, number: int, _frame) -> None:
        self.caught = signal.Signals(number).name
        if self.second_stops:
            signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def peak_memory_mib(device: torch.device) -> float:
    """Most memory this process held: on the GPU if it trains there, otherwise resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
