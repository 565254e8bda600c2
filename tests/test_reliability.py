"""No work is lost, nothing is let in, and what is wrong is said in one line.

`KILLS=200 python -m pytest tests/test_reliability.py -k killed` kills that often."""

import json
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
from PIL import Image
from small import FAST, checkpoint, lines, resume, run, run_files, same_state, write_fashioniq
from test_model import make_model
from torch.utils._python_dispatch import TorchDispatchMode

import data
import train
from harness.config import parse_config
from harness.flags import ConfigError
from harness.run import NonFiniteLoss
from harness.trust import load_checkpoint
from harness.weights import WeightsError, load_pretrained
from harness.writer import whole_file, write_whole
from measures.pictures import draw_text, letters
from photos.dataset import DataError
from photos.fashioniq import fashioniq
from photos.jsonl import Jsonl
from photos.synthetic import Synthetic

ROOT = Path(train.__file__).parent


def said(error):
    """The message of a refusal, which is one line."""
    message = str(error.value)
    assert message and "\n" not in message and "Traceback" not in message
    return message


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of three steps, each saved."""
    out = tmp_path_factory.mktemp("trained")
    run(out, "--steps", "6", "--val-every", "1", stop_at=3)
    return out


# — what is written —


def test_the_checkpoint_before_the_last_is_kept(trained, tmp_path):
    assert (checkpoint(trained)["step"], load_checkpoint(trained / "last-2.pt")["step"]) == (3, 2)
    assert not (trained / "last-3.pt").exists()
    whole, back = tmp_path / "whole", tmp_path / "back"
    for out in (whole, back):
        shutil.copytree(trained, out)
    shutil.copy(back / "last-2.pt", back / "last.pt")
    for out in (whole, back):
        resume(out, stop_at=5)
    same_state(checkpoint(whole), checkpoint(back))
    assert lines(whole)[-1]["loss"] == lines(back)[-1]["loss"]


def test_a_run_that_has_diverged_can_go_on(trained, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    with pytest.raises(NonFiniteLoss, match="is the last good state: --resume with a lower --lr; should it fail again"):
        resume(out, "--lr", "1e30")
    if load_checkpoint(out / "last.pt")["step"] != 3:  # finite, but too far away to come back from
        shutil.copy(out / "last-2.pt", out / "last.pt")
    resume(out, "--lr", "1e-4", stop_at=5)
    assert checkpoint(out)["step"] == 5 and json.loads((out / "config.json").read_text())["lr"] == 1e-4


def test_what_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    path.write_bytes(b"whole")
    monkeypatch.setattr(
        "harness.writer.torch.save", mock.Mock(side_effect=RuntimeError("PytorchStreamWriter failed\nat"))
    )
    for fails in (mock.Mock(side_effect=OSError(28, "No space left on device")), lambda file: write_whole({}, path, 2)):
        with pytest.raises(OSError) as error, whole_file(path, keep=2) as file:
            file.write(b"half")
            fails(file)
        assert "before is whole" in said(error) and str(path) in said(error)
        assert [p.name for p in tmp_path.iterdir()] == ["last.pt"] and path.read_bytes() == b"whole"
    monkeypatch.setattr("os.link", mock.Mock(side_effect=OSError("no links here")))
    with whole_file(path, keep=2) as file:
        file.write(b"new")
    assert (path.read_bytes(), (tmp_path / "last-2.pt").read_bytes()) == (b"new", b"whole")


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


def train_quietly(flags, said):
    """A run in a process of its own, without pictures and the ground truth. The disk takes its time over a checkpoint,
    or few kills would fall into writing one."""
    data.VAL_PRODUCTS, train.truth = 12, lambda *_: {}
    train.draw_masks = train.draw_curves = lambda *_: None
    flush = os.fsync

    def slow_flush(file):
        time.sleep(0.1)
        flush(file)

    os.fsync = slow_flush
    with open(said, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    train.main(flags)


def killed_after(flags, said, seconds):
    """Start a run and kill it after so many seconds, unless it has ended. -> its exit code."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    process = processes.Process(target=train_quietly, args=(flags, said))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode


