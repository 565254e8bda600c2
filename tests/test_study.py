"""The pictures are drawn, and of what they say; experiments can be stopped and gone on with."""

import dataclasses
import itertools
import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import data
import finetune
import train
from data import Collate, build_dataset, build_tokenizer, normalise
from harness.config import parse_config
from harness.flags import ConfigError
from harness.run import build_run
from masking import random_word_mask
from measures.choice import trials
from measures.pictures import INK, PAPER, draw_text
from photos.dataset import DataError
from photos.synthetic import Synthetic
from photos.wardrobe import COLOURS, NOUNS
from study import ablate, benchmark, detail_search, figures, fused, probe, sources, steps, told
from study.steps import Waits

ROOT = Path(__file__).parent.parent
SMALL = ["--image-size", "32", "--width", "32", "--heads", "2", "--vision-layers", "2", "--text-layers", "1",
         "--embed-dim", "16", "--vocab-size", "300", "--products", "12", "--batch-size", "8", "--val-products", "6",
         "--steps", "2", "--precision", "fp32"]  # fmt: skip
FILES = [flag for flag in SMALL if flag not in ("--products", "12")] + ["--data", "jsonl", "--preset", "tiny"]


def write_files(folder, category=lambda product: "odd" if product % 2 else "even"):
    """36 drawn products with all their photos as a jsonl data set, one photo damaged. -> how many photos."""
    drawn = Synthetic("train", 36, 32, progress=False)
    folder.mkdir()
    lines = []
    for row, product in enumerate(drawn.product_ids.tolist()):
        drawn.photos[row].save(folder / f"{row}.png")
        lines.append({"image": f"{row}.png", "caption": drawn.captions[row], "product_id": product})
        lines[-1] |= {"category": category(product)}
    (folder / "5.png").write_bytes((folder / "5.png").read_bytes()[:300])
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "val.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[-20:]))
    return len(drawn)


