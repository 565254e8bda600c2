"""The downstream tasks: metrics against hand-worked cases, protocols against their definitions, and end to end."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from PIL import Image
from small import lines, resume, run, run_files, same_state, write_fashioniq, write_jsonl, write_karpathy, write_snlive
from tokenizers import Tokenizer

import data
import finetune
from engine import finetune_config
from engine.batches import match_scores
from engine.checkpoints import load_checkpoint, load_weights
from engine.finetune_config import FOUND, open_photos
from engine.flags import ConfigError
from engine.run import build_run
from evaluation.search import search
from readers.dataset import DataError
from readers.prompts import DESCRIPTION, DIFFERENCE


@pytest.fixture(scope="module", autouse=True)
def few_products():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "VAL_PRODUCTS", 12)
        patch.setattr("train.truth", lambda *_: {})
        patch.setattr("train.draw_masks", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A checkpoint of a few steps."""
    out = tmp_path_factory.mktemp("pretrained")
    run(out, "--products", "20", "--steps", "4")
    return out / "last.pt"


def command(*flags):
    config, names, source = finetune_config.parse_config([str(flag) for flag in flags])
    return search(config, source) if config.task == "search" else finetune.finetune(config, names, source)


def results(out):
    return json.loads((Path(out) / "results.json").read_text())


def test_match_scores_equal_pair_by_pair(pretrained):
    config, _, source = finetune_config.parse_config(
        ["--task", "retrieval", "--checkpoint", str(pretrained), "--eval-only", "--precision", "fp32"]
    )
    photos = open_photos(config, "val")
    state = build_run(config, photos, Tokenizer.from_str(source["tokenizer"]))
    load_weights(state, source, "x")
    model = state.model.eval()
    texts = list(dict.fromkeys(photos.text(row) for row in range(len(photos))))
    pairs = torch.tensor([[5, 1], [0, 0], [5, 0], [17, 3], [0, 2], [0, 0]])
    scores = match_scores(state, photos, texts, pairs)
    for (photo, text), score in zip(pairs.tolist(), scores.tolist(), strict=True):
        words = data.tokenize(state.tokenizer, [texts[text]])
        with torch.no_grad():
            image = model.vision(data.normalise(photos[photo]["image"][None]))
            text_embeds = model.text(words["token_ids"], words["attention_mask"])
            logits = model.itm_logits(
                model.fusion(text_embeds, words["attention_mask"], model.fusion.project_image_kv(image))
            )[0]
        assert score == pytest.approx((logits[1] - logits[0]).item(), abs=1e-4)


LEFT = {"config.json", "metrics.jsonl", "curves.png", "last-2.pt", "last.pt", "best.pt", "results.json"}
LABELS = {"classes.tsv", "confusion.png"}


@pytest.mark.parametrize(
    ("task", "flags", "left", "key", "figure"),
    [
        ("retrieval", ["--rerank", "3"], {"examples.png"}, "val_mean", "rerank_sampled_t2i_r10"),
        ("tgir", [], {"examples.png"}, "val_mean", "mean_union_r10"),
        ("category", [], LABELS, "val_accuracy", "macro_f1"),
        ("entailment", [], LABELS, "val_accuracy", "accuracy_look"),
        ("entailment", ["--modality", "text"], LABELS, "val_accuracy", "accuracy"),
        ("subcategory", ["--modality", "image"], LABELS, "val_accuracy", "accuracy"),
    ],
)
def test_a_task_end_to_end(tmp_path, pretrained, capsys, task, flags, left, key, figure):
    out = tmp_path / "out"
    common = ["--task", task, "--out", out, "--steps", "4", "--val-every", "2", *flags]
    found = command(*common, "--checkpoint", pretrained)
    assert {path.name for path in out.iterdir()} == LEFT | left
    said = results(out)
    assert said == json.loads(json.dumps(found)) and said["task"] == task and said["data"] == "synthetic"
    assert said["split"] == "val" and said["seed"] == 0 and said["seconds"] > 0 and figure in said["metrics"]
    assert set(said["chance"]) <= set(said["metrics"]) and len(said["chance"]) >= 2
    assert all(0 <= value <= 1 for value in said["metrics"].values())
    validations = [line for line in lines(out) if key in line and not line.get("final")]
    assert [line["step"] for line in validations] == [2, 4]
    best = max(validations, key=lambda line: (line[key], -line["step"]))
    assert load_checkpoint(out / "best.pt")["step"] == best["step"]
    assert said["best_step"] == best["step"] and said["left_out"] == 0
    assert figure in (printed := capsys.readouterr().out) and "chance" in printed
    # the best step evaluated again gives the same figures
    flags = [flag for flag in flags if flag not in ("--modality", "image", "text")]
    again = command("--task", task, "--checkpoint", out / "best.pt", "--eval-only", "--out", tmp_path / "again", *flags)
    assert again["metrics"] == found["metrics"]


