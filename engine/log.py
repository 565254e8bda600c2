"""What a run writes down while it goes on, and how it is asked to stop.

Every key of metrics.jsonl is explained in docs/glossary.md.
"""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None


def read_metrics(path: Path) -> list[dict]:
    """The lines of metrics.jsonl; a line that a killed run left half written is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def final_metrics(out: Path) -> dict | None:
    """The last line of the metrics.jsonl in a run's folder; None where the run has not finished."""
    lines = read_metrics(out / "metrics.jsonl")
    return lines[-1] if lines and lines[-1].get("final") else None


def trim_metrics(path: Path, step: int) -> None:
    """Drop the lines after a step, which a resumed run writes again; at step 0 all lines."""
    lines = [line for line in read_metrics(path) if line["step"] <= step and not line.get("final") and step]
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(scratch, path)


def write_metrics(path: Path, **metrics) -> None:
    """Append a line to metrics.jsonl, numbers to six digits."""
    line = {}
    for key, value in metrics.items():
        line[key] = float(f"{value:.6g}") if isinstance(value, float) else value
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


@contextlib.contextmanager
def stop_signals(second_stops: bool) -> Iterator[list[str]]:
    """Ctrl-C and SIGTERM ask for a stop after the step under way; a second one stops at once, unless torchrun is there:
    it may pass on a signal that has already come. -> the names of the signals that came"""
    caught = []

    def note(number: int, _frame) -> None:
        caught.append(signal.Signals(number).name)
        if second_stops:
            signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def own_session(_worker: int) -> None:
    """Ctrl-C and signals to the process group reach the main process only, which then ends its loader workers."""
    if hasattr(os, "setsid"):
        os.setsid()
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def peak_memory_mib(device: torch.device) -> float | None:
    """Most memory this process held: on the GPU if it trains there, otherwise resident; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
