"""The log of a run, and the signals that stop it.

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
    """Read the lines of a metrics.jsonl, without a line that a killed run wrote in part. -> [] if there is no file"""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def final_metrics(out: Path) -> dict | None:
    """Return the last line of metrics.jsonl in a run's folder, or None if the run has not finished."""
    lines = read_metrics(out / "metrics.jsonl")
    return lines[-1] if lines and lines[-1].get("final") else None


def trim_metrics(path: Path, step: int) -> None:
    """Remove the lines after a step, since the resumed run writes them again; at step 0 remove all lines."""
    kept = []
    for line in read_metrics(path):
        if step > 0 and line["step"] <= step and not line.get("final"):
            kept.append(json.dumps(line) + "\n")
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text("".join(kept))
    os.replace(scratch, path)


def write_metrics(path: Path, **metrics) -> None:
    """Append a line to a metrics.jsonl, with numbers to six digits."""
    line = {}
    for key, value in metrics.items():
        line[key] = float(f"{value:.6g}") if isinstance(value, float) else value
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


@contextlib.contextmanager
def stop_signals(second_stops: bool) -> Iterator[list[str]]:
    """Catch Ctrl-C and SIGTERM, so that the loop can stop after the current step.

    second_stops: a second signal ends the process at once. Not under torchrun, which may repeat a signal that the
    processes have already received.
    -> the names of the signals received so far
    """
    received = []

    def record_signal(number: int, _frame) -> None:
        received.append(signal.Signals(number).name)
        if second_stops:
            signal.signal(number, signal.SIG_DFL)

    previous_handlers = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        previous_handlers[number] = signal.signal(number, record_signal)
    try:
        yield received
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


def ignore_interrupts(_worker: int) -> None:
    """Keep Ctrl-C and signals to the process group from a data loading process; the main process ends it."""
    if hasattr(os, "setsid"):
        os.setsid()
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def peak_memory_mib(device: torch.device) -> float | None:
    """Return the peak memory of this process in MiB: on the GPU if it trains there, otherwise resident memory.

    -> None where the system does not report it
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on a Mac
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