def test_a_run_that_is_killed_ends_with_the_tensors_of_one_that_is_not(tmp_path):
    flags = [*FAST, "--steps", "8", "--val-every", "1", "--out"]
    whole, said, rng = tmp_path / "whole", tmp_path / "said.log", random.Random(0)
    begun = time.monotonic()
    assert killed_after([*flags, str(whole)], said, 120) == 0
    took = time.monotonic() - begun
    kills, number = 0, 0
    while kills < KILLS:
        out = tmp_path / str(number)
        exitcode = None
        while exitcode != 0:
            going_on = ["--resume", "--out", str(out)] if (out / "last.pt").exists() else [*flags, str(out)]
            exitcode = killed_after(going_on, said, rng.uniform(0.2, 1) * took)
            assert exitcode in (0, -9), said.read_text()[-2000:]
            kills += exitcode == -9
            for path in out.glob("*.pt"):
                load_checkpoint(path)
        same_state(checkpoint(whole), checkpoint(out))
        number += 1


# — what is read —


def test_a_flipped_bit_is_noticed_or_changes_nothing(trained, tmp_path):
    whole, rng = (trained / "last.pt").read_bytes(), random.Random(0)
    path, refused = tmp_path / "last.pt", 0
    for _ in range(40):
        broken, at = bytearray(whole), rng.randrange(len(whole))
        broken[at] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        try:
            same_state(load_checkpoint(path), checkpoint(trained))
        except ConfigError as error:
            assert "damaged" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 30
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="damaged, or not a checkpoint"):
        load_checkpoint(path)


def test_pickled_code_is_never_run(tmp_path, capsys):
    class Malicious:
        def __reduce__(self):
            return print, ("ran pickled code",)

    path = tmp_path / "last.pt"
    for save in (torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))):
        save({"model": Malicious()}, path)
        with pytest.raises(ConfigError) as refused:
            load_checkpoint(path)
        with pytest.raises(WeightsError) as refused_too:
            load_pretrained(make_model(), [path])
        assert "weights_only" not in said(refused) + said(refused_too)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "odd", [torch.zeros(()), torch.zeros(2, 3).to_sparse(), torch.full((48,), torch.nan), torch.zeros(2, 0, 48)]
)
@pytest.mark.parametrize(
    ("fine", "given"),
    [
        ("blocks.0.norm1.bias", ["cls_token", "pos_embed", "blocks.0.attn.qkv.weight", "patch_embed.proj.weight"]),
        (
            "encoder.layer.0.attention.self.query.bias",
            ["embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"],
        ),
    ],
)
def test_unfit_tensors_are_skipped_and_named(tmp_path, odd, fine, given):
    torch.save(dict.fromkeys(given, odd) | {fine: torch.full((48,), 0.25)}, tmp_path / "x.pth")
    model = make_model()
    report = load_pretrained(model, [tmp_path / "x.pth"])
    assert len(report.loaded) == 1 and "loaded" in str(report)
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_a_split_without_targets_has_no_union_of_pairs(tmp_path):
    sizes = dict.fromkeys(("dress", "shirt", "toptee"), (4, 9, 6))
    for split in ("val", "test"):
        write_fashioniq(tmp_path, split, sizes, lambda number: Image.new("RGB", (8, 8)))
    galleries = {split: fashioniq(tmp_path, split, 32).galleries["dress"] for split in ("val", "test")}
    assert {name: len(rows) for name, rows in galleries["val"].items()} == {"union": 6, "original": 9}
    assert {name: len(rows) for name, rows in galleries["test"].items()} == {"original": 9}


