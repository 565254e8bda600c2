"""Several processes do what one does: the same losses and the same parameters from the same batches.

This file is also what the test starts under torchrun: `python tests/test_ranks.py OUT` trains every recipe a few
steps with draws that depend on the rows alone, since each process draws its own.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from engine.ranks import Ranks  # noqa: E402
from small import FAST, OF_FILES, lines, resume  # noqa: E402

import data  # noqa: E402
import finetune  # noqa: E402
import masking  # noqa: E402
import train  # noqa: E402
from engine import config as run_config  # noqa: E402
from engine.checkpoints import load_checkpoint  # noqa: E402
from engine.config import parse_config  # noqa: E402
from evaluation import truth  # noqa: E402
from sampler import GroupedBatchSampler  # noqa: E402

# nine photos a batch on two ranks: four and five; fourteen steps: the third epoch is grouped by all ranks' features
SHARED = "--fusion-layers 2 --batch-size 9 --val-products 4 --itm-warmup 0 --itm-share 1 --alpha 0.4 --queue 24"
SHARED += " --seed 1 --dropout 0 --negatives semihard --steps 14 --log-every 1 --lr 1e-3 --val-every 100"
FLAGS = [*FAST, *SHARED.split()]
SYNCED = "--mask-hint 0 --word-pool 0 --mask-source clean"  # gains are over another photo of a process's own share
OWN = {"syncmask": SYNCED.split(), "softmask": [], "fashionfine": [], "albef": []}


def every_third(words, ratio, generator=None):
    """In place of random words: every third place."""
    return (words > 0) & (torch.arange(words.shape[1], device=words.device) % 3 == 1)


def first_patches(rows, patches, ratio, generator=None, device=None):
    """In place of random patches: the first half."""
    return (torch.arange(patches, device=device) < round(ratio * patches)).expand(rows, -1)


def hide(ids, mask, mask_id, *_):
    """In place of 80/10/10: all are hidden."""
    return ids.masked_fill(mask, mask_id), ids.masked_fill(~mask, -100)


def hide_and_replace(ids, words, mask, mask_id, *_):
    """In place of random replacements: the word after a hidden one becomes its neighbour."""
    replaced = (words > 0) & ~mask & mask.roll(1, dims=1)
    return (*hide(torch.where(replaced, ids.roll(1, dims=1), ids), mask, mask_id), replaced)


def first_of(weights, *_args, **_more):
    """In place of a draw: the first that is possible."""
    return (weights > 0).float().argmax(dim=1, keepdim=True)


def known_gains(momentum, batch, *rest, read=masking.masked_attention, **more):
    """In place of log-probabilities by another photo of the own share: some that a word always has."""
    attentions, answers = read(momentum, batch, *rest, **more)
    known = batch["token_ids"] % 7 / 7 * (batch["words"] > 0)
    return attentions, answers if answers is None else torch.stack([known / 2, -known / 2])


def coarse(scores, *_):
    """In place of noise that unties: of equal scores the last is the highest."""
    return (256 * scores).round() + torch.arange(scores.shape[1], device=scores.device) / 1000


def coarse_collect(sampler, indices, *feats, collect=GroupedBatchSampler.collect):
    """In place of what the sampler remembers: the same to a sixteenth."""
    collect(sampler, indices, *((16 * feat).round() / 16 for feat in feats))


def fixed_draws():
    """Nothing that a step does depends on a generator, so that sharing it out changes nothing."""
    fixed = {
        "random_word_mask": every_third,
        "random_patch_mask": first_patches,
        "corrupt_words": hide,
        "masked_attention": known_gains,
        "replace_words": hide_and_replace,
        "augment": lambda images, *_: data.normalise(images),
    }
    users = [(module, name) for module in list(sys.modules.values()) for name in fixed if name in vars(module)]
    return [mock.patch.object(module, name, fixed[name]) for module, name in users if module.__name__ != __name__] + [
        mock.patch.object(torch, "multinomial", first_of),
        # coarse scores and features: rounding must not decide between two words or photos that are as good as equal
        mock.patch.object(masking, "break_ties", coarse),
        mock.patch.object(GroupedBatchSampler, "collect", coarse_collect),
        mock.patch.dict(run_config.SCHEDULES["tiny"], mask_warmup=0),
        mock.patch.object(data, "VAL_PRODUCTS", 12),
        mock.patch.object(truth, "CHOICE_PRODUCTS", 4),
    ]


def trained(out, recipe, *more):
    config, given = parse_config([*FLAGS, *OWN[recipe], "--recipe", recipe, "--out", f"{out}/{recipe}", *more])
    return train.train(config, given)


def main(out):
    with contextlib.ExitStack() as stack:
        for patch in fixed_draws():
            stack.enter_context(patch)
        for recipe in OWN:
            trained(out, recipe)


def torchrun(*command):
    """Two processes, started where nothing says that torchrun is there already."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command]
    alone = {k: v for k, v in os.environ.items() if k != "TORCHELASTIC_RUN_ID"} | {"OMP_NUM_THREADS": "1"}
    kept = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([str(part) for part in command], cwd=ROOT, env=alone, **kept)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    process = torchrun(__file__, two)
    said, error = process.communicate()
    assert process.returncode == 0, error[-3000:]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of the two has
    main(one)
    torch.set_num_threads(threads)
    return one, two, said


