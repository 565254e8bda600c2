"""Random files and flags are read, or refused in one line, within seconds.

`FUZZ_CASES=10000 python -m pytest tests/test_fuzz.py` tries so many of each kind; the same ones every time."""

import io
import json
import os
import signal
import typing
from dataclasses import fields

import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet
from small import checkpoint, run

from data import Collate, build_tokenizer, informative_pieces, main
from engine.checkpoints import CHECKPOINT_KEYS, load_checkpoint
from engine.config import TrainConfig, parse_config
from engine.flags import ConfigError, flag_of
from model import ModelConfig
from readers.dataset import DataError
from readers.files import FORMATS, open_image
from readers.jsonl import jsonl

CASES = int(os.environ.get("FUZZ_CASES", 20))
fuzzed = settings(max_examples=CASES, suppress_health_check=list(HealthCheck))


def read_or_refused(read, seconds=20):
    """Call `read`. -> its result, None where it is refused in one line"""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"took more than {seconds} seconds"))
    signal.alarm(seconds)
    stderr = io.StringIO()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stderr", stderr)
            return read()
    except (ConfigError, DataError, OSError, SystemExit) as error:
        message = stderr.getvalue().strip() or str(error).strip()
        assert message and "\n" not in message
    finally:
        signal.alarm(0)


def damage(data, whole: bytes) -> bytes:
    """Flip some bits, and cut off the end."""
    broken = bytearray(whole)
    for _ in range(data.draw(st.integers(0, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        del broken[data.draw(st.integers(0, len(broken) - 1)) :]
    return bytes(broken)


FLAG_FIELDS = [
    (kind, spec) for kind in (TrainConfig, ModelConfig) for spec in fields(kind) if spec.metadata.get("help")
]
SLOW = {"out", "resume", "device", "compile", "workers", "steps", "epochs"}  # or set by the test
VALUES = st.sampled_from(
    ["0", "1", "3", "0.5", "-1", "64", "1e9", "nan", "inf", "", "x", "9" * 30, "../x", "\x1b[2J", "ä"]
)


def some_flags(data, count, left_out=()):
    """Draw some flags with values, mostly of their types."""
    argv, names = [], set(left_out)
    while len(names) < count + len(left_out):
        kind, spec = data.draw(st.sampled_from(FLAG_FIELDS))
        if spec.name in names:
            continue
        names.add(spec.name)
        hint, flag = typing.get_type_hints(kind)[spec.name], flag_of(spec.name)
        choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
        if hint is bool:
            argv.append(data.draw(st.sampled_from([flag, "--no-" + flag[2:]])))
        else:
            argv += [flag, data.draw(st.sampled_from(choices) | VALUES if choices else VALUES)]
    return argv


@fuzzed
@given(st.data(), st.integers(1, 3))
def test_flags_are_accepted_or_refused_in_one_line(data, count):
    argv = some_flags(data, count)
    parsed = read_or_refused(lambda: parse_config(argv))
    assert parsed is None or parsed[0].model.width % parsed[0].model.heads == 0, argv


@settings(fuzzed, max_examples=max(6, CASES // 50))
@given(st.data())
def test_pairs_of_flags_run_a_step_or_are_refused(tmp_path_factory, data):
    out, argv = tmp_path_factory.mktemp("pair") / "run", some_flags(data, 2, left_out=SLOW)
    if read_or_refused(lambda: run(out, "--steps", "9", *argv, stop_at=1) or True, seconds=60):
        assert checkpoint(out)["step"] == 1, argv


@fuzzed
@given(st.lists(st.text(max_size=60), min_size=1, max_size=8), st.integers(6, 200), st.integers(3, 20))
def test_any_caption_makes_a_batch(captions, size, length):
    tokenizer = read_or_refused(lambda: build_tokenizer(captions, size, length))
    if tokenizer is None:
        return
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    items = [{"row": 0, "image": image, "text": ("", text), "product_id": 0, "caption_id": 0} for text in captions]
    batch = Collate(tokenizer, informative_pieces(tokenizer, captions))(items)
    assert batch["token_ids"].shape == batch["maskable"].shape and batch["token_ids"].shape[1] <= max(length, 8)
    assert (batch["token_ids"] < tokenizer.get_vocab_size()).all()


@fuzzed
@given(st.data())
def test_json_lines(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "lines"
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(folder / "1.png")
    value = (
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.lists(st.text(), max_size=3)
    )
    keys = st.sampled_from(["image", "caption", "product_id", "category", "season"])
    changes = data.draw(st.lists(st.dictionaries(keys, value, max_size=2), min_size=1, max_size=4))
    lines = [
        json.dumps({"image": "1.png", "caption": "red tee", "product_id": i} | change)
        for i, change in enumerate(changes)
    ]
    (folder / "train.jsonl").write_bytes(damage(data, "\n".join(lines).encode()))
    dataset = read_or_refused(lambda: jsonl(folder, "train", 8))
    if dataset:
        assert len(dataset) and all(dataset.text(row)[1].strip() for row in range(len(dataset)))
        dataset.prompts = True
        dataset.text(0), dataset.report(), dataset.fingerprint()


@fuzzed
@given(st.data(), st.sampled_from(FORMATS))
def test_damaged_images(tmp_path_factory, data, kind):
    whole, path = io.BytesIO(), tmp_path_factory.getbasetemp() / "image"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 20, 3), np.uint8)).save(whole, kind)
    path.write_bytes(damage(data, whole.getvalue()))
    image = read_or_refused(lambda: open_image(path, 16))
    assert image is None or image.mode == "RGB"


@fuzzed
@given(st.data())
def test_damaged_checkpoints(tmp_path_factory, data):
    whole, path = io.BytesIO(), tmp_path_factory.getbasetemp() / "last.pt"
    weights = torch.arange(600.0)
    torch.save(dict.fromkeys(CHECKPOINT_KEYS) | {"model": {"weights": weights}}, whole)
    path.write_bytes(damage(data, whole.getvalue()))
    state = read_or_refused(lambda: load_checkpoint(path))
    assert state is None or torch.equal(state["model"]["weights"], weights)


TEMPLATES = st.lists(
    st.sampled_from(["{a}", "{b}", "{c:~b.}", "{a:.3}", "{", "}", "*", "/", "..", "x", "{b:", "~(}"]), max_size=4
)
TABLE = '[{"a": "1.png", "b": "red"}, {"a": ["2.png", "1.png"], "b": "blue", "c": 3.0}]'


@fuzzed
@given(data=st.data(), kind=st.sampled_from(["csv", "json", "parquet"]))
def test_damaged_tables_and_templates(data, kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    for name in ("1.png", "2.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    path = folder / f"table.{kind}"
    if kind == "parquet":
        parquet.write_table(pyarrow.table({"a": ["1.png", "2.png"], "b": ["red", None], "c": [1.5, 2.0]}), path)
    else:
        path.write_text(TABLE if kind == "json" else 'a;b;c\r\n1.png;"red";1\r\n2.png;Été;\r\n')
    path.write_bytes(damage(data, path.read_bytes()))
    template = TEMPLATES.map("".join)
    image, caption = data.draw(st.just("{a}") | template), data.draw(st.just("{b}") | template)
    flags = ["convert", f"--{kind}", str(path), f"--image={image}", f"--caption={caption}"]
    read_or_refused(lambda: main([*flags, "--out", str(folder / "out")]))
