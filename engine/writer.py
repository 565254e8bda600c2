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
def whole_file(path: Path, keep_older: bool = False) -> Iterator[BinaryIO]:
    """A file to write into, beside `path`: flushed to the disk, then renamed over it; of a failure nothing is left.
    keep_older: the version before stays, as `last-2.pt` beside `last.pt`."""
    scratch = path.with_name(f".{path.name}.part")
    try:
        with open(scratch, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep_older and path.exists():
            copy_older(path)
        os.replace(scratch, path)
    except OSError as error:  # which often does not say of which file it speaks
        raise OSError(error.errno, f"{error.strerror or error}; what was there before is whole", str(path)) from None
    finally:
        scratch.unlink(missing_ok=True)


def copy_older(path: Path) -> None:
    """Give a file a second name, `last-2.pt` for `last.pt`; at no moment is `path` itself away."""
    older = path.with_stem(f"{path.stem}-2")
    scratch = older.with_name(f".{older.name}.part")
    scratch.unlink(missing_ok=True)
    try:
        os.link(path, scratch)
    except (OSError, AttributeError):  # a file system, or a system, without links
        shutil.copyfile(path, scratch)
    os.replace(scratch, older)


def write_whole(state: dict, path: Path, keep_older: bool = False) -> None:
    """A checkpoint, by `whole_file`."""
    with whole_file(path, keep_older) as file:
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

    def write(self, state: dict, path: Path, keep_older: bool = False) -> None:
        """Copy the state and return; the copy is written meanwhile."""
        self.wait()
        self.under_way = self.thread.submit(write_whole, snapshot(state), path, keep_older)

    def wait(self) -> None:
        """Until everything is on the disk."""
        self.under_way.result()
