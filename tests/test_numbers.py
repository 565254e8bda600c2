"""Numbers stay finite on the worst data that is legal, and the same seed gives the same numbers.

`STEPS=2000 python -m pytest tests/test_numbers.py` trains so long."""

import os

import pytest
from PIL import Image
from small import checkpoint, run, run_files, same_state, write_jsonl

STEPS = os.environ.get("STEPS", "6")
EXTREME = {
    "syncmask": "--mlm-ratio 1 --mim-ratio 1 --score-ratio 1 --random-mask-prob 0 --margin 2",
    "softmask": "--focal-gamma 0.01 --distort 1 --alpha 1 --fusion-layers 2",
    "fashionfine": "--focal-gamma 8 --local-tokens --mlm-ratio 0.9",
    "albef": "--queue-size 64 --negatives hard --alpha 1 --mlm-ratio 0",
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


@pytest.mark.parametrize("workers", ["1", "2"])
def test_workers_change_no_tensor(tmp_path, workers):
    run(tmp_path / "none", "--steps", "9", "--prompts", stop_at=3)
    run(tmp_path / "some", "--steps", "9", "--prompts", "--workers", workers, stop_at=3)
    same_state(checkpoint(tmp_path / "none"), checkpoint(tmp_path / "some"))
