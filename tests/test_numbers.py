"""Numbers stay finite on the worst data that is legal, and the same seed gives the same numbers.

`STEPS=2000 python -m pytest tests/test_numbers.py` trains so long."""

import os
import zlib

import pytest
import torch
from PIL import Image
from small import checkpoint, run, run_files, same_state, write_jsonl
from torch.utils._python_dispatch import TorchDispatchMode

from model import VisionLanguageModel

STEPS = os.environ.get("STEPS", "6")
EXTREME = {
    "syncmask": "--mlm-ratio 1 --mim-ratio 1 --word-pool 1 --mask-hint 0 --margin 2",
    "softmask": "--focal-gamma 0.01 --distort 1 --alpha 1 --fusion-layers 2",
    "fashionfine": "--focal-gamma 8 --local-tokens --mlm-ratio 0.9",
    "albef": "--queue 64 --negatives hard --alpha 1 --mlm-ratio 0",
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recipe", EXTREME)
def test_the_worst_data_and_extreme_flags_stay_finite(tmp_path, recipe, precision):
    """White photos, all alike; two products; a word, five hundred words, and the same words again."""
    Image.new("RGB", (32, 32), "white").save(tmp_path / "white.png")
    captions = ["tee", "tee", "red " * 500, " ".join(f"w{i}" for i in range(500)), "tee", "?!", "tee tee", "été 服"]
    records = [{"image": "white.png", "caption": text, "product_id": i % 2} for i, text in enumerate(captions)]
    write_jsonl(tmp_path, train=records, val=records)
    flags = f"--recipe {recipe} {EXTREME[recipe]} --crop-scale 0.01 --lr 0.003 --dropout 0.5 --workers 0"
    out = tmp_path / "out"
    final = run_files(out, tmp_path, *flags.split(), "--steps", STEPS, "--precision", precision)
    assert final["step"] == int(STEPS)
    assert all(weight.isfinite().all() for weight in checkpoint(out)["model"].values())


class Trace(TorchDispatchMode):
    """Every operation, with a checksum of what it gave, and whether that is in float64."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in (result if isinstance(result, list | tuple) else [result]) if isinstance(x, torch.Tensor)]
        if "empty" not in str(function):
            values = [x.detach().float().numpy().tobytes() for x in tensors if x.numel()]
            double = any(x.dtype == torch.float64 and x.ndim for x in tensors)
            self.done.append((str(function), zlib.crc32(b"".join(values)), double))
        return result


def traced(out, monkeypatch, *flags):
    """All operations of the losses of a run's steps."""
    trace = Trace()

    def watched(self, *args, forward=VisionLanguageModel.forward):
        with trace:
            return forward(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(VisionLanguageModel, "forward", watched)
        run(out, "--steps", "9", *flags, stop_at=2)
    return trace.done


def first_difference(one, two):
    """Number and name of the first operation that two traces disagree on."""
    pairs = enumerate(zip(one, two, strict=False))
    return next(((number, a[0]) for number, (a, b) in pairs if a != b), None)


@pytest.mark.parametrize("recipe", EXTREME)
def test_every_operation_of_two_runs_gives_the_same(tmp_path, recipe, monkeypatch):
    flags = ["--recipe", recipe, "--fusion-layers", "2", "--queue", "20"]
    one, two = (traced(tmp_path / name, monkeypatch, *flags) for name in "ab")
    assert len(one) > 500 and len(one) == len(two) and first_difference(one, two) is None
    assert not any(double for _, _, double in one)  # which a Mac lacks
    same_state(checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b"))


@pytest.mark.parametrize("workers", ["1", "2"])
def test_workers_change_no_tensor(tmp_path, workers):
    run(tmp_path / "none", "--steps", "9", "--prompts", stop_at=3)
    run(tmp_path / "some", "--steps", "9", "--prompts", "--workers", workers, stop_at=3)
    same_state(checkpoint(tmp_path / "none"), checkpoint(tmp_path / "some"))