@pytest.mark.parametrize("recipe", OWN)
def test_two_processes_train_as_one(both, recipe):
    one, two, said = both
    assert said.count("done at step 14") == len(OWN) and "on cpu, 2 processes" in said
    assert {path.name for path in (one / recipe).iterdir()} == {path.name for path in (two / recipe).iterdir()}
    for mine, theirs in zip(lines(one / recipe), lines(two / recipe), strict=True):
        for key in set(mine) - {"samples_per_second", "seconds", "peak_memory_mib"}:
            assert mine[key] == pytest.approx(theirs[key], abs=1e-5, rel=1e-5), (key, mine["step"])
    mine, theirs = (load_checkpoint(out / recipe / "last.pt") for out in (one, two))
    for part in ("model", "momentum", "queue"):
        for name, tensor in mine[part].items():
            if name.endswith("key.bias"):
                continue  # the softmax takes it away: its gradient is rounding, which AdamW makes large
            torch.testing.assert_close(
                tensor, theirs[part][name], atol=1e-5, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert torch.equal(mine["sampler"]["order"], theirs["sampler"]["order"])


def test_another_number_of_processes_goes_on_after_a_signal(tmp_path):
    flags = ["--precision", "bf16", "--steps", "500", "--workers", "1"]
    run = torchrun("train.py", *FLAGS, *flags, "--out", tmp_path)
    while run.poll() is None and not (tmp_path / "metrics.jsonl").is_file():
        time.sleep(0.2)
    time.sleep(1)
    run.send_signal(signal.SIGINT)
    said, error = run.communicate(timeout=60)
    assert said.count("stopped at step") == 1 and "(SIGINT)" in said, error[-3000:]
    reached = load_checkpoint(tmp_path / "last.pt")["step"]
    assert resume(tmp_path, stop_at=reached + 2) is None
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == [*range(1, reached + 3)]


def test_a_share_that_cannot_be_read_is_passed_over_by_all(tmp_path):
    """The photos of one product cannot be read: a batch of two can be one process's share and no more."""
    folder = tmp_path / "photos"
    folder.mkdir()
    colours = "red", "blue", "green", "pink"
    rows = [{"image": f"{i}.png", "caption": f"a {colours[i % 4]} dress", "product_id": i} for i in range(10)]
    for split, part in (("train", rows[:8]), ("val", rows[8:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    for i in range(10):
        Image.new("RGB", (40, 40), (25 * i, 90, 200)).save(folder / f"{i}.png")
    for i in range(3):
        (folder / f"{i}.png").write_bytes(b"no photo")
    flags = [*OF_FILES, *SHARED.split(), "--data", "jsonl", "--root", folder, "--preset", "tiny", "--batch-size", "2"]
    process = torchrun("train.py", *flags, "--out", tmp_path / "run")
    said, error = process.communicate()
    assert process.returncode == 0, error[-3000:]
    assert said.count("left out: ") == 3 and lines(tmp_path / "run")[-1]["final"]


OTHERS = "training photos or vocabularies differ from process to process"


@pytest.mark.parametrize(("differ", "said"), [(1, OTHERS), (0, "--batch-size 2: too few photos for 3 processes")])
def test_other_flags_on_a_rank_and_too_few_photos_for_all_are_refused(tmp_path, monkeypatch, differ, said):
    """One of three processes, without the others: what the first one says is this one's own, or something else."""
    monkeypatch.setattr(Ranks, "join", lambda device: Ranks(count=3, rows=[0, 0, 0]))
    monkeypatch.setattr(Ranks, "first_says", lambda ranks, number: number + differ)
    monkeypatch.setattr(Ranks, "on_any", lambda ranks, flag: flag)
    with pytest.raises(SystemExit, match=f"^train.py: {said}.*$"):
        train.main([*FLAGS, "--batch-size", "2", "--out", str(tmp_path)])


def test_fine_tuning_is_for_one_process(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "here")
    with pytest.raises(SystemExit, match="one process"):
        finetune.main(["--task", "retrieval", "--checkpoint", "last.pt"])


if __name__ == "__main__":
    main(sys.argv[1])
