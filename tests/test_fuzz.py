"""Whatever is in a file or on the command line: it is read, or refused in one line, in seconds and without gigabytes.

`FUZZ_CASES=10000 python -m pytest tests/test_fuzz.py` tries so many of each kind; the same ones every time."""

import io
import itertools
import json
import os
import resource
import signal
import typing
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from small import checkpoint, run, run_files, write_fashioniq
from test_model import make_model

from data import Collate, build_tokenizer, telling_pieces
from harness.config import TrainConfig, parse_config
from harness.flags import ConfigError, flag_of
from harness.trust import load_checkpoint
from harness.weights import WeightsError, load_pretrained
from model import ModelConfig
from photos.dataset import DataError
from photos.fashiongen import FashionGen, export_fashiongen
from photos.fashioniq import fashioniq
from photos.files import open_photo
from photos.jsonl import Jsonl

CASES = int(os.environ.get("FUZZ_CASES", 20))
REFUSALS = ConfigError, DataError, WeightsError
fuzzed = settings(max_examples=CASES, suppress_health_check=list(HealthCheck))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda x: st.lists(x, max_size=3),
    max_leaves=4,
)


class seconds:
    """At most so many for a case; what one case leaves in memory stays under 4 GiB."""

    def __init__(self, limit):
        self.limit = limit

    def __enter__(self):
        signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"took more than {self.limit} seconds"))
        signal.alarm(self.limit)

    def __exit__(self, *_):
        signal.alarm(0)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2**20


def read_or_refused(read, *more):
    """What is read, None where it is refused in one line."""
    with seconds(20):
        try:
            return read()
        except (*REFUSALS, *more) as error:
            assert str(error) and "\n" not in str(error).strip()
            return None


