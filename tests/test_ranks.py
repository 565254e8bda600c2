"""Training in several processes under torchrun: gradients are averaged, and a run continues in fewer processes.

The test starts this file under torchrun, too: `python tests/test_ranks.py OUT` saves the gradients of a step of every
recipe.
"""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from small import FAST, FAST_FOR, OF_FILES, batch_of, built, lines, resume  # noqa: E402

import finetune  # noqa: E402
import train  # noqa: E402
from engine.batches import augmented  # noqa: E402
from engine.checkpoints import load_checkpoint  # noqa: E402
from engine.distributed import gather, join_processes, rank  # noqa: E402
from engine.flags import ConfigError  # noqa: E402
from engine.run import build_sampler  # noqa: E402

SETTINGS = "--batch-size 8 --val-products 4 --alpha 0.4 --queue-size 24 --negatives semihard --log-every 1"
FLAGS = SETTINGS.split()
SHARE = 4  # images of a batch in each process


def gradients(recipe, number):
    """Compute the gradients of a step on the images of process `number`."""
    state, dataset = built("--recipe", recipe, *FAST_FOR[recipe], *FLAGS)
    state.step = 5  # soft targets are ramped up
    state.seed_step()
    model = DistributedDataParallel(state.model, static_graph=True) if dist.is_initialized() else state.model
    rows = range(number * SHARE * 3, (number + 1) * SHARE * 3, 3)
    losses, _ = model(train.RECIPES[recipe], state, augmented(state, batch_of(state, dataset, rows)))
    sum(losses.values()).backward()
    return {name: p.grad.clone() for name, p in state.model.named_parameters() if p.grad is not None}


def gradients_alone(recipe):
    """Compute the mean of the gradients of both shares, one after the other in this process."""
    sent = {0: [], 1: []}  # number of a process -> the tensors that it gives the other one, in order

    def record(x, number):
        sent[number].append(x)
        return torch.cat([x, x])

    def replay(x, number):
        (call,) = [i for i, sent_tensor in enumerate(sent[number]) if torch.equal(sent_tensor, x)][:1]
        return torch.cat([sent[0][call], sent[1][call]])

    for stand_in in (record, replay):
        by_share = []
        for number in (0, 1):
            same_rank = mock.Mock(return_value=number)
            with (
                mock.patch("engine.run.rank", same_rank),
                mock.patch("train.rank", same_rank),
                mock.patch("train.gather", partial(stand_in, number=number)),
            ):
                by_share.append(gradients(recipe, number))
    return {name: (by_share[0][name] + by_share[1][name]) / 2 for name in by_share[0]}


def torchrun(*command):
    """Start two processes, without the environment variable by which they would join another torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command]
    environment = {k: v for k, v in os.environ.items() if k != "TORCHELASTIC_RUN_ID"} | {"OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([str(part) for part in command], cwd=ROOT, env=environment, **pipes)


def test_averaged_gradients_are_the_mean_over_the_shares(tmp_path):
    process = torchrun(__file__, tmp_path)
    _, error = process.communicate()
    assert process.returncode == 0, error[-3000:]
    for recipe in train.RECIPES:
        alone = gradients_alone(recipe)
        for number in (0, 1):
            averaged = torch.load(tmp_path / f"{recipe}-{number}.pt")
            assert averaged.keys() == alone.keys()
            for name, gradient in alone.items():
                torch.testing.assert_close(averaged[name], gradient, atol=1e-5, rtol=1e-4, msg=f"{recipe} {name}")


def test_another_number_of_processes_continues_after_a_signal(tmp_path):
    flags = ["--steps", "500", "--workers", "1", "--val-every", "4"]
    run = torchrun("train.py", *FAST, *FLAGS, *flags, "--out", tmp_path)
    while run.poll() is None and not (tmp_path / "last.pt").is_file():
        time.sleep(0.2)
    run.send_signal(signal.SIGINT)
    printed, error = run.communicate(timeout=60)
    assert printed.count("stopped at step") == 1 and "(SIGINT)" in printed and "2 processes" in printed, error[-3000:]
    step = load_checkpoint(tmp_path / "last.pt")["step"]
    assert resume(tmp_path, stop_at=step + 2) is None
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == [*range(1, step + 3)]


def test_images_that_cannot_be_read_are_replaced_in_every_share(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rows = [{"image": f"{i}.png", "caption": f"a dress of style {i}", "product_id": i} for i in range(14)]
    for split, part in (("train", rows[:12]), ("val", rows[12:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    for i in range(14):
        Image.new("RGB", (40, 40), (15 * i, 90, 200)).save(folder / f"{i}.png")
    for i in range(2):
        (folder / f"{i}.png").write_bytes(b"no image")
    flags = ["--data", "jsonl", "--root", folder, "--preset", "tiny", "--steps", "6", "--batch-size", "6"]
    process = torchrun("train.py", *OF_FILES, *FLAGS, *flags, "--out", tmp_path / "run")
    printed, error = process.communicate()
    assert process.returncode == 0, error[-3000:]
    assert 1 <= printed.count("cannot be read: ") <= 2 and lines(tmp_path / "run")[-1]["final"]


def test_batches_that_processes_cannot_share_evenly_are_refused(monkeypatch):
    monkeypatch.setattr("engine.run.world_size", lambda: 3)
    state, dataset = built("--batch-size 8")
    with pytest.raises(ConfigError, match="--batch-size 8: 3 processes cannot share it evenly"):
        build_sampler(state, dataset)
    state, dataset = built("--batch-size 9", products=8)
    assert len(build_sampler(state, dataset)) == state.epoch_steps
    with pytest.raises(ConfigError, match="1 images are too few for 3 processes"):
        build_sampler(state, dataset.subset([0]))


def test_fine_tuning_is_for_one_process(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "here")
    with pytest.raises(SystemExit, match="one process"):
        finetune.main(["--task", "retrieval", "--checkpoint", "last.pt"])


if __name__ == "__main__":
    join_processes("cpu")
    assert gather(torch.tensor([rank()])).tolist() == [0, 1]
    for name in train.RECIPES:
        torch.save(gradients(name, rank()), Path(sys.argv[1]) / f"{name}-{rank()}.pt")
    dist.destroy_process_group()