def test_tasks_of_a_fashionfine_checkpoint(tmp_path, capsys):
    """Texts get a lead and neither symbol nor prompts, so no label is told; tgir compares [CLS] alone."""
    run(tmp_path / "pre", "--products", "20", "--steps", "2", "--recipe", "fashionfine")
    source = tmp_path / "pre" / "last.pt"
    common = ["--checkpoint", source, "--steps", "2", "--val-every", "2"]
    for task, lead in (("retrieval", DESCRIPTION), ("category", DESCRIPTION), ("tgir", DIFFERENCE)):
        config, _, _ = finetune_config.parse_config([str(flag) for flag in ["--task", task, *common]])
        opened = finetune.TASKS[task](config).open("val")
        assert opened.text(3) == (lead, opened.captions[3])
        if task == "tgir":
            assert opened.queries().text(3) == (lead, opened.captions[3]) == opened.part(np.array([3])).text(0)
        assert config.model.local_tokens == (task != "tgir") and not config.model.alignment
        assert (config.focal_gamma, config.itc_weight) == ((2, 0.25) if task == "retrieval" else (0, 1))
        found = command("--task", task, *common, "--out", tmp_path / task)
        saved = load_checkpoint(tmp_path / task / "best.pt")["model"]
        assert any(name.startswith("adapter") for name in saved) == (task != "tgir")
        assert not any(name.startswith(("phrases", "detector")) for name in saved)
        flags = ["--task", task, "--eval-only", "--checkpoint", tmp_path / task / "best.pt"]
        assert command(*flags, "--out", tmp_path / f"{task}-again")["metrics"] == found["metrics"]
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    by_words = command("--task", "search", "--checkpoint", source, "--query", "red shirt", "--out", tmp_path / "s")
    assert len(by_words) == FOUND and by_words[0][1] <= 1
    flags = ["--task", "search", "--checkpoint", tmp_path / "tgir" / "best.pt", "--out", tmp_path / "s"]
    command(*flags, "--image", tmp_path / "a.png", "--query", "is red")


def test_a_stopped_fine_tuning_goes_on_bit_for_bit(tmp_path, pretrained):
    flags = ["--task", "category", "--checkpoint", pretrained, "--steps", "4", "--val-every", "2"]
    whole = command(*flags, "--out", tmp_path / "whole")
    parsed = finetune_config.parse_config([str(flag) for flag in [*flags, "--out", tmp_path / "parts"]])
    assert finetune.finetune(*parsed, stop_at=3) is None
    assert not (tmp_path / "parts" / "results.json").exists()
    assert command("--task", "category", "--resume", "--out", tmp_path / "parts")["metrics"] == whole["metrics"]
    one, two = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    same_state(one, two)
    with pytest.raises(ConfigError, match="--task tgir contradicts the run to resume, which has category"):
        command("--task", "tgir", "--resume", "--out", tmp_path / "parts")
    with pytest.raises(ConfigError, match="--modality image contradicts"):
        command("--task", "category", "--modality", "image", "--resume", "--out", tmp_path / "parts")


def test_a_frozen_model_is_a_linear_probe_and_from_scratch_takes_no_weights(tmp_path, pretrained):
    """The head alone is trained; photos are told apart by the features that pretraining left."""
    flags = ["--task", "category", "--modality", "image", "--freeze", "--checkpoint", pretrained]
    found = command(*flags, "--steps", "4", "--val-every", "2", "--out", tmp_path / "probe")
    assert found["protocol"].startswith("photo alone")
    before, after = load_checkpoint(pretrained)["model"], load_checkpoint(tmp_path / "probe" / "last.pt")["model"]
    changed = {name for name, tensor in after.items() if name not in before or not torch.equal(tensor, before[name])}
    assert changed == {"class_head.weight", "class_head.bias"}
    flags = ["--task", "category", "--from-scratch", "--checkpoint", pretrained, "--lr", "0", "--final-lr", "0"]
    assert command(*flags, "--steps", "1", "--out", tmp_path / "scratch")["checkpoint"] == "random weights"
    random = load_checkpoint(tmp_path / "scratch" / "last.pt")["model"]
    assert not torch.equal(random["vision.patch_embed.weight"], before["vision.patch_embed.weight"])
    with pytest.raises(ConfigError, match="--freeze is for --task category or subcategory or entailment"):
        command("--task", "retrieval", "--freeze", "--checkpoint", pretrained, "--out", tmp_path / "no")


