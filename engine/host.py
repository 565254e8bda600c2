"""What machines differ in: locks, sessions, how memory is counted. Where a system has none, a run does without."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist

from engine.flags import ConfigError

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[None]:
    """While two runs wrote into one folder, each would spoil the other's files: the second is refused. The claim, on a
    file that stays, ends with the process that holds it, however that ends; under torchrun the first process has it."""
    if dist.is_torchelastic_launched() and os.environ.get("RANK") != "0":
        yield
        return
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "a+") as file:
        _lock(file, out)
        try:
            yield
        finally:  # of a run that was refused nothing is left; an OSError: others have written there meanwhile
            with contextlib.suppress(OSError):
                if made and [path.name for path in out.iterdir()] == [".lock"]:
                    (out / ".lock").unlink()
                    for folder in made:
                        folder.rmdir()


def _lock(file: TextIO, out: Path) -> None:
    try:
        if fcntl is None:
            raise OSError("no locks")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which, other than flock, loader workers do not inherit
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise ConfigError(f"{out} is being written by process {file.read()}; choose another --out") from None
    except OSError:
        print(f"{out}: this file system has no locks, so another run into it would go unnoticed")
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()


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
