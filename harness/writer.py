"""Checkpoints on their way to the disk: whole or not at all, in a thread of their own, while training goes on."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor


def snapshot(state):
    """A copy of a state, dicts and lists of tensors and plain things, in the host's memory."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: snapshot(value) for key, value in state.items()}
    return type(state)(map(snapshot, state)) if isinstance(state, list | tuple) else state


def write_whole(state: dict, path: Path) -> None:
    """To a file beside it, flushed to the disk, then renamed over it."""
    scratch = path.with_name(f".{path.name}.part")
    with open(scratch, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


class Writer:
    """One checkpoint at a time: who wants to write the next waits for the last. An error is raised to who waits."""

    def __init__(self):
        self.thread, self.under_way = ThreadPoolExecutor(1, "checkpoint"), Future()
        self.under_way.set_result(None)

    def write(self, state: dict, path: Path) -> None:
        """Copy the state and return; the copy is written meanwhile."""
        self.wait()
        self.under_way = self.thread.submit(write_whole, snapshot(state), path)

    def wait(self) -> None:
        """Until everything is on the disk."""
        self.under_way.result()
