"""The downstream tasks and search: end to end, protocols against their definitions, refusals in one line."""

import json
import shutil

import numpy as np
import pytest
import small
import torch
from PIL import Image
from small import lines, resume, run, run_files, same_state, write_fashioniq, write_jsonl, write_karpathy, write_snlive
from tokenizers import Tokenizer

import data
import finetune
from engine.batches import score_pairs_with_itm
from engine.checkpoints import load_checkpoint, load_weights
from engine.finetune_config import SEARCH_RESULTS, open_data, parse_config
from engine.flags import ConfigError
from engine.run import build_run
from evaluation.search import search
from readers.prompts import CAPTION_PREFIX, DIFFERENCE_PREFIX


@pytest.fixture(scope="module", autouse=True)
def few_products():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "VAL_PRODUCTS", 12)
        patch.setattr("train.ground_truth_metrics", lambda *_: {})
        patch.setattr("train.draw_masks", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A checkpoint of a few steps."""
    out = tmp_path_factory.mktemp("pretrained")
    run(out, "--num-products", "20", "--steps", "4")
    return out / "last.pt"


def command(flags):
    """Run finetune.py. -> the results of a task, or of a search"""
    config, given, source = parse_config(flags.split())
    return search(config, source) if config.task == "search" else finetune.finetune(config, given, source)


def test_itm_scores_equal_those_pair_by_pair(pretrained):
    config, _, source = parse_config(f"--task retrieval --checkpoint {pretrained} --eval-only --precision fp32".split())
    dataset = open_data(config, "val")
    run = build_run(config, dataset, Tokenizer.from_str(source["tokenizer"]))
    load_weights(run, source, "x")
    model = run.model.eval()
    captions = list(dict.fromkeys(dataset.text(row) for row in range(len(dataset))))
    pairs = torch.tensor([[5, 1], [0, 0], [5, 0], [17, 3], [0, 2], [0, 0]])
    scores = score_pairs_with_itm(run, dataset, captions, pairs)
    for (row, caption), score in zip(pairs.tolist(), scores.tolist(), strict=True):
        tokens = data.tokenize(run.tokenizer, [captions[caption]])
        with torch.no_grad():
            image_kv = model.fusion.project_image_kv(model.vision(data.normalise(dataset[row]["image"][None])))
            text_embeds = model.text(tokens["token_ids"], tokens["attention_mask"])
            logits = model.itm_logits(model.fusion(text_embeds, tokens["attention_mask"], image_kv))[0]
        assert score == pytest.approx((logits[1] - logits[0]).item(), abs=1e-4)


OUTPUT_FILES = {"config.json", "metrics.jsonl", "curves.png", "last-2.pt", "last.pt", "best.pt", "results.json"}


@pytest.mark.parametrize(
    ("task", "flags", "selected_by", "metric"),
    [
        ("retrieval", "--rerank 3", "val_mean", "rerank_sampled_t2i_r10"),
        ("tgir", "", "val_mean", "mean_union_r10"),
        ("category", "", "val_accuracy", "macro_f1"),
        ("entailment", "", "val_accuracy", "accuracy_look"),
        ("entailment", "--modality text", "val_accuracy", "accuracy"),
        ("subcategory", "--modality image", "val_accuracy", "accuracy"),
    ],
)
def test_a_task_end_to_end(tmp_path, pretrained, capsys, task, flags, selected_by, metric):
    out = tmp_path / "out"
    results = command(f"--task {task} --checkpoint {pretrained} --out {out} --steps 4 --val-every 2 {flags}")
    task_files = {"confusion.png", "classes.tsv"} if selected_by == "val_accuracy" else {"examples.png"}
    assert {path.name for path in out.iterdir()} == OUTPUT_FILES | task_files
    saved = json.loads((out / "results.json").read_text())
    assert saved == json.loads(json.dumps(results)) and metric in saved["metrics"] and saved["seconds"] > 0
    expected = {"task": task, "data": "synthetic", "split": "val", "seed": 0, "steps": 4, "left_out": 0}
    assert saved.items() >= expected.items()
    assert set(saved["chance"]) <= set(saved["metrics"]) and len(saved["chance"]) >= 2
    assert all(0 <= value <= 1 for value in saved["metrics"].values())
    validations = [line for line in lines(out) if selected_by in line and not line.get("final")]
    assert [line["step"] for line in validations] == [2, 4]
    best = max(validations, key=lambda line: (line[selected_by], -line["step"]))
    assert load_checkpoint(out / "best.pt")["step"] == best["step"] == saved["best_step"]
    assert metric in (printed := capsys.readouterr().out) and "chance" in printed
    # the best step evaluated again gives the same metrics
    flags = flags if task == "retrieval" else ""  # the modality is the checkpoint's
    again = command(f"--task {task} --checkpoint {out}/best.pt --eval-only --out {tmp_path}/again {flags}")
    assert again["metrics"] == results["metrics"] and again["best_step"] == results["best_step"]


def test_tasks_of_a_fashionfine_checkpoint(tmp_path):
    """Captions get a prefix but neither symbol nor prompts, which name the label; tgir compares [CLS] alone."""
    run(tmp_path / "pre", "--num-products", "20", "--steps", "2", "--recipe", "fashionfine")
    source = tmp_path / "pre" / "last.pt"
    for task, prefix in (("retrieval", CAPTION_PREFIX), ("category", CAPTION_PREFIX), ("tgir", DIFFERENCE_PREFIX)):
        flags = f"--task {task} --checkpoint {source} --steps 2 --val-every 2 --out {tmp_path}/{task}"
        config, _, _ = parse_config(flags.split())
        dataset = open_data(config, "val")
        assert dataset.text(3) == (prefix, dataset.captions[3])
        if task == "tgir":
            assert dataset.queries().text(3) == (prefix, dataset.captions[3]) == dataset.subset(np.array([3])).text(0)
        assert config.model.local_tokens == (task != "tgir") and not config.model.alignment
        assert (config.focal_gamma, config.itc_weight) == ((2, 0.25) if task == "retrieval" else (0, 1))
        command(flags)
        saved = load_checkpoint(tmp_path / task / "best.pt")["model"]
        assert any(name.startswith("adapter") for name in saved) == (task != "tgir")
        assert not any(name.startswith(("phrases", "detector")) for name in saved)
    by_words = command(f"--task search --checkpoint {source} --query red --out {tmp_path}/s")
    assert len(by_words) == SEARCH_RESULTS and by_words[0][1] <= 1
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    command(
        f"--task search --checkpoint {tmp_path}/tgir/best.pt --out {tmp_path}/s --image {tmp_path}/a.png --query red"
    )


def test_a_stopped_fine_tuning_goes_on_bit_for_bit(tmp_path, pretrained):
    flags = f"--task category --checkpoint {pretrained} --steps 4 --val-every 2 --out {tmp_path}/"
    whole = command(flags + "whole")
    assert finetune.finetune(*parse_config((flags + "parts").split()), stop_at=3) is None
    assert not (tmp_path / "parts" / "results.json").exists()
    assert command(f"--task category --resume --out {tmp_path}/parts")["metrics"] == whole["metrics"]
    same_state(*(load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "parts")))
    with pytest.raises(ConfigError, match="is a pretraining; continue it by train.py --resume"):
        command(f"--task category --resume --out {pretrained.parent}")
    for flags in ("--task tgir", "--task category --modality image"):
        with pytest.raises(ConfigError, match="contradicts the run to resume"):
            command(f"{flags} --resume --out {tmp_path}/parts")


def test_a_frozen_model_is_a_linear_probe_and_from_scratch_takes_no_weights(tmp_path, pretrained):
    """The head alone is trained, on the features of pretraining."""
    flags = f"--task category --checkpoint {pretrained} --steps 2 --val-every 2"
    results = command(f"{flags} --modality image --freeze --out {tmp_path}/probe")
    assert results["protocol"]["modality"] == "image"
    before, after = load_checkpoint(pretrained)["model"], load_checkpoint(tmp_path / "probe" / "last.pt")["model"]
    changed = {name for name, tensor in after.items() if name not in before or not torch.equal(tensor, before[name])}
    assert changed == {"class_head.weight", "class_head.bias"}
    results = command(f"{flags} --from-scratch --lr 0 --min-lr 0 --out {tmp_path}/scratch")
    assert results["checkpoint"] == "random weights"
    random = load_checkpoint(tmp_path / "scratch" / "last.pt")["model"]
    assert not torch.equal(random["vision.patch_embed.weight"], before["vision.patch_embed.weight"])


def test_early_stopping_and_the_best_step(tmp_path, pretrained):
    schedule = "--lr 0 --min-lr 0 --val-every 1 --steps 9 --patience 2"
    results = command(f"--task subcategory --checkpoint {pretrained} {schedule} --out {tmp_path}")
    steps = [line["step"] for line in lines(tmp_path) if "val_accuracy" in line and not line.get("final")]
    assert steps == [1, 2, 3] and results["steps"] == 3  # nothing is learnt, so nothing becomes better
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 1
    assert command(f"--task subcategory --resume --out {tmp_path}")["metrics"] == results["metrics"]
    assert max(line["step"] for line in lines(tmp_path)) == 3


def test_every_other_flag_runs(tmp_path, pretrained):
    flags = "--negatives hard --itm-hard-ratio 0.7 --itm-hard-warmup 1 --margin 0.1 --queue-size 8"
    flags += " --alpha 0.3 --ema-decay 0.9 --focal-gamma 2 --distort 0.3 --crop-scale 0.7 --held-out 0.3"
    flags += " --precision bf16 --epochs 2 --batch-size 6 --num-products 14 --seed 3 --val-products 5 --workers 0"
    results = command(f"--task retrieval --checkpoint {pretrained} --out {tmp_path} {flags}")
    assert results["seed"] == 3 and results["steps"] == lines(tmp_path)[-1]["step"] > 2
    assert all("itc" in line and "itm" in line for line in lines(tmp_path) if "loss" in line)


def test_recognition_of_labels_that_training_has_not_seen(tmp_path, pretrained, capsys):
    labels = ["TOPS"] * 8 + ["BAGS"] * 8 + ["HATS", "", ""] + ["TOPS"] * 3 + ["SHOES"] * 2
    records = [
        {"image": f"{i}.png", "caption": "a thing", "product_id": i, "category": label}
        for i, label in enumerate(labels)
    ]
    write_jsonl(tmp_path / "photos", train=records[:19], val=records[19:])
    flags = f"--task category --checkpoint {pretrained} --data jsonl --root {tmp_path}/photos --steps 3"
    results = command(f"{flags} --out {tmp_path}/out")
    assert "train: 17 images" in capsys.readouterr().out  # two have no label
    assert results["metrics"]["unseen_share"] == pytest.approx(0.4) and results["metrics"]["accuracy"] < 0.601
    assert load_checkpoint(tmp_path / "out" / "best.pt")["config"]["classes"] == ("BAGS", "HATS", "TOPS")


def test_retrieval_and_recognition_on_fashiongen(tmp_path, pretrained):
    small.export_fashiongen(tmp_path / "fg", 48, image_size=32)
    flags = f"--checkpoint {pretrained} --data fashiongen --root {tmp_path}/fg --steps 2 --out {tmp_path}"
    results = command(f"--task retrieval {flags}/retrieval")
    assert 0 < results["protocol"]["negatives of the same sub-category"] < 1
    assert results["chance"]["full_i2t_r1"] == pytest.approx(1 / 8)
    results = command(f"--task subcategory {flags}/subcategory")
    assert 0 < results["metrics"]["unseen_share"] <= 1  # eight families of products cannot show every sub-category


def test_entailment_on_snlive(tmp_path, pretrained):
    labels = ("entailment", "neutral", "contradiction")
    statements = [(str(i // 3), f"{'red' if i % 2 else 'green'} thing {i % 7}", labels[i % 3]) for i in range(30)]
    for split in ("train", "dev"):
        write_snlive(tmp_path, statements, map(str, range(10)), split)
    flags = f"--task entailment --data snlive --root {tmp_path} --steps 2 --checkpoint {pretrained}"
    results = command(f"{flags} --out {tmp_path}/out")
    assert results["chance"]["accuracy"] == pytest.approx(1 / 3)
    assert results["metrics"].keys() == {"accuracy", "macro_f1", "unseen_share"}
    assert results["protocol"]["modality"] == "both" and results["protocol"]["statements"] == 30


def test_retrieval_of_photos_with_several_captions(tmp_path, pretrained):
    images = [("train" if i < 20 else "test", None, [f"red {i}", f"{i} blue", "dress"]) for i in range(29)]
    write_karpathy(tmp_path, "flickr30k", images)
    flags = f"--task retrieval --data flickr30k --root {tmp_path} --split test --steps 2 --rerank 3"
    results = command(f"{flags} --checkpoint {pretrained} --out {tmp_path}/out")
    assert results["protocol"] == {"images": 9, "captions": 27, "reranked": 3}
    assert results["metrics"].keys() >= {"full_i2t_r1", "rerank_full_mean"}
    assert results["chance"]["full_t2i_r1"] == pytest.approx(1 / 9)
    assert results["metrics"]["full_t2i_r10"] == 1 > results["metrics"]["full_t2i_r1"]


def test_evaluation_agrees_with_the_validation_of_pretraining(tmp_path):
    """Also where photos of one product have different texts: the first counts."""
    records = [{"image": f"{i}.png", "caption": f"thing {i}", "product_id": i // 3} for i in range(24)]
    write_jsonl(tmp_path / "photos", train=records, val=records)
    final = run_files(tmp_path / "run", tmp_path / "photos", "--preset", "tiny", "--steps", "6")
    flags = f"--task retrieval --eval-only --checkpoint {tmp_path}/run/last.pt --out {tmp_path}/as-is"
    results = command(f"{flags} --precision fp32")  # bf16 would rank near ties by rounding
    assert results["chance"]["sampled_i2t_r1"] == pytest.approx(1 / 8)
    for key in ("i2t_r1", "i2t_r5", "t2i_r1", "t2i_r5"):
        assert results["metrics"][f"full_{key}"] == pytest.approx(final[f"val_{key}"], abs=1e-5)


def test_tgir_on_fashioniq_names_both_galleries(tmp_path, pretrained, capsys):
    sizes = {"dress": (6, 20, 12), "shirt": (6, 20, 12), "toptee": (6, 20, 12)}
    for split in ("train", "val", "test"):
        write_fashioniq(tmp_path / "iq", split, sizes, lambda i: Image.new("RGB", (20, 30), (i * 9 % 256, 50, 90)))
    flags = f"--task tgir --checkpoint {pretrained} --data fashioniq --root {tmp_path}/iq --steps 2 --batch-size 6"
    results = command(f"{flags} --out {tmp_path}/out")
    for subset in (*sizes, "mean"):
        for gallery, size in (("original", 20), ("union", 12)):
            assert results["chance"][f"{subset}_{gallery}_r10"] == 10 / size
            assert 0 <= results["metrics"][f"{subset}_{gallery}_r50"] <= 1
    assert results["protocol"]["dress union"] == 12 and results["protocol"]["dress original"] == 20
    assert "dress: 6 (images to search: union 12, original 20)" in capsys.readouterr().out
    flags = f"--task search --checkpoint {tmp_path}/out/best.pt --out {tmp_path}/found"
    results = command(f"{flags} --image {tmp_path}/iq/images/dress00003.jpg")
    assert results[0][1] == pytest.approx(1, abs=1e-4)
    flags = f"--task tgir --checkpoint {tmp_path}/out/best.pt --eval-only --split test --out {tmp_path}/test"
    assert command(flags)["metrics"] == {}
    ranks = json.loads((tmp_path / "test" / "ranks.json").read_text())
    assert len(ranks) == 18 and ranks[0]["subset"] == "dress" and ranks[0]["candidate"] == "dress00001"
    assert sorted(ranks[0]["ranking"]) == [f"dress{i:05}" for i in range(20)]


def test_search_finds_an_image_by_itself_and_keeps_an_index(tmp_path, pretrained, monkeypatch):
    checkpoint = shutil.copy(pretrained, tmp_path / "last.pt")
    flags, image = f"--task search --checkpoint {checkpoint} --out {tmp_path}/found", f"--image {tmp_path}/query.png"
    config, _, _ = parse_config(f"{flags} --query red".split())
    open_data(config, "val").image(7).save(tmp_path / "query.png")
    results = command(f"{flags} {image}")
    assert results[0][0] == 7 and results[0][1] == pytest.approx(1, abs=1e-4) and len(results) == SEARCH_RESULTS
    assert results == sorted(results, key=lambda row_and_score: -row_and_score[1])
    assert (tmp_path / "found" / "found-query.png").exists()
    reranked = command(f"{flags} --query sleeve --rerank 10")
    scores = [score for _, score in reranked]
    assert {row for row, _ in reranked} == {row for row, _ in command(f"{flags} --query sleeve")}
    assert scores == sorted(scores, reverse=True) and all(0 <= score <= 1 for score in scores)

    flags, index = f"{flags} --index {tmp_path}/features", tmp_path / "features"
    assert command(f"{flags} {image}") == results and index.exists()
    monkeypatch.setattr("evaluation.search.image_features", lambda *_: pytest.fail("the index was not used"))
    both, words = command(f"{flags} {image} --query green"), command(f"{flags} --query red")
    assert len({tuple(row for row, _ in ranking) for ranking in (results, both, words)}) == 3
    assert (tmp_path / "found" / "found-green-query.png").exists()
    state = load_checkpoint(checkpoint)
    state["model"]["vision_proj.bias"] += 1
    torch.save(state, checkpoint)
    with pytest.raises(ConfigError, match="features: of another checkpoint"):
        command(f"{flags} --query red")
    index.write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="features: damaged"):
        command(f"{flags} --query red")


def refusal(out, flags):
    """Run finetune.py with flags that it refuses, and leave no files. -> the message, one line"""
    with pytest.raises(SystemExit) as stop:
        finetune.main([*flags.split(), "--out", str(out)])
    assert str(stop.value).startswith("finetune.py: ") and "\n" not in str(stop.value) and not out.exists()
    return str(stop.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("search", "--task search needs --query, --image or both"),
        ("search --query qqq", "no word of it is in the model's vocabulary"),
        ("search --image no.png", "--image no.png: "),
        ("retrieval --eval-only --resume", "--resume continues a training"),
        ("retrieval --freeze", "--freeze is for --task category or subcategory or entailment"),
        ("category --eval-only", "has no classes yet"),
        ("retrieval --eval-only --lr 1", "--lr is for training"),
        ("entailment --data jsonl", "--task entailment needs --data synthetic or snlive, not jsonl"),
        ("retrieval --split test", "--split test is for --data flickr30k or coco or fashioniq or snlive"),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(tmp_path, pretrained, flags, message):
    assert message in refusal(tmp_path / "new", f"--checkpoint {pretrained} --task {flags}")


def test_bad_checkpoints_are_one_line(tmp_path, pretrained):
    new, tuned = tmp_path / "new", f"--checkpoint {tmp_path}/tgir/best.pt --task"
    for task in ("tgir", "category"):
        command(f"--task {task} --checkpoint {pretrained} --steps 1 --out {tmp_path}/{task}")
    with pytest.raises(ConfigError, match="the run is a fine-tuning of finetune.py --task tgir"):
        resume(tmp_path / "tgir")
    assert "is fine-tuned already" in refusal(new, f"{tuned} category --eval-only")
    assert "is fine-tuned already" in refusal(new, f"{tuned} tgir")
    assert "search needs --image, too" in refusal(new, f"{tuned} search --query red")
    flags = f"--checkpoint {tmp_path}/category/best.pt --task search --query red"
    assert "was fine-tuned for category" in refusal(new, flags)
    state = load_checkpoint(pretrained)
    state["config"]["model"] = {**state["config"]["model"], "width": 64}
    torch.save(state, tmp_path / "other.pt")
    assert "the weights do not fit this model" in refusal(
        new, f"--checkpoint {tmp_path}/other.pt --task tgir --eval-only"
    )
    # existing results are not overwritten
    for flags in ("--steps 1", "--eval-only"):
        with pytest.raises(ConfigError, match="choose another --out"):
            command(f"--task tgir --checkpoint {pretrained} {flags} --out {tmp_path}/tgir")