def test_early_stopping_and_the_best_step(tmp_path, pretrained):
    flags = ["--task", "subcategory", "--checkpoint", pretrained, "--lr", "0", "--final-lr", "0", "--val-every", "1"]
    found = command(*flags, "--steps", "9", "--patience", "2", "--out", tmp_path)
    steps = [line["step"] for line in lines(tmp_path) if "val_accuracy" in line and not line.get("final")]
    assert steps == [1, 2, 3] and found["steps"] == 3  # nothing is learnt, so nothing becomes better
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 1
    assert command("--task", "subcategory", "--resume", "--out", tmp_path)["metrics"] == found["metrics"]
    assert max(line["step"] for line in lines(tmp_path)) == 3


def test_every_other_flag_runs(tmp_path, pretrained):
    flags = "--negatives hard --itm-share 0.7 --itm-warmup 1 --margin 0.1 --queue 8"
    flags += " --alpha 0.3 --ema-decay 0.9 --focal-gamma 2 --distort 0.3 --crop-scale 0.7 --held-out 0.3"
    flags += " --precision bf16 --epochs 2 --batch-size 6 --products 14 --seed 3 --val-products 5 --workers 0"
    found = command("--task", "retrieval", "--checkpoint", pretrained, "--out", tmp_path, *flags.split())
    assert found["seed"] == 3 and found["steps"] == lines(tmp_path)[-1]["step"] > 2
    assert all("itc" in line and "itm" in line for line in lines(tmp_path) if "loss" in line)


def listed(categories, first=0):
    """Lines of a product and a photo for each of the categories; ? is none."""
    return [
        {"image": f"{i}.png", "caption": f"thing {i} {category}", "product_id": i, "category": category.strip("?")}
        for i, category in enumerate(categories.split(), first)
    ]


