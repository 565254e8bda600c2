"""Kills runs at random moments, and looks at what is left.

python study/faults.py                            pretraining, two processes, fine-tuning: 200 kills each
python study/faults.py --only two --kills 20

A small run is started, killed with SIGKILL, looked at, gone on with by --resume, killed again, and so on to its end;
then the next is started. After each kill the checkpoint must be whole, and at its end every tensor must be that of the
run that nobody disturbed. The disk is made to take its time over a checkpoint, or few kills would fall into writing
one; those that do are known by the unfinished file that they leave.

As root also: a disk that fills up, and one that cannot be written to.
"""

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from tqdm import tqdm

import data
import finetune
import harness.writer
import train
from harness.flags import ConfigError
from harness.trust import load_checkpoint

SMALL = ["--image-size", "32", "--width", "32", "--heads", "2", "--vision-layers", "2", "--text-layers", "1",
         "--fusion-layers", "1", "--embed-dim", "16", "--vocab-size", "300"]  # fmt: skip
RUN = ["--products", "12", "--batch-size", "8", "--val-products", "10", "--warmup", "2", "--steps", "12",
       "--save-every", "1", "--val-every", "12", "--log-every", "1", "--precision", "fp32"]  # fmt: skip
# or most of the time would go into drawing and measuring
data.VAL_PRODUCTS, train.truth = 12, lambda *_: {}
train.draw_masks = train.draw_curves = lambda *_: None
STARTING = 120  # seconds that a run may take that is not disturbed