def test_control_characters_stay_out_of_the_terminal(tmp_path, capsys):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "1.png")
    (tmp_path / "bad.png").write_bytes(b"no photo")
    records = [{"image": "1.png", "caption": f"red\x1b[2J tee \x9b{i}", "product_id": f"\x1b[31m{i}"} for i in range(4)]
    records += [{"image": "bad.png", "caption": "\x07blue tee", "product_id": 9}] * 2
    for split in ("train", "val"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, records)))
    run_files(tmp_path / "out", tmp_path, "--steps", "1", "--workers", "0")
    told = "".join(capsys.readouterr())
    assert "[31m0" in told and "left out: bad.png" in told
    assert not set(told) & set(map(chr, [*range(9), *range(14, 32), *range(127, 160)]))
    assert Jsonl(tmp_path, "train", 32).captions[0] == "red[2J tee 0"


# — what a machine has —


def test_it_trains_on_a_system_without_unix(tmp_path):
    script = (
        "import os, sys; sys.modules['fcntl'] = sys.modules['resource'] = None; del os.setsid, os.link, os.sysconf\n"
        f"import train; train.main({[*FAST, '--steps', '2', '--val-every', '1', '--workers', '1', '--out', str(tmp_path)]!r})"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "no locks" in done.stdout and lines(tmp_path)[-1]["peak_memory_mib"] is None


@pytest.mark.parametrize("recipe", ["syncmask", "softmask", "fashionfine", "albef"])
def test_no_step_computes_in_float64_which_a_mac_lacks(tmp_path, recipe, monkeypatch):
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for made in result if isinstance(result, list | tuple) else [result]:
                if isinstance(made, torch.Tensor) and made.dtype == torch.float64 and made.ndim:
                    doubles.append(str(function))
            return result

    def watched(self, batch, forward=train.Step.forward):
        with Watch():
            return forward(self, batch)

    doubles = []
    monkeypatch.setattr(train.Step, "forward", watched)
    run(tmp_path, "--recipe", recipe, "--steps", "9", "--queue", "20", "--fusion-layers", "2", stop_at=1)
    assert not doubles


# — what is said —


def test_the_bar_is_closed_before_an_error_is_printed(tmp_path, monkeypatch):
    made = []

    class Watched(train.Progress):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(train, "Progress", Watched)
    monkeypatch.setattr("harness.wiring.itm_loss", lambda logits, labels: logits.sum() * torch.nan)
    with pytest.raises(NonFiniteLoss, match="itm and grad_norm not finite"):
        run(tmp_path, "--steps", "3")
    assert made[0].bar.disable  # as it is once closed


def test_a_loader_process_that_dies_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Synthetic, "__getitem__", lambda self, row: os._exit(3))
    with pytest.raises(DataError, match=r"data loading process.*--workers"):
        run(tmp_path, "--steps", "2", "--workers", "1")


def test_masks_show_whole_words_and_say_where_a_text_is_cut(tmp_path):
    config, _ = parse_config([*FAST, "--max-length", "16"])
    dataset = Synthetic("train", 12, 32, progress=False)
    tokenizer = train.learn_vocabulary(config, dataset)
    drawn = []
    pen = mock.Mock(text=lambda corner, piece, *_: drawn.append((corner, piece)))
    text = ("", "quilted jacket qwzx " + dataset.captions[0])
    draw_text(pen, letters(14), text, tokenizer, [False] * 16, (0, 0), 90)
    assert drawn[-1][1] == "…" and len({y for (_, y), _ in drawn}) > 2
    word = [corner for corner, piece in drawn if piece in list("qwzx")]
    assert len(word) >= 4 and len({y for _, y in word[-4:]}) == 1


def test_a_photo_that_vanishes_is_named_and_counted(tmp_path, monkeypatch):
    for number in range(12):
        Image.new("RGB", (32, 32), (number * 20, 90, 90)).save(tmp_path / f"{number}.png")
    records = [{"image": f"{i}.png", "caption": f"tee of style {i}", "product_id": i} for i in range(12)]
    for split in ("train", "val"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, records)))
    monkeypatch.setattr(train, "report_cut_texts", lambda *_: (tmp_path / "3.png").unlink())  # when all are listed
    run_files(tmp_path / "out", tmp_path, "--steps", "4", "--workers", "0")
    assert lines(tmp_path / "out")[0]["unreadable"] == 1 == len(checkpoint(tmp_path / "out")["unreadable"])