def test_recognition_of_labels_that_training_has_not_seen(tmp_path, pretrained, capsys):
    train = listed("TOPS " * 8 + "BAGS " * 8 + "HATS ? ?")
    root = tmp_path / "photos"
    write_jsonl(root, train=train, val=listed("TOPS TOPS TOPS SHOES SHOES", first=len(train)))
    common = ["--task", "category", "--checkpoint", pretrained, "--data", "jsonl", "--root", root]
    found = command(*common, "--steps", "3", "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    assert "a single product, trained on and not held out: HATS" in printed and "2 photos without a category" in printed
    assert found["metrics"]["unseen_share"] == pytest.approx(0.4) and found["metrics"]["accuracy"] < 0.601
    table = (tmp_path / "out" / "classes.tsv").read_text().splitlines()
    assert "(unseen in training)\t2\t0.0000\t0.0000\t0.0000" in table
    assert load_checkpoint(tmp_path / "out" / "best.pt")["config"]["classes"] == ("BAGS", "HATS", "TOPS")


def test_retrieval_and_recognition_on_fashiongen(tmp_path, pretrained):
    small.export_fashiongen(tmp_path / "fg", 48, image_size=32)
    common = ["--checkpoint", pretrained, "--data", "fashiongen", "--root", tmp_path / "fg"]
    found = command("--task", "retrieval", "--steps", "2", *common, "--out", tmp_path / "retrieval")
    assert "of the same sub-category" in found["protocol"] and found["chance"]["full_i2t_r1"] == pytest.approx(1 / 8)
    found = command("--task", "subcategory", "--steps", "2", *common, "--out", tmp_path / "subcategory")
    assert 0 < found["metrics"]["unseen_share"] <= 1  # eight families of products cannot show every sub-category


def test_entailment_on_snlive(tmp_path, pretrained):
    root, labels = tmp_path / "ve", ("entailment", "neutral", "contradiction")
    for split in ("train", "dev"):
        statements = [(str(i // 3), f"{'red' if i % 2 else 'green'} thing {i % 7}", labels[i % 3]) for i in range(30)]
        write_snlive(root, statements, map(str, range(10)), split)
    common = ["--task", "entailment", "--data", "snlive", "--root", root, "--out", tmp_path / "out"]
    found = command(*common, "--steps", "2", "--checkpoint", pretrained)
    assert found["chance"]["accuracy"] == pytest.approx(1 / 3)
    assert found["metrics"].keys() == {"accuracy", "macro_f1", "unseen_share"}
    assert found["protocol"].startswith("photo and text; 30 statements, 3 classes")


def test_retrieval_of_photos_with_several_captions(tmp_path, pretrained):
    images = [("train" if i < 20 else "test", None, [f"red {i}", f"{i} blue", "dress"]) for i in range(29)]
    write_karpathy(tmp_path, "flickr30k", images)
    common = ["--task", "retrieval", "--data", "flickr30k", "--root", tmp_path, "--split", "test"]
    found = command(*common, "--steps", "2", "--rerank", "3", "--checkpoint", pretrained, "--out", tmp_path / "out")
    assert found["protocol"].startswith("full: 9 photos, 27 texts, all captions of each; ")
    assert found["protocol"].endswith("the best 3 re-ranked by matching")
    assert found["metrics"].keys() >= {"full_i2t_r1", "rerank_full_mean"}
    assert found["chance"]["full_t2i_r1"] == pytest.approx(1 / 9)
    assert found["metrics"]["full_t2i_r10"] == 1 > found["metrics"]["full_t2i_r1"]


def test_evaluation_agrees_with_the_validation_of_pretraining(tmp_path):
    """Also where photos of one product have different texts: the first counts."""
    root, exactly = tmp_path / "photos", ["--precision", "fp32"]  # bf16 would rank near ties by rounding
    texts = [f"thing {number} of {number // 3} parts" for number in range(24)]
    records = [{"image": f"{i}.png", "caption": text, "product_id": i // 3} for i, text in enumerate(texts)]
    write_jsonl(root, train=records, val=records)
    final = run_files(tmp_path / "run", root, "--preset", "tiny", "--steps", "6")
    flags = ["--task", "retrieval", "--eval-only", "--checkpoint", tmp_path / "run" / "last.pt", *exactly]
    found = command(*flags, "--out", tmp_path / "as-is")
    assert "no sub-categories known" in found["protocol"] and found["chance"]["sampled_i2t_r1"] == pytest.approx(1 / 8)
    for way in ("i2t", "t2i"):
        for k in (1, 5):
            assert found["metrics"][f"full_{way}_r{k}"] == pytest.approx(final[f"val_{way}_r{k}"], abs=1e-5)


def test_tgir_on_fashioniq_names_both_galleries(tmp_path, pretrained, capsys):
    subsets = "dress", "shirt", "toptee"
    photo = lambda number: Image.new("RGB", (20, 30), (number * 9 % 256, 50, 90))
    for split in ("train", "val", "test"):
        write_fashioniq(tmp_path / "iq", split, dict.fromkeys(subsets, (6, 20, 12)), photo)
    common = ["--task", "tgir", "--checkpoint", pretrained, "--data", "fashioniq", "--root", tmp_path / "iq"]
    found = command(*common, "--steps", "2", "--batch-size", "6", "--out", tmp_path / "out")
    for subset in (*subsets, "mean"):
        for gallery, size in (("original", 20), ("union", 12)):
            assert found["chance"][f"{subset}_{gallery}_r10"] == 10 / size
            assert 0 <= found["metrics"][f"{subset}_{gallery}_r50"] <= 1
    assert "dress union 12; dress original 20" in found["protocol"]
    assert "dress: 6 (photos to search: union 12, original 20)" in capsys.readouterr().out
    tuned = ["--checkpoint", tmp_path / "out" / "best.pt"]
    command("--task", "tgir", *tuned, *common[4:], "--eval-only", "--split", "test", "--out", tmp_path / "test")
    photo = tmp_path / "iq" / "images" / "dress00003.jpg"
    found = command("--task", "search", *tuned, "--image", photo, "--out", tmp_path / "found")
    assert found[0][1] == pytest.approx(1, abs=1e-4)
    ranks = json.loads((tmp_path / "test" / "ranks.json").read_text())
    assert len(ranks) == 18 and ranks[0]["subset"] == "dress" and ranks[0]["candidate"] == "dress00001"
    assert sorted(ranks[0]["ranking"]) == [f"dress{i:05}" for i in range(20)]
    assert results(tmp_path / "test")["metrics"] == {}


def test_search_finds_a_photo_by_itself_and_keeps_an_index(tmp_path, pretrained, monkeypatch):
    checkpoint = shutil.copy(pretrained, tmp_path / "last.pt")
    config, _, _ = finetune_config.parse_config(["--task", "search", "--checkpoint", str(checkpoint), "--query", "red"])
    open_photos(config, "val").photo(7).save(tmp_path / "wanted.png")
    common = ["--task", "search", "--checkpoint", checkpoint, "--out", tmp_path / "found"]
    found = command(*common, "--image", tmp_path / "wanted.png")
    assert found[0][0] == 7 and found[0][1] == pytest.approx(1, abs=1e-4) and len(found) == 10
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)
    assert (tmp_path / "found" / "found-wanted.png").exists()
    ranked = command(*common, "--query", "sleeve", "--rerank", "10")
    scores = [score for _, score in ranked]
    assert {row for row, _ in ranked} == {row for row, _ in command(*common, "--query", "sleeve")}
    assert scores == sorted(scores, reverse=True) and all(0 <= score <= 1 for score in scores)
    index = ["--index", tmp_path / "features"]
    assert command(*common, *index, "--image", tmp_path / "wanted.png") == found and index[1].exists()
    monkeypatch.setattr("evaluation.search.photo_features", lambda *_: pytest.fail("the index was not used"))
    both = command(*common, *index, "--image", tmp_path / "wanted.png", "--query", "is red")
    words = command(*common, *index, "--query", "red")
    assert len({tuple(row for row, _ in ranking) for ranking in (found, both, words)}) == 3
    assert (tmp_path / "found" / "found-is-red-wanted.png").exists()
    state = load_checkpoint(checkpoint)
    state["model"]["vision_proj.bias"] += 1
    torch.save(state, checkpoint)
    with pytest.raises((ConfigError, DataError), match="features"):  # it is of other weights
        command(*common, *index, "--query", "red")
    index[1].write_bytes(b"damaged")
    with pytest.raises((ConfigError, DataError), match="features"):
        command(*common, *index, "--query", "red")


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--task", "search"], "say with --query, --image or both"),
        (["--task", "search", "--query", "qqq zzz"], "no word of it is in the model's vocabulary"),
        (["--task", "search", "--image", "no.png"], "--image no.png: "),
        (["--task", "retrieval", "--eval-only", "--resume"], "--resume goes on with a training"),
        (["--task", "category", "--eval-only"], "has no classes yet"),
        (["--task", "tgir", "--modality", "image"], "--modality is for --task category or subcategory or entailment"),
        (["--task", "entailment", "--data", "jsonl"], "--task entailment needs --data synthetic or snlive, not jsonl"),
        (["--task", "retrieval", "--split", "test"], "--split test is for flickr30k, coco, fashioniq, snlive"),
        (["--task", "retrieval", "--eval-only", "--lr", "1"], "--lr is for training"),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(tmp_path, pretrained, monkeypatch, flags, complaint):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        finetune.main([*flags, "--checkpoint", str(pretrained), "--out", str(tmp_path / "out")])
    assert str(stop.value).startswith("finetune.py: ") and complaint in str(stop.value)
    assert "\n" not in str(stop.value) and not (tmp_path / "out").exists()


def test_bad_checkpoints_are_one_line(tmp_path, pretrained):
    def refused(checkpoint, *flags):
        with pytest.raises(SystemExit) as stop:
            finetune.main([*flags, "--checkpoint", str(checkpoint), "--out", str(tmp_path / "new")])
        assert "\n" not in str(stop.value) and not (tmp_path / "new").exists()
        return str(stop.value)

    for task in ("tgir", "category"):
        command("--task", task, "--checkpoint", pretrained, "--steps", "1", "--out", tmp_path / task)
    with pytest.raises(ConfigError, match="the run is a fine-tuning, --task tgir of finetune.py"):
        resume(tmp_path / "tgir")
    tuned, search = tmp_path / "tgir" / "best.pt", ["--task", "search", "--query", "red"]
    assert "is one of --task tgir; give a pretraining" in refused(tuned, "--task", "category")
    assert "is fine-tuned already" in refused(tuned, "--task", "tgir")
    assert "needs --image to search by" in refused(tuned, *search)
    assert "was fine-tuned for category" in refused(tmp_path / "category" / "best.pt", *search)
    state = load_checkpoint(pretrained)
    state["config"]["model"] = {**state["config"]["model"], "width": 64}
    torch.save(state, tmp_path / "other.pt")
    assert "other.pt: does not fit this run" in refused(tmp_path / "other.pt", "--task", "tgir", "--eval-only")
    # what is there already is not overwritten
    for flags in (["--steps", "1"], ["--eval-only"]):
        with pytest.raises(ConfigError, match="choose another --out"):
            command("--task", "tgir", "--checkpoint", pretrained, *flags, "--out", tmp_path / "tgir")