def child(main, argv: list[str], said: Path, rank: int = 0, port: int = 0) -> int:
    """A process that runs a script's `main`, one of two if there is a port. -> its number. A copy of this one, which
    has loaded all libraries and computed nothing yet."""
    if process := os.fork():
        return process
    with open(said, "a") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    if port:
        os.environ |= {"TORCHELASTIC_RUN_ID": "faults", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                       "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}  # fmt: skip
    flush = os.fsync
    harness.writer.os.fsync = lambda file: (time.sleep(0.1), flush(file))
    code = 99
    try:
        main(argv)
        code = 0
    except SystemExit as error:
        print(error.code, file=sys.__stderr__, flush=True)
        code = 1 if isinstance(error.code, str) else int(error.code or 0)
    finally:
        os._exit(code)


def start(main, argv: list[str], said: Path, processes: int) -> list[int]:
    """One or two processes of a run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1] if processes > 1 else 0
    return [child(main, argv, said, rank, port) for rank in range(processes)]


def end(processes: list[int], after: float | None, rng: random.Random) -> list[int]:
    """Kill them after so many seconds, one a moment before the other, unless they have ended. -> their statuses."""
    until, statuses = time.monotonic() + (STARTING if after is None else after), {}
    while len(statuses) < len(processes):
        for process in set(processes) - statuses.keys():
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                statuses[process] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > until and (left := sorted(set(processes) - statuses.keys())):
            os.kill(rng.choice(left), signal.SIGKILL)
            until = time.monotonic() + 0.05
        time.sleep(0.005)
    return [statuses[process] for process in processes]


def differing(one, two, where: str = "") -> list[str]:
    """Where two states differ."""
    if isinstance(one, dict) and isinstance(two, dict):
        keys = [key for key in one.keys() | two.keys() if key not in ("seconds", "out", "resume")]
        return sum((differing(one.get(key), two.get(key), f"{where}.{key}") for key in sorted(keys, key=str)), [])
    if isinstance(one, list | tuple) and isinstance(two, list | tuple) and len(one) == len(two):
        return sum((differing(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(one, two, strict=True))), [])
    same = torch.equal(one, two) if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor) else one == two
    return [] if same else [where]


def torment(name: str, main, flags: list[str], kills: int, folder: Path, processes: int, seed: int) -> str:
    """So many kills of runs by some flags. -> a row of the table; raises AssertionError where a promise is broken."""
    rng, counts, said = random.Random(seed), Counter(), folder / f"{name}.log"
    began = time.monotonic()
    assert end(start(main, [*flags, "--out", str(folder / name)], said, processes), None, rng) == [0] * processes
    whole, took = load_checkpoint(folder / name / "last.pt"), time.monotonic() - began
    bar = tqdm(total=kills, desc=name, unit=" kills", disable=None)
    while counts["kills"] < kills:
        out, began, disturbed = folder / f"{name}-{counts['runs']}", time.monotonic(), False
        while True:
            going_on = [*flags[:2], "--resume"] if main is finetune.main else ["--resume"]
            argv = [*(going_on if (out / "last.pt").exists() else flags), "--out", str(out)]
            statuses = end(start(main, argv, said, processes), rng.uniform(0, took), rng)
            if statuses == [0] * processes:
                break
            assert -signal.SIGKILL in statuses, f"{name}: ended with {statuses}; see {said}"
            counts["kills"] += 1
            disturbed = True
            counts["while writing"] += bool(list(out.glob(".*.part")))
            bar.update()
            for path in out.glob("*.pt"):
                load_checkpoint(path)
        assert not (wrong := differing(whole, load_checkpoint(out / "last.pt"))), f"{out}: {wrong[:3]}"
        counts["runs"] += 1
        took = took if disturbed else min(took, time.monotonic() - began)  # or many would come too late
    bar.close()
    return (
        f"| {name} | {counts['kills']} | {counts['while writing']} | {counts['runs']} | {len(list(walk(whole)))} | 0 |"
    )


def walk(state):
    """All tensors of a state."""
    if isinstance(state, torch.Tensor):
        yield state
    for part in state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ():
        yield from walk(part)


def spoil_disks(folder: Path) -> None:
    """A disk of 5 MB that fills up during a run, and one that cannot be written to at all."""
    for name, options in (("full", "size=5m"), ("read-only", "size=4m")):
        disk, said = folder / name, folder / f"{name}.log"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=True)
        try:
            if name == "read-only":
                subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            argv = [*SMALL, *RUN, "--keep", "1000", "--out", str(disk / "run")]
            (status,) = end(start(train.main, argv, said, 1), None, random.Random(0))
            left = sorted(disk.glob("run/*.pt"))
            for path in left:
                load_checkpoint(path)
            last = said.read_text().strip().splitlines()[-1].replace(str(disk), f"DISK-{name}")
            assert status == 1 and last.startswith("train.py: ") and "Traceback" not in said.read_text()
            print(f"{name}: {last}\n  {len(left)} checkpoints there, all whole")
        finally:
            subprocess.run(["umount", disk], check=True)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("faults.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--only", choices=("pretraining", "two", "finetuning", "disks"))
    parser.add_argument("--kills", type=int, default=200, help="of each kind of run (default 200)")
    parser.add_argument("--threads", type=int, help="of each process (default: as a run takes)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.kills < 1:
        parser.error(f"--kills {args.kills}: at least 1")
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        pretrained = folder / "pretrained"
        tune = ["--task", "retrieval", "--checkpoint", str(pretrained / "last.pt"), *RUN]
        kinds = {"pretraining": (train.main, [*SMALL, *RUN], 1), "two": (train.main, [*SMALL, *RUN], 2),
                 "finetuning": (finetune.main, tune, 1)}  # fmt: skip
        rows = []
        try:
            for kind, (script, flags, processes) in kinds.items():
                if args.only not in (None, kind):
                    continue
                if kind == "finetuning":
                    end(
                        start(train.main, [*SMALL, *RUN, "--out", str(pretrained)], folder / "log", 1),
                        None,
                        random.Random(),
                    )
                rows.append(torment(kind, script, flags, args.kills, folder, processes, args.seed))
            if args.only in (None, "disks") and os.geteuid() == 0:
                spoil_disks(folder)
        except (AssertionError, ConfigError) as error:
            for log in folder.glob("*.log"):
                print(*log.read_text().splitlines()[-8:], sep="\n")
            sys.exit(f"faults.py: {error}")
    if rows:
        print("| run | kills | of these while writing | runs to the end | tensors compared each | differing |")
        print("|---|---|---|---|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    main()