def damage(data, whole: bytes) -> bytes:
    """Some bits flipped, the end cut off."""
    broken = bytearray(whole)
    for _ in range(data.draw(st.integers(0, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        del broken[data.draw(st.integers(0, len(broken) - 1)) :]
    return bytes(broken)


SWITCHES = [spec for kind in (TrainConfig, ModelConfig) for spec in fields(kind) if spec.metadata.get("help")]
OWNER = {spec.name: kind for kind in (ModelConfig, TrainConfig) for spec in fields(kind)}
VALUES = st.sampled_from(
    ["0", "1", "2", "3", "0.5", "-1", "64", "1e9", "nan", "inf", "", "x", "9" * 30, "../x", "\x1b[2J", "ä"]
)


def given_flag(spec, data):
    """A flag with a value, mostly of its type."""
    hint = typing.get_type_hints(OWNER[spec.name])[spec.name]
    if hint is bool:
        return [data.draw(st.sampled_from([flag_of(spec.name), "--no-" + flag_of(spec.name)[2:]]))]
    choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    return [flag_of(spec.name), data.draw(st.sampled_from(choices) | VALUES if choices else VALUES)]


@fuzzed
@given(st.data())
def test_flags_are_taken_or_refused_in_one_line(data):
    pair = data.draw(st.lists(st.sampled_from(SWITCHES), min_size=1, max_size=3, unique_by=lambda spec: spec.name))
    argv = list(itertools.chain.from_iterable(given_flag(spec, data) for spec in pair))
    complained = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, seconds(20):
        patch.setattr("sys.stderr", complained)
        try:
            config, _ = parse_config(argv)
            assert config.model.width % config.model.heads == 0
        except (ConfigError, SystemExit) as error:
            assert "\n" not in (complained.getvalue().strip() or str(error)), argv


# slow, or of the test itself
NOT_TRIED = {"out", "resume", "stop_at", "device", "compile", "workers", "steps", "epochs"}
TRIED = [spec for spec in SWITCHES if spec.name not in NOT_TRIED]


@settings(fuzzed, max_examples=max(6, CASES // 50))
@given(st.data())
def test_pairs_of_flags_run_a_step_or_are_refused(tmp_path_factory, data):
    pair = data.draw(st.lists(st.sampled_from(TRIED), min_size=2, max_size=2, unique_by=lambda spec: spec.name))
    argv = list(itertools.chain.from_iterable(given_flag(spec, data) for spec in pair))
    out = tmp_path_factory.mktemp("pair")
    with pytest.MonkeyPatch.context() as patch, seconds(60):
        patch.setattr("sys.stderr", io.StringIO())
        try:
            run(out / "run", "--steps", "9", *argv, stop_at=1)
            assert checkpoint(out / "run")["step"] == 1, argv
        except (*REFUSALS, OSError, SystemExit) as error:
            assert "\n" not in str(error), argv


@fuzzed
@given(st.lists(st.text(max_size=60), min_size=1, max_size=8), st.integers(6, 200), st.integers(3, 20))
def test_any_caption_makes_a_batch(captions, size, length):
    tokenizer = read_or_refused(lambda: build_tokenizer(captions, size, length))
    if tokenizer is None:
        return
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    items = [{"row": 0, "image": image, "text": ("", text), "product_id": 0, "caption_id": 0} for text in captions]
    batch = Collate(tokenizer, telling_pieces(tokenizer, captions))(items)
    assert batch["token_ids"].shape == batch["words"].shape and batch["token_ids"].shape[1] <= max(length, 8)
    assert (batch["token_ids"] < tokenizer.get_vocab_size()).all()


@fuzzed
@given(st.data())
def test_json_lines(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "lines"
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(folder / "1.png")
    good = {"image": "1.png", "caption": "red tee", "product_id": 1}
    lines = []
    for number in range(data.draw(st.integers(1, 4))):
        record = good | {"product_id": number}
        for key in data.draw(
            st.lists(st.sampled_from(["image", "caption", "product_id", "category", "season"]), max_size=2)
        ):
            record[key] = data.draw(json_values)
        lines.append(json.dumps(record))
    raw = damage(data, "\n".join(lines).encode()) if data.draw(st.booleans()) else "\n".join(lines).encode()
    (folder / "train.jsonl").write_bytes(raw)
    dataset = read_or_refused(lambda: Jsonl(folder, "train", 8))
    if dataset:
        assert len(dataset) and all(dataset.text(row)[1].strip() for row in range(len(dataset)))
        dataset.prompts = True
        dataset.text(0), dataset.report(), dataset.fingerprint()


FORMATS = "JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"


def encoded(kind):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 20, 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


@fuzzed
@given(st.data(), st.sampled_from(FORMATS))
def test_damaged_photos(tmp_path_factory, data, kind):
    path = tmp_path_factory.getbasetemp() / "photo"
    path.write_bytes(damage(data, encoded(kind)))
    photo = read_or_refused(lambda: open_photo(path, 16), OSError)
    assert photo is None or photo.mode == "RGB"


@pytest.fixture(scope="module")
def fashiongen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fashiongen")
    export_fashiongen(folder, 8, 8)
    return folder


@fuzzed
@given(st.data())
def test_damaged_hdf5(fashiongen, data):
    """In a child, which a fault in HDF5's library would end, and not the tests."""
    path = fashiongen / FashionGen.FILES["val"]
    path.write_bytes(damage(data, (fashiongen / FashionGen.FILES["train"]).read_bytes()))
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        return
    try:
        dataset = read_or_refused(lambda: FashionGen(fashiongen, "val", 8))
        [dataset[row] for row in range(len(dataset) if dataset else 0)]
        os._exit(0)
    finally:
        os._exit(99)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint's bytes."""
    folder = tmp_path_factory.mktemp("whole")
    Image.new("RGB", (32, 32)).save(folder / "1.png")
    records = [{"image": "1.png", "caption": f"tee {i}", "product_id": i} for i in range(12)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    run_files(folder / "out", folder, "--steps", "2", "--workers", "0", stop_at=1)
    return (folder / "out" / "last.pt").read_bytes()


@fuzzed
@given(st.data())
def test_damaged_checkpoints(tmp_path_factory, whole, data):
    path = tmp_path_factory.getbasetemp() / "last.pt"
    path.write_bytes(damage(data, whole))
    state = read_or_refused(lambda: load_checkpoint(path))
    if state:
        mine = torch.load(io.BytesIO(whole), weights_only=True)["model"]
        assert all(torch.equal(state["model"][name], weight) for name, weight in mine.items())


ODD = st.sampled_from(
    [torch.zeros(()), torch.zeros(0, 48), torch.ones(3, dtype=torch.int32), torch.full((48,), torch.inf), "x", 3, None]
)


@fuzzed
@given(st.data())
def test_forged_weights(tmp_path_factory, data):
    path, model = tmp_path_factory.getbasetemp() / "x.pth", make_model()
    names = ["cls_token", "pos_embed", "blocks.0.attn.qkv.weight", "blocks.9.norm1.bias", "visual_encoder.pos_embed", "temp",
             "embeddings.token_type_embeddings.weight", "embeddings.position_embeddings.weight", "module.bert.x", 3]  # fmt: skip
    shapes = st.lists(st.integers(0, 50), max_size=4).map(lambda shape: torch.full(shape, 0.5))
    state = data.draw(st.dictionaries(st.sampled_from(names), ODD | shapes, max_size=5))
    torch.save(state if data.draw(st.booleans()) else {"model": state}, path)
    if data.draw(st.booleans()):
        path.write_bytes(damage(data, path.read_bytes()))
    read_or_refused(lambda: str(load_pretrained(model, [path])))
    assert all(weight.isfinite().all() for weight in model.parameters())


@fuzzed
@given(st.binary(max_size=80) | st.lists(st.sampled_from(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b", "", "\r", "ß"]))
       .map(lambda words: "\n".join(words).encode()))  # fmt: skip
def test_vocabularies(tmp_path_factory, raw):
    path = tmp_path_factory.getbasetemp() / "vocab.txt"
    path.write_bytes(raw)
    tokenizer = read_or_refused(lambda: build_tokenizer([], 9, 8, path))
    assert tokenizer is None or tokenizer.encode("a b").ids


@fuzzed
@given(st.data())
def test_fashioniq_files(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "iq"
    write_fashioniq(
        folder, "val", dict.fromkeys(("dress", "shirt", "toptee"), (2, 4, 3)), lambda _: Image.new("L", (4, 4))
    )
    path = folder / data.draw(st.sampled_from(["captions/cap.dress.val.json", "image_splits/split.shirt.val.json"]))
    values = json.loads(path.read_text())
    place = data.draw(st.integers(0, len(values) - 1))
    if isinstance(values[place], dict) and data.draw(st.booleans()):
        values[place][data.draw(st.sampled_from(["candidate", "target", "captions", "more"]))] = data.draw(json_values)
    else:
        values[place] = data.draw(json_values)
    raw = json.dumps(values).encode()
    path.write_bytes(damage(data, raw) if data.draw(st.booleans()) else raw)
    triplets = read_or_refused(lambda: fashioniq(folder, "val", 8))
    assert triplets is None or triplets.report()
