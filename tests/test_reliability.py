"""No work is lost, nothing is let in, and what is wrong is said in one line."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import h5py
import pytest
import torch
from PIL import Image
from small import FAST, checkpoint, lines, resume, run, run_files, same_state, write_fashioniq
from test_model import make_model
from torch.utils._python_dispatch import TorchDispatchMode

import train
from harness.config import parse_config
from harness.flags import ConfigError
from harness.run import NonFiniteLoss
from harness.trust import load_checkpoint
from harness.weights import WeightsError, load_pretrained
from harness.writer import whole_file, write_whole
from measures.pictures import draw_text, letters
from photos.dataset import DataError
from photos.fashiongen import FashionGen, export_fashiongen
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
        resume(out, "--keep", "3", stop_at=5)
    same_state(checkpoint(whole), checkpoint(back))
    assert lines(whole)[-1]["loss"] == lines(back)[-1]["loss"]
    steps = [load_checkpoint(back / f"last{age}.pt")["step"] for age in ("", "-2", "-3")]
    assert steps == sorted(steps, reverse=True)


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


FORGED = [
    ("step", -1), ("step", "1"), ("step", 10**9), ("seconds", float("nan")), ("unreadable", [1]), ("data", "x"),
    ("tokenizer", ""), ("tokenizer", "{}"), ("tokenizer", 3), ("config", {}), ("config.batch_size", "8"),
    ("config.batch_size", 0), ("config.lr", float("nan")), ("config.seed", -1), ("config.steps", [1]), ("config.model", 1),
    ("config.model.width", "wide"), ("config.model.width", 2**30), ("config.model.vocab_size", 7), ("config.recipe", "x"),
    ("config.data", None), ("config.out", 3), ("config.precision", 16), ("config.keep", 0),
    ("model.temp", torch.zeros(3)), ("model.temp", torch.tensor(float("inf"))), ("model.temp", "warm"),
    ("model.temp", torch.tensor(0.07).to_sparse()), ("model.temp", torch.empty((), device="meta")), ("model", {}),
    ("model", [1]), ("momentum", {"temp": torch.tensor(0.07)}), ("queue._extra_state", "many"), ("worth.sums", torch.zeros(5, 2)),
    ("worth.sums", torch.full((5, 300), torch.nan)), ("optimizer", {}), ("optimizer.state", {0: {}}), ("optimizer.state", {"x": 1}), ("optimizer.state.0.exp_avg", torch.tensor(torch.nan)),
    ("sampler", {}), ("sampler.order", torch.arange(5)), ("sampler.order", torch.zeros(42, dtype=torch.long)), ("sampler.sizes", [42]),
    ("sampler.sizes", ["x"]), ("sampler.epoch", "first"), ("sampler.pool", [1]), ("sampler.chains", [torch.tensor([10**9])]),
    ("sampler.chains", [torch.tensor([1, 1])]), ("sampler.conflicts", "few"), ("sampler.seed", None),
]  # fmt: skip


@pytest.mark.parametrize("place, value", FORGED, ids=lambda x: str(x)[:20])
def test_a_forged_checkpoint_is_refused_in_one_line(trained, tmp_path, place, value):
    state = checkpoint(trained)
    *path, name = place.split(".")
    part = state
    for key in path:
        part = part[int(key) if key.isdigit() else key]
    part[name] = value
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(ConfigError) as error:
        resume(tmp_path)
    said(error)


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


@pytest.mark.parametrize("odd", [
    torch.zeros(()), torch.zeros(0), torch.zeros(1), torch.zeros(2, 3).to_sparse(), torch.zeros(3, dtype=torch.int8),
    torch.full((48,), torch.nan), torch.zeros(1, 1, 1, 1), torch.zeros(48, dtype=torch.complex64), torch.zeros(2, 0, 48),
])  # fmt: skip
def test_odd_tensors_are_skipped_and_named(tmp_path, odd):
    names = ["cls_token", "pos_embed", "blocks.0.attn.qkv.weight", "patch_embed.proj.weight", "norm.bias"]
    texts = [f"embeddings.{name}" for name in (
        "word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight", "LayerNorm.bias")]  # fmt: skip
    for kind, given in (("vision", names), ("text", texts)):
        fine = {"vision": "blocks.0.norm1.bias", "text": "encoder.layer.0.attention.self.query.bias"}[kind]
        torch.save(dict.fromkeys(given, odd) | {fine: torch.full((48,), 0.25), 3: odd}, tmp_path / "x.pth")
        model = make_model()
        report = load_pretrained(model, **{kind: tmp_path / "x.pth"})
        assert len(report.loaded) == 1 and "loaded" in str(report)
        assert all(weight.isfinite().all() for weight in model.parameters())


def break_columns(file, kind):
    """A FashionGen file with something else where a column is meant."""
    rows, key = len(file["input_image"]), "input_category"
    if kind in ("group", "dangling", "itself", "scalar", "billion", "virtual"):
        del file[key]
    if kind == "group":
        file.create_group(key)
    elif kind == "dangling":
        file[key] = h5py.SoftLink("/nowhere")
    elif kind == "itself":
        file[key] = h5py.SoftLink(f"/{key}")
    elif kind == "scalar":
        file[key] = b"TOPS"
    elif kind == "billion":
        file.create_dataset(key, shape=(10**9, 1), dtype="S8", chunks=(10**6, 1), compression="gzip")
    elif kind == "virtual":
        layout = h5py.VirtualLayout((rows,), "S8")
        layout[:] = h5py.VirtualSource("elsewhere.h5", "x", (rows,))
        file.create_virtual_dataset(key, layout)
    elif kind == "chunks":
        del file["input_image"]
        shape = (rows, 256, 256, 3)
        file.create_dataset("input_image", shape, "uint8", chunks=(8000, 256, 256, 3), maxshape=(None, 256, 256, 3),
                            compression="gzip")  # fmt: skip
    elif kind == "prompts":
        del file["input_gender"]
        file["input_gender"] = h5py.SoftLink("/input_gender")
    elif kind == "floats":
        del file["input_productID"]
        file["input_productID"] = h5py.Empty("f4")


@pytest.mark.parametrize(
    "kind", ["group", "dangling", "itself", "scalar", "billion", "virtual", "chunks", "prompts", "floats"]
)
def test_odd_columns_of_hdf5_are_refused_in_one_line(tmp_path, kind):
    export_fashiongen(tmp_path, 8, 32)
    with h5py.File(tmp_path / FashionGen.FILES["train"], "r+") as file:
        break_columns(file, kind)
    with pytest.raises(DataError) as error:
        FashionGen(tmp_path, "train", 32)
    assert "key" in said(error) or "column" in said(error)


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


@pytest.mark.parametrize("flags", [
    ["--queue", "1000000000000"], ["--width", "1000000"], ["--width", "4096", "--vision-layers", "4096"], ["--products", "1000000000000"],
    ["--vocab-size", "100000000000"], ["--workers", "1000000"], ["--dropout", "nan"], ["--lr", "inf"], ["--seed", str(2**64)],
    ["--device", "mps"], ["--keep", "0"],
])  # fmt: skip
def test_what_no_machine_can_do_is_refused_before_anything_is_drawn(tmp_path, flags, capsys):
    start = time.perf_counter()
    with pytest.raises(SystemExit) as refused:
        train.main([*flags, "--out", str(tmp_path / "out")])
    assert "train.py: " in (str(refused.value) + capsys.readouterr().err) and "\n" not in str(refused.value)
    assert time.perf_counter() - start < 60


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


def test_interrupting_while_libraries_load_is_no_traceback():
    with subprocess.Popen([sys.executable, "train.py"], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        while not any("libtorch" in line for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines()):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.communicate()[1] and process.returncode


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
