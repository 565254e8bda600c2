"""Files on their way to the disk: whole or not at all; checkpoints in a thread of their own, while training goes on."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor


def snapshot(state):
    """A copy of a state, dicts and lists of tensors and plain things, in the host's memory."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: snapshot(value) for key, value in state.items()}
    return type(state)(map(snapshot, state)) if isinstance(state, list | tuple) else state


@contextlib.contextmanager
def whole_file(path: Path, keep: int = 1) -> Iterator[BinaryIO]:
    """A file to write into, beside `path`: flushed to the disk, then renamed over it; of a failure nothing is left.
    keep: of so many versions the older ones stay, `last-2.pt` before `last.pt`, `last-3.pt` before that."""
    scratch = path.with_name(f".{path.name}.part")
    try:
        with open(scratch, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        keep_older(path, keep)
        os.replace(scratch, path)
    except OSError as error:  # which often does not say of which file it speaks
        raise OSError(error.errno, f"{error.strerror or error}; what was there before is whole", str(path)) from None
    finally:
        scratch.unlink(missing_ok=True)


def keep_older(path: Path, keep: int) -> None:
    """Move the versions of a file on by one; at no moment is `path` itself away."""
    names = [path, *(path.with_stem(f"{path.stem}-{age}") for age in range(2, keep + 1))]
    for newer, older in reversed(list(zip(names[1:], names[2:], strict=False))):
        if newer.exists():
            os.replace(newer, older)
    if keep > 1 and path.exists():
        scratch = names[1].with_name(f".{names[1].name}.part")
        scratch.unlink(missing_ok=True)
        try:
            os.link(path, scratch)
        except (OSError, AttributeError):  # a file system, or a system, without links
            shutil.copyfile(path, scratch)
        os.replace(scratch, names[1])


def write_whole(state: dict, path: Path, keep: int = 1) -> None:
    """A checkpoint, by `whole_file`."""
    with whole_file(path, keep) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # what torch makes of a full disk
            full = shutil.disk_usage(path.parent).free < 2**20
            raise OSError(errno.ENOSPC if full else None, None if full else str(error).splitlines()[0]) from None


class Writer:
    """One checkpoint at a time: who wants to write the next waits for the last. An error is raised to who waits."""

    def __init__(self):
        self.thread, self.under_way = ThreadPoolExecutor(1, "checkpoint"), Future()
        self.under_way.set_result(None)

    def write(self, state: dict, path: Path, keep: int = 1) -> None:
        """Copy the state and return; the copy is written meanwhile."""
        self.wait()
        self.under_way = self.thread.submit(write_whole, snapshot(state), path, keep)

    def wait(self) -> None:
        """Until everything is on the disk."""
        self.under_way.result()
