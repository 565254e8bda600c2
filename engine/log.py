"""The log of a run, and the signals that stop it.

Every key of metrics.jsonl is explained in docs/glossary.md.
"""

import atexit
import contextlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing.queues import Queue
from pathlib import Path

import torch
from torch.utils.data import DataLoader

try:
    import resource
except ImportError:  # Windows
    resource = None


def read_metrics(path: Path) -> list[dict]:
    """Read the lines of a metrics.jsonl. Lines that a kill left incomplete are skipped. -> [] without a file"""
    if not path.exists():
        return []
    lines = []
    content = path.read_bytes().replace(b"\0", b"")  # a power cut leaves zero bytes, and UTF-16 has them
    for text in content.decode(errors="replace").split("\n"):
        try:
            line = json.loads(text.strip("\ufeff\ufffd"))  # byte order marks
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def final_metrics(out: Path) -> dict | None:
    """Return the last line of metrics.jsonl in a run's folder, or None if the run has not finished."""
    lines = read_metrics(out / "metrics.jsonl")
    return lines[-1] if lines and lines[-1].get("final") else None


def trim_metrics(path: Path, step: int) -> None:
    """Remove the lines after a step, and the final line: the resumed run writes them again. At step 0 remove all."""
    kept = []
    for line in read_metrics(path):
        if step > 0 and line["step"] <= step and not line.get("final"):
            kept.append(json.dumps(line) + "\n")
    write_text(path, "".join(kept))


@contextlib.contextmanager
def name_in_errors(path: Path) -> Iterator[None]:
    """Add the path to an OSError that is raised in the block; the error of a full disk has none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 beside `path`, then rename it: a full disk leaves no part of it.

    Raises OSError where it cannot be written; an older file is then unchanged.
    """
    scratch = path.with_name(f".{path.name}.part")
    with name_in_errors(path):
        try:
            scratch.write_text(text, encoding="utf-8")
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)


def write_metrics(path: Path, **metrics) -> None:
    """Append a line to a metrics.jsonl, with numbers to six digits."""
    line = {}
    for key, value in metrics.items():
        line[key] = float(f"{value:.6g}") if isinstance(value, float) else value
    with name_in_errors(path), open(path, "a") as file:
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


def start_loading(loader: DataLoader) -> Iterator[dict]:
    """Start the data loading processes of a loader. -> its batches; they raise RuntimeError where a process died"""
    if not loader.num_workers or not hasattr(signal, "pthread_sigmask"):  # Windows
        return iter(loader)
    # PyTorch's handler of SIGCHLD would raise the error in any line of the main process; new processes start with
    # SIGTERM blocked, until `ignore_signals` runs in them
    handler = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return iter(loader)
    finally:
        signal.signal(signal.SIGCHLD, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def ignore_signals(_worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM in a data loading process: the main process finishes its step first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Queue._on_queue_feeder_error = end_process


def end_process(*_error) -> None:
    """End a process that cannot send a batch. Otherwise the main process would wait for this batch for ever."""
    os._exit(1)


@atexit.register
def end_loading() -> None:
    """End the data loading processes where an error ends the main process; Python would send SIGTERM and wait."""
    for process in multiprocessing.active_children():
        process.kill()


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