def test_contact_sheet(tmp_path):
    command = [sys.executable, "study/figures.py", "sheet", "--products", "2", "--file", str(tmp_path / "s.png")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert Image.open(tmp_path / "s.png").width > 600
    refused = subprocess.run(
        [*command, "--data", "jsonl", "--root", "/nowhere"], cwd=ROOT, capture_output=True, text=True
    )
    assert (
        refused.returncode == 1
        and refused.stderr.strip() == "figures.py: /nowhere: no such folder; say with --root where the jsonl files are"
    )


def test_masks_and_words_of_a_checkpoint(tmp_path, capsys):
    config, given = parse_config([*SMALL, "--out", str(tmp_path)])
    train.train(config, given)
    checkpoint = str(tmp_path / "last.pt")
    figures.main(["masks", "--checkpoint", checkpoint, "--file", str(tmp_path / "again.png")])
    assert np.array_equal(np.array(Image.open(tmp_path / "masks.png")), np.array(Image.open(tmp_path / "again.png")))
    figures.main(["masks", "--checkpoint", checkpoint, "--rows", "5", "--file", str(tmp_path / "one.png")])
    assert Image.open(tmp_path / "one.png").height < Image.open(tmp_path / "masks.png").height / 3
    figures.main(["words", "--checkpoint", checkpoint, "--rows", "0", "4", "--file", str(tmp_path / "words.png")])
    assert Image.open(tmp_path / "words.png").width > 600
    figures.main(["words", "--checkpoint", checkpoint, "--rows", "0", "4", "--source", "gradcam",
                  "--file", str(tmp_path / "gradcam.png")])  # fmt: skip
    words, gradcam = (np.array(Image.open(tmp_path / f"{name}.png")) for name in ("words", "gradcam"))
    assert words.shape == gradcam.shape and (words != gradcam).any()
    for flags, message in (
        (["masks"], "masks needs --checkpoint"),
        (["masks", "--checkpoint", checkpoint, "--source", "gradcam"], "--source is for words"),
        (["words", "--checkpoint", "/nowhere.pt"], "/nowhere.pt: no such checkpoint"),
        (["words", "--checkpoint", checkpoint, "--rows", "99999"], "--rows: the validation split has photos 0 to"),
    ):
        with pytest.raises(SystemExit) as caught:
            figures.main(flags)
        assert message in str(caught.value.code) + capsys.readouterr().err


def test_gradcam_reads_any_layer_but_the_last():
    config = parse_config([*SMALL, "--mask-layer", "2", "--mask-source", "attention"])[0]
    read = figures.read_from(config, "gradcam")
    assert (read.mask_source, read.mask_layer) == ("gradcam", 0) and figures.read_from(config, "hidden").mask_layer == 2
    with pytest.raises(ConfigError, match="--source gradcam needs a model with two fusion layers"):
        figures.read_from(parse_config([*SMALL, "--fusion-layers", "1"])[0], "gradcam")


def test_every_reading_of_the_attention_is_measured(tmp_path, capsys, monkeypatch):
    config, given = parse_config([*SMALL, "--fusion-layers", "2", "--out", str(tmp_path)])
    train.train(config, given)
    asked = []
    figures_of = dict.fromkeys(["word_cooccurrence", "detail_cooccurrence", "patch_cooccurrence", "pointing"], 0.75)
    figures_of |= {key + "_random": 0.5 for key in figures_of} | {"attribute_share": 0.4}
    monkeypatch.setattr(sources, "mask_truth", lambda run, dataset: asked.append(run.config) or figures_of)
    capsys.readouterr()
    sources.main(["--checkpoint", str(tmp_path / "last.pt"), "--products", "7"])
    rows = capsys.readouterr().out.splitlines()
    readings = {(c.mask_source, c.mask_layer, c.mask_heads, c.word_score, c.patch_score) for c in asked}
    assert len(readings) == len(asked) == (3 * 3 + 1 * 3 + 3 * 4) * 2 * 2  # Grad-CAM has the first layer alone
    assert "| attention | 1 | mean | max | all words | 40 | 0.50 | 0.50 | 0.50 | 1.5 |" in rows
    assert [row.split(" | ")[0] for row in rows[-4:]] == [
        "| log p(word)", "| gain over another photo", "| gain over the average photo", "| gain over no photo",
    ]  # fmt: skip
    assert asked[0].val_products == 7
    with pytest.raises(SystemExit, match="sources.py: /nowhere.pt: no such checkpoint"):
        sources.main(["--checkpoint", "/nowhere.pt"])


def test_predictions_are_those_of_the_hidden_words(tmp_path):
    """Against one pass for each of some words, with the same half of the others hidden, and photos of other products."""
    config, _ = parse_config([*SMALL, "--out", str(tmp_path)])
    dataset = build_dataset("synthetic", None, "val", 32)
    run = build_run(config, dataset, build_tokenizer(dataset.captions, 300, 64))
    batch = Collate(run.tokenizer)([dataset[row] for row in range(8)])
    half = sources.random_word_mask(batch["words"], 0.5, torch.Generator().manual_seed(5))
    scores = sources.predictions(run, batch, torch.Generator().manual_seed(5))
    images = run.momentum.encode_image(normalise(batch["images"]))
    gain = scores["gain over another photo"]
    for b, word in ((0, 2), (1, 5), (5, 1)):
        hidden = half if half[b, word] else (batch["words"] > 0) & ~half
        ids, keep = batch["token_ids"].masked_fill(hidden, run.mask_id)[b : b + 1], batch["attention_mask"][b : b + 1]
        log_p = []
        for image in images:
            fused = run.momentum.fuse(run.momentum.encode_text(ids, keep), keep, image[None])
            log_p.append(run.momentum.mlm_logits(fused[0, word]).log_softmax(-1)[batch["token_ids"][b, word]].item())
        assert log_p[b] == pytest.approx(scores["log p(word)"][b, word].item(), abs=1e-4)
        others = [log_p[b] - p for p, product in zip(log_p, batch["product_ids"]) if product != batch["product_ids"][b]]
        assert min(abs(other - gain[b, word].item()) for other in others) < 1e-4


def test_masked_words_are_blacked_out(tmp_path):
    """Black behind the masked word alone."""
    config, given = parse_config([*SMALL, "--out", str(tmp_path)])
    dataset = build_dataset("synthetic", None, "val", 32)
    run = build_run(config, dataset, build_tokenizer(dataset.captions, 300, 64))
    page = Image.new("RGB", (400, 60), PAPER)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    draw_text(pen, font, ("", "red coat"), run.tokenizer, [False, False, True, False], (0, 0), 300)
    dark = (np.array(page) == INK).all(2).sum(0)
    middle = int(font.getlength("red")) + 3
    assert dark[:middle].max() < 15 < dark[middle:].max()


def test_ablation_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    grid = {"one": ["--itm-negatives", "hard"], "two": ["--word-mask", "random"]}
    monkeypatch.setattr(ablate, "GRIDS", {"method": grid})
    flags = ["--seeds", "2", "--jobs", "2", "--out", str(tmp_path), *SMALL]
    with pytest.raises(SystemExit, match="stopped; the same command goes on"):
        ablate.main([*flags, "--stop-at", "1"])
    assert json.loads((tmp_path / "0-0" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 1
    ablate.main(flags)
    first = (tmp_path / "table.md").read_text()
    before = (tmp_path / "1-1" / "last.pt").stat().st_mtime_ns
    ablate.main(flags)
    assert (tmp_path / "table.md").read_text() == first and (tmp_path / "1-1" / "last.pt").stat().st_mtime_ns == before
    header, _, one, two = [line for line in first.splitlines() if line.startswith("|")]
    finals = [json.loads((tmp_path / f"0-{seed}" / "metrics.jsonl").read_text().splitlines()[-1]) for seed in (0, 1)]
    values = [100 * final["val_i2t_r1"] for final in finals]
    assert one.split(" | ")[1] == f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    assert two.startswith("| two | ") and header.count("|") == one.count("|")
    assert header.split(" | ")[1] == "R@1 i2t %" and first in capsys.readouterr().out
    assert f"threads a run: {max(1, ablate.os.cpu_count() // 2)};" in first
    recipes = ablate.table({"one": [final | {"category": 0.5} for final in finals]}, ablate.RECIPE_COLUMNS).splitlines()
    assert recipes[0].count("|") == len(ablate.RECIPE_COLUMNS) + 2 and " | 50.0 ± 0.0 | " in recipes[2]
    values = [final["seconds"] / 2 for final in finals]
    assert recipes[2].endswith(f"| {np.mean(values):.2f} ± {np.std(values, ddof=1):.2f} |")
    (tmp_path / "1-0" / "last.pt").write_text("something else")
    (tmp_path / "1-0" / "metrics.jsonl").unlink()
    with pytest.raises(SystemExit, match="1-0.log: status 1, train.py: .*not a checkpoint of train.py"):
        ablate.main(flags)
    (tmp_path / "0-1" / "config.json").write_text("{")
    for more, message in (
        ([], "0-1/config.json cannot be read"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--lr", "0.5"], "0-0 holds a run with other flags"),
        (["--data", "jsonl", "--root", "x"], "--products is for synthetic photos"),
    ):
        with pytest.raises(SystemExit, match=f"ablate.py: .*{message}"):
            ablate.main([*flags, *more])


def test_shares_of_the_way_by_hand():
    """From 10 to 30; a figure in which the ceiling is within the spreads of the floor has no way."""
    finals = lambda *values: [{"a": value, "b": 0.2 + value / 1000 * (-1) ** i} for i, value in enumerate(values)]
    results = {"albef": finals(5), "random": finals(9, 11), "synchronized": finals(24, 26), "true": finals(30, 30)}
    columns = [("A", lambda f: f["a"], 1), ("B", lambda f: f["b"], 1), ("C", lambda f: f["c"], 1)]
    assert ablate.shares_of_the_way(results, columns).splitlines() == [
        "| share of the way from random to true masks | A | B |", "|---|---|---|", "| synchronized | 75% | — |",
    ]  # fmt: skip
    one = {name: runs[:1] for name, runs in results.items()}
    assert ablate.shares_of_the_way(one, columns).splitlines()[2] == "| synchronized | — | — |"  # no spread is known


def test_seeds_are_compared_with_their_like():
    """What a condition gives more than random masks on the same photos, by hand."""
    results = {"random": [{"a": 1.0}, {"a": 5.0}], "true": [{"a": 2.0}, {"a": 8.0}]}
    assert ablate.table(results, [("A", lambda f: f["a"], 1)], over="random").splitlines() == [
        "| over random | A |", "|---|---|", "| true | +2.0 ± 1.4 |",
    ]  # fmt: skip


def test_the_ceiling_is_measured_in_some_of_its_conditions(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ablate, "category_accuracy", lambda *_: 0.25)
    flags = ["--grid", "ceiling", "--only", "random", "true words", "--seeds", "1", "--out", str(tmp_path)]
    ablate.main([*flags, *SMALL])
    said = capsys.readouterr().out
    assert '--only random "true words" --seeds 1' in said and said.count("| 25.0 |") == 2
    assert said.count("| over random |") == 2
    assert sorted(path.name for path in tmp_path.glob("*-0")) == ["1-0", "3-0"]
    assert (tmp_path / "ceiling.png").stat().st_size > 1000
    with pytest.raises(SystemExit):
        ablate.main(["--grid", "ceiling", "--only", "perfect"])
    assert "--only 'perfect': --grid ceiling has albef, random" in capsys.readouterr().err


def test_recipes_are_compared_on_files(tmp_path, monkeypatch):
    write_files(tmp_path / "shop")
    grid = {"albef": ["--recipe", "albef"], "fashionfine": ["--recipe", "fashionfine"]}
    monkeypatch.setattr(ablate, "GRIDS", ablate.GRIDS | {"recipes": grid})
    probed = []
    monkeypatch.setattr(
        ablate, "category_accuracy", lambda *where: probed.append(where) or probe.category_accuracy(*where)
    )
    flags = [*FILES, "--root", str(tmp_path / "shop"), "--seeds", "1", "--jobs", "2"]
    flags += ["--out", str(tmp_path / "runs")]
    for _ in range(2):
        ablate.main([*flags, "--grid", "recipes"])
        header, _, albef, fashionfine = (tmp_path / "runs" / "table.md").read_text().splitlines()[-4:]
        titles = ["R@1 i2t %", "R@1 t2i %", "ITM %", "MLM %", "category %", "seconds a step"]
        assert header.strip("| ").split(" | ") == titles
        checkpoints = [tmp_path / "runs" / f"{number}-0" / "last.pt" for number in (0, 1)]
        shares = [probe.category_accuracy(checkpoint, str(tmp_path / "shop")) for checkpoint in checkpoints]
        assert [line.split(" | ")[5] for line in (albef, fashionfine)] == [f"{100 * share:.1f}" for share in shares]
        assert sorted(probed) == [(checkpoint, str(tmp_path / "shop")) for checkpoint in checkpoints]
    for name in ("last.pt", "metrics.jsonl"):
        (tmp_path / "runs" / "1-0" / name).unlink()
    ablate.main([*flags, "--grid", "recipes"])
    assert len(probed) == 3 and probed[2][0] == checkpoints[1]  # a run made anew is probed anew
    with pytest.raises(SystemExit, match="only synthetic photos come with the truth"):
        ablate.main([*flags, "--grid", "method"])
    with pytest.raises(SystemExit, match="--recipe is what the conditions differ in; drop it"):
        ablate.main(["--grid", "recipes", "--recipe", "albef"])
    with pytest.raises(SystemExit, match="the conditions differ in length; give --steps or --epochs"):
        ablate.main(["--grid", "recipes", "--preset", "base"])


def test_every_condition_of_the_ablations_is_a_valid_run():
    for grid in ablate.GRIDS.values():
        configs = [parse_config(flags)[0] for flags in grid.values()]
        assert len(set(configs)) == len(configs)


PASSES = {
    "albef": {"vision": 1, "text": 2, "fusion": 4, "vision_m": 1, "text_m": 1},
    # the second photo is that of MIM, of which half of the patches are encoded
    "syncmask": {"vision": 2, "text": 2, "fusion": 4, "decoder": 1, "vision_m": 1, "text_m": 3, "fusion_m": 4},
    "softmask": {"vision": 1, "text": 1, "fusion": 4, "vision_m": 1, "text_m": 1},
    "fashionfine": {"vision": 1, "text": 1, "fusion": 3, "vision_m": 1, "text_m": 1},
}
MULTIPLY_ADDS = {"albef": 22.5, "syncmask": 34.3, "softmask": 21.8, "fashionfine": 27.6}  # millions a photo and step


@pytest.mark.parametrize("recipe", train.RECIPES)
def test_no_recipe_makes_more_passes_than_it_says(recipe):
    """Whoever adds a pass, or work inside one, has to say so here and in the docstring of the recipe."""
    config, _ = parse_config([*SMALL, "--fusion-layers", "2", "--recipe", recipe, "--alpha", "0"])
    run, (batch,) = steps.open_step(config, 1)
    counts = steps.count_step(run, batch)
    forward, step, kept, waits = (counts.pop(key) for key in ("forward", "step", "kept", "waits"))
    assert counts == PASSES[recipe] and forward < step and kept > 0
    table = re.findall(rf"\| {recipe} \|.*\| (\d+) \|$", (ROOT / "study" / "benchmark.md").read_text(), re.MULTILINE)
    assert 0 < waits <= min(map(int, table))
    assert step == pytest.approx(MULTIPLY_ADDS[recipe], rel=0.02)
    run.config = dataclasses.replace(config, alpha=0.4)  # momentum soft targets of MLM
    more = steps.count_step(run, batch)
    assert more["waits"] == waits
    extra = {part for part in more if part.endswith("_m") and more[part] > counts.get(part, 0)}
    assert extra == (set() if recipe == "fashionfine" else {"text_m", "fusion_m"})


def test_both_steps_are_compiled(capsys, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(type(self).__name__))
    benchmark.main(["step", "--repeats", "1", *SMALL, "--compile"])
    assert {"VisionLayer", "TextLayer", "ViTModel", "BertLayer"} <= set(compiled)
    assert "fp32, compiled, cpu" in capsys.readouterr().out


def test_what_would_make_the_host_wait_is_found():
    x, mask = torch.rand(4, 3), torch.tensor([True, False, True, False])
    quiet = lambda: (x.sum(), x.index_select(0, torch.arange(2)), x[:2].clone(), x.argsort(1), torch.where(x > 0, x, 0))
    asking = [lambda: x.sum().item(), lambda: x[mask], lambda: mask.nonzero(), lambda: torch.tensor([1, 2]),
              lambda: x.index_put((mask,), x[:2]), lambda: x.masked_select(x > 1), lambda: bool(x.any()),
              lambda: mask.long().bincount(), lambda: x.unique(),
              lambda: x[:, 0].repeat_interleave(mask.long())]  # fmt: skip
    found = []
    for work in (quiet, *asking):
        with Waits() as waits:
            work()
        found.append(bool(waits.found))
    assert found == [False] + [True] * len(asking)


def test_profile_prints_the_dearest_and_leaves_a_trace(tmp_path, capsys):
    trace = tmp_path / "there" / "trace.json"
    benchmark.main(["profile", "--recipe", "syncmask", *SMALL, "--steps-traced", "1", "--trace", str(trace)])
    said = capsys.readouterr().out.splitlines()
    shares = [float(line.split("%")[0]) for line in said[1:11]]
    assert shares == sorted(shares, reverse=True) and 30 < sum(shares) <= 100 and str(trace) in said[11]
    assert any("aten::addmm" in str(event.get("name")) for event in json.loads(trace.read_text())["traceEvents"])


def test_kernels_of_attention_are_timed(capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "ATTENTIONS", {"small": (2, 2, 5, 7, 8)})
    benchmark.main(["attention", "--repeats", "1"])
    assert len(capsys.readouterr().out.splitlines()[-1].split("/")) == 5


def test_a_step_is_timed_beside_that_of_another_checkout(capsys, tmp_path):
    flags = ["step", "--repeats", "1", *SMALL, "--recipe", "syncmask"]
    benchmark.main([*flags, "--against", str(ROOT)])
    assert re.search(rf"{ROOT} .* s a step, .* x ours\n", capsys.readouterr().out)
    with pytest.raises(SystemExit, match="no checkout of this project"):
        benchmark.main([*flags, "--against", str(tmp_path)])


def test_passes_benchmark_prints_every_recipe(capsys):
    benchmark.main(["passes", *SMALL, "--fusion-layers", "2", "--tokens", "60"])
    rows = capsys.readouterr().out.splitlines()[-4:]
    cells = [row.strip("| ").split(" | ") for row in rows]
    assert [row[0] for row in cells] == list(train.RECIPES) and all(int(row[1]) >= 60 for row in cells)


def test_the_reference_step_has_the_same_losses_with_either_attention():
    config, _ = parse_config([*SMALL, "--recipe", "albef", "--queue", "0", "--alpha", "0.4"])
    run, (batch,) = steps.open_step(config, 1)
    batch["mask"] = random_word_mask(batch["words"], config.mlm_ratio, run.generator)
    longer = batch | {key: F.pad(batch[key], [0, 5]) for key in ("token_ids", "attention_mask", "words", "mask")}
    losses = []
    for attention, given in (("eager", batch), ("sdpa", batch), ("eager", longer)):
        torch.manual_seed(1)  # negatives
        run.generator.manual_seed(1)
        run.corrupt = lambda ids, mask: (ids.masked_fill(mask, run.mask_id), ids.masked_fill(~mask, -100))
        losses.append(steps.reference_step(run, attention)(given).item())
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_step_benchmark_times_both(capsys):
    benchmark.main(["step", "--repeats", "1", *SMALL])
    out = capsys.readouterr().out
    assert "ours " in out and "library parts, eager" in out and "x ours; " in out and "multiply-adds a photo" in out
    benchmark.main(["step", "--repeats", "1", *SMALL, "--recipe", "fashionfine"])
    assert "library parts" not in capsys.readouterr().out
    benchmark.main(["data", "--by-workers", "0", "1", "--batches", "3", "--steps-timed", "1", *SMALL])
    out = capsys.readouterr().out
    assert "1 workers" in out and "transfer and augment, cpu" in out


def test_data_benchmark_reads_a_copy_packed_otherwise(tmp_path, capsys):
    data.main(["export-fashiongen", str(tmp_path), "--items", "8"])
    sizes = ["--batch-size", "8", "--by-workers", "0", "--batches", "1", "--steps-timed", "1"]
    files = [flag for flag in SMALL if flag not in ("--products", "12")]
    flags = ["--data", "fashiongen", "--root", str(tmp_path), "--preset", "tiny", "--chunk", "4", "--gzip", "1"]
    benchmark.main(["data", *files, *flags, *sizes])
    assert "an HDF5 chunk is 4 photos" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("step --steps 0", "benchmark.py: --steps 0: must be at least 1"),
        ("step --resume", "benchmark.py: --resume: nothing is trained here"),
        ("step --batch-size 8 --repeats 0", "argument --repeats: 0 is not a whole number from 1 on"),
        ("data --by-workers -1", "argument --by-workers: -1 is not a whole number from 0 on"),
        ("passes --recipe albef", "benchmark.py: --recipe: passes counts all of them"),
        ("passes --tokens 9999", "benchmark.py: --tokens 9999: the model reads 64; see --max-length"),
        ("data --chunk 4", "benchmark.py: --chunk and --gzip pack the photos of --data fashiongen"),
        ("sampler --items 0", "argument --items: 0 is not a whole number from 1 on"),
        ("sampler --block 16 --batch 32", "--block 16 groups nothing unless it is above --batch"),
        ("sampler --batch-size 8", "unknown flag --batch-size"),
    ],
)
def test_benchmark_refuses_in_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(flags.split())
    assert message in f"{stopped.value} {capsys.readouterr().err}"


def test_sampler_benchmark_composes_every_photo(capsys):
    sizes = ["--items", "500", "700", "--block", "100", "--batch", "16", "--width", "8"]
    benchmark.main(["sampler", *sizes, "--mode", "hard", "semihard"])
    out = capsys.readouterr().out
    assert "500 photos, hard" in out and "700 photos, semihard" in out and "growth of hard" in out


def test_what_is_told_is_what_the_photo_shows(wardrobe):
    options = {}
    for row in range(len(wardrobe)):
        for question, value in told.shown(wardrobe, row).items():
            options.setdefault(question, []).append(value)
    options = {question: sorted(set(values)) for question, values in options.items()}
    assert options["colour", "colour"] == sorted(COLOURS) and options["noun", "hem"] == sorted(NOUNS)
    assert not any(attribute == "inside" or kind == "unseen" for kind, attribute in options)
    answers = told.labels(wardrobe, options)
    for row in range(len(wardrobe)):
        product = wardrobe.products[wardrobe.rows[row][0]]
        said = {question: options[question][number] for question, column in answers.items()
                if (number := column[row].item()) >= 0}  # fmt: skip
        assert said == told.shown(wardrobe, row) and said["garment", "garment"] == product.garment
        visible = {place for place in product.details if place in wardrobe.truth(row).regions}
        assert {place for kind, place in said if kind == "look"} == visible
        assert all(said["look", place] == product.details[place].look for place in visible)


def test_what_was_read_is_counted_over_all_places():
    options = {("look", "hem"): ["dark", "light"], ("look", "chest"): ["dark", "light"], ("colour", "colour"): ["red"]}
    known = {("look", "hem"): torch.tensor([0, 1, 1]), ("look", "chest"): torch.tensor([0, -100, 0]),
             ("colour", "colour"): torch.tensor([-100, -100, -100])}  # fmt: skip
    dark, light, red = [1.0, 0.0], [0.0, 1.0], [1.0]
    logits = torch.tensor([dark + dark + red, dark + light + red, light + light + red])
    assert told.read(logits, known, options) == {"look": (3 / 5, 4 / 5, 5)}  # right: hem 2 of 3, chest 1 of 2


def test_told_reads_colours_at_once(capsys):
    told.main(["--steps", "30", "--products", "120"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    found = {cells[0].strip("| "): [float(cells[1]), float(cells[2])] for cells in rows[1:]}
    assert found["colour"][0] > 60 > 30 > found["colour"][1] and {"garment", "look", "noun", "neck"} <= found.keys()
    with pytest.raises(SystemExit):
        told.main(["--steps", "0"])
    assert "--steps 0: must be at least 1" in capsys.readouterr().err


def test_probe_finds_what_is_linearly_there_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (600,), generator=generator)
    noise = torch.randn(600, 8, generator=generator)
    fit = torch.arange(600) < 400
    informed = noise + 3 * torch.nn.functional.one_hot(labels, 8)
    assert probe.probe(informed, labels, fit) > 0.85
    assert probe.probe(noise, labels, fit) < 0.4


def test_labels_that_were_never_fitted_are_errors_and_none_is_no_label():
    """30 photos whose features tell all labels apart, but of those left to test, every third, four have a new one."""
    names = ["", *["red", "blue"] * 14, "red"]
    names[2:12:3] = ["new"] * 4
    kinds = torch.tensor([["", "red", "blue", "new"].index(name) for name in names])
    features = torch.nn.functional.one_hot(kinds).float()
    fit = torch.arange(30) % 3 < 2
    found = probe.accuracies({"category": names, "sub-category": [""] * 30}, [features], fit)
    assert found == {"category": pytest.approx([0.6, 0.4])}


def test_probe_of_a_checkpoint(tmp_path, capsys, monkeypatch):
    config, given = parse_config([*SMALL, "--out", str(tmp_path)])
    train.train(config, given)
    capsys.readouterr()
    checkpoint = tmp_path / "last.pt"
    probe.main(["--checkpoint", str(checkpoint), "--products", "30"])
    head, _, _, *table = capsys.readouterr().out.splitlines()
    assert head == "fitted on 60 photos, accuracy in % on 60 of products held out of pretraining"
    rows = {name: cells for name, *cells in (line.strip("| ").split(" | ") for line in table)}
    assert list(rows) == ["category", "sub-category", *probe.ATTRIBUTES]
    assert all(0 <= float(cell) <= 100 for cells in rows.values() for cell in cells)
    monkeypatch.setattr(probe, "PRODUCTS", 30)
    assert rows["category"][0] == f"{100 * probe.category_accuracy(checkpoint):.1f}"
    state = torch.load(checkpoint)
    torch.save(state | {"config": state["config"] | {"data": "fashioniq"}}, tmp_path / "pairs.pt")
    for name, message in (("none", "no such checkpoint"), ("pairs", "trained on fashioniq, whose photos have no cat")):
        with pytest.raises(SystemExit, match=f"probe.py: .*{message}"):
            probe.main(["--checkpoint", str(tmp_path / f"{name}.pt")])


def test_probe_of_files(tmp_path, capsys):
    """A pretraining and a fine-tuning of it, after the files have moved; one photo cannot be decoded."""
    count = write_files(tmp_path / "shop")
    config, given = parse_config([*FILES, "--root", str(tmp_path / "shop"), "--out", str(tmp_path / "run")])
    train.train(config, given)
    finetune.main(["--task", "category", "--checkpoint", str(tmp_path / "run" / "last.pt"), "--steps", "1",
                   "--batch-size", "8", "--out", str(tmp_path / "tuned")])  # fmt: skip
    (tmp_path / "shop").rename(tmp_path / "moved")
    for run in ("run", "tuned"):
        flags = ["--checkpoint", str(tmp_path / run / "last.pt"), "--products", "40"]
        with pytest.raises(SystemExit, match="shop: no such folder"):
            probe.main(flags)
        capsys.readouterr()
        probe.main([*flags, "--root", str(tmp_path / "moved")])
        head, _, _, category = capsys.readouterr().out.splitlines()
        assert head.startswith(f"fitted on {count - 1} photos, accuracy in % on ") and category.startswith(
            "| category | "
        )
    write_files(tmp_path / "bare", lambda product: "")
    assert probe.category_accuracy(tmp_path / "run" / "last.pt", str(tmp_path / "bare")) is None


def test_a_probe_of_differences_finds_what_is_there_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    known = torch.randn(900, 16, generator=generator) + 0.8 * torch.eye(16)[3]  # one direction says which text is own
    assert fused.share_right(known[:600], known[600:]) > 0.75
    noise = torch.randn(900, 16, generator=generator)
    assert 0.4 < fused.share_right(noise[:600], noise[600:]) < 0.6
    kinds, logits = ["neck", "look"] * 450, torch.tensor([2.0, -1.0]).repeat(450)[:, None]
    parts = [(kinds[at], [logits[at], noise[at], known[at]]) for at in (slice(600), slice(600, 900))]
    found = fused.shares(*parts)
    assert list(found) == ["neck", "look"] and [right[0] for right in found.values()] == [1, 0]
    assert all(right[1] < 0.65 < right[2] and right[3] == 150 for right in found.values())


def test_fused_texts_differ_as_the_model_says(tmp_path, capsys, monkeypatch):
    config, given = parse_config([*SMALL, "--out", str(tmp_path)])
    train.train(config, given)
    run, dataset = figures.open_run(tmp_path / "last.pt", None, "cpu")
    run.model.eval()
    kinds, (logits, cls, words) = fused.differences(run, dataset, 3)
    trial_kinds, rows, others = trials(dataset, (dataset.product_ids < 3).nonzero()[0])
    assert kinds == trial_kinds and logits.shape == (len(kinds), 1) and cls.shape == words.shape == (len(kinds), 32)
    number, of_text = kinds.index("colour"), []
    for text in (dataset.captions[rows[number]], others[number]):
        encoded = data.tokenize(run.tokenizer, [("", text)])
        image = run.model.encode_image(normalise(dataset[rows[number]]["image"][None]))
        keep = encoded["attention_mask"]
        of_text.append(run.model.fuse(run.model.encode_text(encoded["token_ids"], keep), keep, image))
    own, other = of_text
    logit = run.model.itm_logits(own) - run.model.itm_logits(other)
    assert logits[number].item() == pytest.approx((logit[0, 1] - logit[0, 0]).item(), abs=1e-4)
    assert torch.allclose(cls[number], own[0, 0] - other[0, 0], atol=1e-4)
    said = [data.tokenize(run.tokenizer, [("", text)])["token_ids"][0].tolist()
            for text in (dataset.captions[rows[number]], others[number])]  # fmt: skip
    differ = [place for place, (a, b) in enumerate(zip(*said, strict=True)) if a != b]  # a colour is one token
    assert len(differ) == 1 and torch.allclose(words[number], (own - other)[0, differ[0]], atol=1e-4)
    capsys.readouterr()
    fused.main(["--checkpoint", str(tmp_path / "last.pt"), "--products", "12"])
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert table[2][0] == "| garment" and table[-1][0] == "| details (mean)" and {len(row) for row in table[2:]} == {5}
    _, (_, cls_of_wrong, _) = fused.differences(run, dataset, 3, wrong_photo=True)
    assert not torch.allclose(cls_of_wrong, cls, atol=1e-4)
    dataset.regions = [{} for _ in dataset.regions]
    with pytest.raises(DataError, match="no photo of these 3 products"):
        fused.differences(run, dataset, 3)
    for flags, message in ((["--checkpoint", "/nowhere.pt"], "fused.py: /nowhere.pt: no such checkpoint"),
                           (["--checkpoint", "x.pt", "--products", "2"], "--products 2: at least 10")):  # fmt: skip
        with pytest.raises(SystemExit) as caught:
            fused.main(flags)
        assert message in str(caught.value.code) + capsys.readouterr().err
    monkeypatch.setattr(fused, "open_run", lambda *_: (run, None))
    with pytest.raises(SystemExit, match="was trained on .*, whose truth is not known"):
        fused.main(["--checkpoint", "x.pt"])


def test_average_precision_by_hand_and_by_chance():
    answers = torch.tensor([[True, False], [False, True], [True, True], [False, True]])
    scores = torch.tensor([[0.9, 0.5], [0.8, 0.5], [0.7, 0.5], [0.6, 0.1]])  # the second query: a tie of three
    by_hand = [(1 + 2 / 3) / 2, (1 / 2 + 2 / 3 + 3 / 4) / 3]
    assert detail_search.average_precision(scores, answers).tolist() == pytest.approx(by_hand)
    orders = torch.tensor(list(itertools.permutations(range(4)))).T.float()  # (4, 24)
    found = [detail_search.average_precision(orders, of[:, None].expand(-1, 24)).mean().item() for of in answers.T]
    assert detail_search.by_chance(answers).tolist() == pytest.approx(found)


def test_search_by_a_detail(tmp_path, capsys, monkeypatch):
    config, given = parse_config([*SMALL, "--out", str(tmp_path)])
    train.train(config, given)
    run, dataset = figures.open_run(tmp_path / "last.pt", None, "cpu")
    places, texts, answers = detail_search.questions(dataset)
    told = defaultdict(lambda: [False] * len(dataset))  # in the description, and on the photo
    for row, caption in enumerate(dataset.captions):
        for phrase, place in re.findall(r"(\w+ \w+ at (\w+)\.)", caption.lower()):
            told[phrase][row] |= place in dataset.regions[row]
    assert dict(zip(texts, answers.T.tolist(), strict=True)) == {t: rows for t, rows in told.items() if sum(rows) >= 3}
    with monkeypatch.context() as patch:  # a model that knows which photo shows what finds it first, either way
        patch.setattr(detail_search, "photo_features", lambda run, dataset: (None, answers.float()))
        patch.setattr(detail_search, "text_features", lambda run, asked: torch.eye(len(asked)))
        patch.setattr(detail_search, "match_scores", lambda run, photos, asked, pairs: answers[*pairs.T].float())
        found = detail_search.precisions(run, dataset)[1]
    assert found[:2].flatten().tolist() == pytest.approx([1] * 2 * len(texts))
    assert torch.equal(found[2], detail_search.by_chance(answers)) and (found[3] >= found[2]).all()
    capsys.readouterr()
    detail_search.main(["--checkpoint", str(tmp_path / "last.pt")])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[4:]]
    assert [row[0] for row in rows] == [*sorted(set(places)), "all"] and rows[-1][-1] == str(len(texts))
    dataset.regions = [{} for _ in dataset.regions]
    for opened, message in ((None, "whose truth is not known"), (dataset, "no detail is shown by 3 of these")):
        monkeypatch.setattr(detail_search, "open_run", lambda *_, opened=opened: (run, opened))
        with pytest.raises(SystemExit, match=f"detail_search.py: .*{message}"):
            detail_search.main(["--checkpoint", "x.pt"])
