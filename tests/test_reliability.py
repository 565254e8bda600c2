"""Runs survive kills and full disks, run no foreign code, and report errors in one line.

`KILLS=200 python -m pytest tests/test_reliability.py -k killed` kills that often."""

import multiprocessing
import os
import pickle
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from small import FAST, checkpoint, lines, resume, run, run_files, same_state, write_jsonl
from test_model import make_model

import data
import train
from engine.checkpoints import load_checkpoint, write_atomically
from engine.flags import ConfigError
from engine.weights import load_pretrained
from readers.dataset import DataError
from readers.jsonl import jsonl
from readers.synthetic import Synthetic

ROOT = Path(train.__file__).parent
pytestmark = pytest.mark.usefixtures("quick")


def message_of(error):
    """Return the message of a refusal, which is one line."""
    message = str(error.value)
    assert message and "\n" not in message and "Traceback" not in message
    return message


def test_the_checkpoint_before_the_last_is_kept(tmp_path):
    whole, restored = tmp_path / "whole", tmp_path / "restored"
    run(whole, "--steps", "6", "--val-every", "1", stop_at=3)
    assert (checkpoint(whole)["step"], load_checkpoint(whole / "last-2.pt")["step"]) == (3, 2)
    shutil.copytree(whole, restored)
    shutil.copy(restored / "last-2.pt", restored / "last.pt")
    with open(restored / "metrics.jsonl", "a") as file:
        file.write('{"step": 999')  # a line written in part
    for out in (whole, restored):
        resume(out, stop_at=5)
    same_state(checkpoint(whole), checkpoint(restored))
    one, two = ([line["loss"] for line in lines(out) if "loss" in line] for out in (whole, restored))
    assert one[-1] == two[-1]


@pytest.mark.parametrize("failure", [OSError(28, "No space left"), RuntimeError("PytorchStreamWriter failed\nat")])
def test_a_failed_write_leaves_the_previous_checkpoint(tmp_path, monkeypatch, failure):
    path = tmp_path / "last.pt"
    path.write_bytes(b"whole")
    monkeypatch.setattr("engine.checkpoints.torch.save", mock.Mock(side_effect=failure))
    with pytest.raises(OSError) as error:
        write_atomically({}, path, keep_older=True)
    message = message_of(error)
    assert "the previous file is unchanged" in message and str(path) in message
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"] and path.read_bytes() == b"whole"


def test_a_full_disk_is_one_line(tmp_path):
    script = (
        "import resource, sys; import train; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        f"train.main({[*FAST, '--steps', '2', '--out', str(tmp_path)]!r})"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert last.startswith(f"train.py: {tmp_path}/last.pt: ") and "File too large" in last
    assert not list(tmp_path.glob("*.pt")) and not list(tmp_path.glob(".*.part"))


KILLS = int(os.environ.get("KILLS", "3"))


def train_quietly(flags, log):
    """Train without pictures and ground truth. The disk is slow, so that some kills fall into writing a checkpoint."""
    data.VAL_PRODUCTS, train.ground_truth_metrics = 12, lambda *_: {}
    train.draw_masks = train.draw_curves = lambda *_: None
    flush = os.fsync

    def slow_flush(file):
        time.sleep(0.1)
        flush(file)

    os.fsync = slow_flush
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    train.main(flags)


def killed_after(flags, log, seconds):
    """Train in a process of its own and kill it after some seconds, unless it has ended. -> its exit code"""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    process = processes.Process(target=train_quietly, args=(flags, log))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode


def test_a_run_that_is_killed_ends_with_the_tensors_of_one_that_is_not(tmp_path):
    flags = [*FAST, "--steps", "8", "--val-every", "1", "--out"]
    whole, log, rng = tmp_path / "whole", tmp_path / "run.log", random.Random(0)
    start = time.monotonic()
    assert killed_after([*flags, str(whole)], log, 120) == 0
    duration = time.monotonic() - start
    kills, number = 0, 0
    while kills < KILLS:
        out = tmp_path / str(number)
        exitcode = None
        while exitcode != 0:
            next_flags = ["--resume", "--out", str(out)] if (out / "last.pt").exists() else [*flags, str(out)]
            exitcode = killed_after(next_flags, log, rng.uniform(0.2, 1) * duration)
            assert exitcode in (0, -9), log.read_text()[-2000:]
            kills += exitcode == -9
            for path in out.glob("*.pt"):
                load_checkpoint(path)
        same_state(checkpoint(whole), checkpoint(out))
        number += 1


def test_pickled_code_is_never_run(tmp_path, capsys):
    class Malicious:
        def __reduce__(self):
            return print, ("ran pickled code",)

    path = tmp_path / "last.pt"
    for save in (torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))):
        save({"model": Malicious()}, path)
        with pytest.raises(ConfigError) as checkpoint_error:
            load_checkpoint(path)
        with pytest.raises(DataError) as weights_error:
            load_pretrained(make_model(), [path])
        assert "weights_only" not in message_of(checkpoint_error) + message_of(weights_error)
    assert "ran" not in capsys.readouterr().out


def test_control_characters_stay_out_of_the_terminal(tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"no image")
    records = [{"image": "1.png", "caption": f"red\x1b[2J tee \x9b{i}", "product_id": f"\x1b[31m{i}"} for i in range(4)]
    records += [{"image": "bad.png", "caption": "\x07blue tee", "product_id": 9}] * 2
    write_jsonl(tmp_path, train=records, val=records)
    run_files(tmp_path / "out", tmp_path, "--steps", "1", "--workers", "0")
    printed = "".join(capsys.readouterr())
    assert "cannot be read: bad.png" in printed
    assert not set(printed) & set(map(chr, [*range(9), *range(14, 32), *range(127, 160)]))
    assert jsonl(tmp_path, "train", 32).captions[0] == "red[2J tee 0"


def test_it_trains_on_a_system_without_unix(tmp_path):
    script = (
        "import os, sys; sys.modules['resource'] = None; del os.setsid, os.link, os.sysconf\n"
        f"import train; train.main({[*FAST, '--steps', '2', '--val-every', '1', '--workers', '1', '--out', str(tmp_path)]!r})"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert lines(tmp_path)[-1]["peak_memory_mib"] is None


def test_a_loader_process_that_dies_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Synthetic, "__getitem__", lambda self, row: os._exit(3))
    with pytest.raises(DataError, match=r"data loading process.*--workers"):
        run(tmp_path, "--steps", "2", "--workers", "1")
