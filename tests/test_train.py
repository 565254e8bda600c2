"""Recipes, the loop, resuming, stopping, refusing: end to end on small runs."""

import json
import os
import signal
import subprocess
import sys
import time
import typing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import data
import train
from harness import config as run_config
from harness.checkpoints import config_from_dict, load_checkpoint
from harness.config import MaskSource, ema_decay, learning_rate, parse_config
from harness.flags import ConfigError
from harness.run import NonFiniteLoss, autocast, build_optimizer, build_run
from harness.wiring import accuracy, contrast, momentum_attention, read_layer
from masking import random_patch_mask, word_counts
from measures.pictures import shown_soft_masks
from measures.scores import retrieval_recalls
from measures.truth import mask_truth, negative_truth, truth_in_words, word_truth
from model import PRESETS, VisionLanguageModel
from photos.synthetic import Synthetic
from photos.wardrobe import Product

ROOT = Path(__file__).parent.parent
FAST = ["--image-size", "32", "--width", "32", "--heads", "2", "--vision-layers", "2", "--text-layers", "1",
        "--fusion-layers", "1", "--embed-dim", "16", "--vocab-size", "300", "--products", "12", "--batch-size", "8",
        "--val-products", "10", "--warmup", "2", "--itm-warmup", "2", "--dropout", "0.1"]  # fmt: skip
# soft masks read the gradient in a layer before the last
FAST_FOR = {"softmask": ["--fusion-layers", "2"], "syncmask": [], "fashionfine": [], "albef": []}


@pytest.fixture(autouse=True)
def synchronized_from_the_first_step(monkeypatch):
    """Runs here are too short for a warm-up with random masks."""
    monkeypatch.setitem(run_config.SCHEDULES["tiny"], "mask_warmup", 0)


def run(out, *flags):
    config, given = parse_config([*FAST, "--out", str(out), *flags])
    return train.train(config, given)


def resume(out, *flags):
    config, given = parse_config(["--resume", "--out", str(out), *flags])
    return train.train(config, given)


def checkpoint(out):
    return load_checkpoint(Path(out) / "last.pt")


def lines(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def same_state(one, two):
    for part in ("model", "momentum", "queue"):
        assert all(torch.equal(one[part][name], two[part][name]) for name in one[part] | two[part]), part
    for mine, theirs in zip(one["optimizer"]["state"].values(), two["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert str(one["sampler"]) == str(two["sampler"]) and one["step"] == two["step"]


# -------------------------------------------------------------------------------------- the whole thing


def test_a_run_leaves_what_it_promises(tmp_path):
    final = run(tmp_path, "--steps", "4", "--val-every", "2", "--log-every", "1")
    left = ["config.json", "curves.png", "last.pt", "masks.png", "metrics.jsonl"]
    assert sorted(p.name for p in tmp_path.iterdir()) == left
    written = lines(tmp_path)
    training = [line for line in written if "loss" in line]
    documented = set(train.__doc__.replace(",", " ").split())
    promised = "step epoch loss itc itm mlm mim lr temp grad_norm itm_accuracy mlm_accuracy unreadable conflicts samples_per_second"
    for key in promised.split():
        assert key in training[0] and key in documented
    assert training[0].keys() - documented == set()
    assert [line["step"] for line in training] == [1, 2, 3, 4]
    assert training[0]["loss"] == pytest.approx(sum(training[0][k] for k in ("itc", "itm", "mlm", "mim")), abs=1e-4)
    known = [
        "attribute_share",
        "word_cooccurrence",
        "detail_cooccurrence",
        "patch_cooccurrence",
        "pointing",
        "pointing_whole",
    ]
    known = [key + end for key in known for end in ("", "_random")] + ["visible_word_accuracy", "unseen_word_accuracy"]
    known += [key + end for key in ("false_negative_rate", "negative_similarity") for end in ("", "_random", "_hard")]
    assert {key.removesuffix("_random").removesuffix("_hard") for key in known} <= documented
    assert all(0 <= written[-1][key] <= 1 for key in known if "similarity" not in key)
    held_out = [f"val_{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)] + [
        "val_mlm_accuracy",
        "val_itm_accuracy",
        "val_unreadable",
        *known,
    ]
    assert [line["step"] for line in written if "val_i2t_r1" in line and "final" not in line] == [2, 4]
    assert written[-1] == json.loads(
        json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in final.items()})
    )
    assert written[-1]["final"] is True and {*held_out, "seconds", "peak_memory_mib"} <= written[-1].keys()
    saved = config_from_dict(json.loads((tmp_path / "config.json").read_text()))
    assert saved == config_from_dict(checkpoint(tmp_path)["config"]) and saved.model.width == 32


@pytest.mark.parametrize(
    "flags",
    [
        ["--search-size", "10", "--margin", "0.1", "--mask-warmup", "2", "--mask-hint", "0.3"],
        ["--queue", "20", "--accumulate", "2", "--itm-negatives", "similar", "--alpha", "0.4", "--patch-mask", "block"],
        ["--precision", "bf16", "--color-jitter", "0.2", "--mask-source", "gradcam", "--fusion-layers", "2"],
        ["--recipe", "albef", "--sampler", "hard", "--alpha", "0.4"],
        ["--recipe", "softmask", "--fusion-layers", "2", "--alpha", "0.4"],
        ["--recipe", "fashionfine", "--alpha", "0.4", "--queue", "20"],
        ["--recipe", "fashionfine", "--no-prompts", "--no-alignment", "--precision", "bf16"],
    ],
)
def test_three_and_three_resumed_steps_equal_six_bitwise(tmp_path, flags):
    """Six steps cross an epoch: 12 products have about 42 photos, six batches of eight."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run(whole, "--steps", "6", *flags)
    assert run(halves, "--steps", "6", "--stop-at", "3", *flags) is None
    assert checkpoint(halves)["step"] == 3
    resume(halves)
    same_state(checkpoint(whole), checkpoint(halves))
    mine, theirs = lines(whole), lines(halves)
    assert {k: v for k, v in mine[-1].items() if k.startswith("val")} == {
        k: v for k, v in theirs[-1].items() if k.startswith("val")
    }


def test_workers_change_nothing(tmp_path, capsys):
    run(tmp_path / "none", "--steps", "3", "--prompts", "--max-length", "30")
    assert "100 % of the training texts are cut at 30 tokens; see --max-length" in capsys.readouterr().out
    run(tmp_path / "two", "--steps", "3", "--prompts", "--max-length", "30", "--workers", "2")
    same_state(checkpoint(tmp_path / "none"), checkpoint(tmp_path / "two"))


@pytest.mark.parametrize("recipe", train.RECIPES)
def test_overfits_one_batch(recipe):
    """Four products, no crop, no soft targets: every objective goes down to its floor."""
    torch.manual_seed(0)
    flags = ["--dropout", "0", "--alpha", "0", "--itm-negatives", "random", *FAST_FOR[recipe]]
    config, _ = parse_config([*FAST, "--recipe", recipe, *flags])
    dataset = Synthetic("train", 4, 32, progress=False)
    dataset.prompts = config.prompts
    tokenizer = data.build_tokenizer(dataset.captions, 300, config.model.max_length, frames=config.prompts)
    state = build_run(config, dataset, tokenizer)
    one_of_each = [list(dataset.product_ids).index(p) for p in range(4)]
    batch = data.Collate(tokenizer)([dataset[row] for row in one_of_each])
    batch["images"] = data.normalise(batch["images"])
    first = None
    for step in range(300 if recipe == "syncmask" else 200):  # synchronized masks vary while the momentum model learns
        for group in state.optimizer.param_groups:
            group["lr"] = 3e-3
        state.generator, state.step = torch.Generator().manual_seed(7), step  # the same random draws each time
        losses, figures = train.RECIPES[recipe](state, batch)
        sum(losses.values()).backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.model.clamp_temp()
        state.momentum.update(state.model, 0.8)
        first = first or {k: v.item() for k, v in losses.items()}
        if step == 40:  # it starts at 0, and grows over the first epoch
            first["align"] = losses.get("align", torch.zeros(())).item()
    assert losses["itc"] < 0.2 * first["itc"] and losses["itm"] < 0.1 and losses["mlm"] < 0.2 * first["mlm"]
    assert figures["itm_accuracy"] == 1 and figures["mlm_accuracy"] > 0.9
    assert "mim" not in losses or losses["mim"] < 0.6 * first["mim"]
    if recipe == "fashionfine":
        assert losses["rtd"] < 0.1 * first["rtd"] and figures["replaced_recall"] == 1
        assert losses["align"] < first["align"] and losses["align"] < 0.1


@pytest.mark.parametrize("recipe", train.RECIPES)
def test_no_gradient_reaches_the_momentum_model_and_every_parameter_gets_one(recipe):
    config, _ = parse_config(
        [*FAST, "--recipe", recipe, "--registers", "2", "--fusion-layers", "2", "--mask-source", "gradcam"]
    )
    dataset = Synthetic("train", 8, 32, progress=False)
    dataset.prompts = config.prompts
    tokenizer = data.build_tokenizer(dataset.captions, 300, config.model.max_length, frames=config.prompts)
    state = build_run(config, dataset, tokenizer)
    state.generator, state.step = torch.Generator().manual_seed(0), 1
    batch = data.Collate(state.tokenizer)([dataset[row] for row in range(0, 24, 3)])
    batch["images"] = data.augment(batch["images"], generator=state.generator)
    losses, _ = train.RECIPES[recipe](state, batch)
    sum(losses.values()).backward()
    assert all(p.grad is None for p in state.momentum.parameters())
    silent = [name for name, p in state.model.named_parameters() if p.grad is None or not p.grad.any()]
    if "mim" not in losses:
        silent = [name for name in silent if not name.startswith("decoder.")]
    assert all("key.bias" in name for name in silent), silent  # softmax does not feel a constant shift of its keys


def first_losses(*flags, weights=None):
    """Losses of the first batch of a fixed model, or of one with some of another's weights; the run, the batch."""
    config, _ = parse_config([*FAST, "--fusion-layers", "2", "--dropout", "0", "--alpha", "0", *flags])
    dataset = Synthetic("train", 8, 32, progress=False)
    dataset.prompts = config.prompts
    tokenizer = data.build_tokenizer(dataset.captions, 300, config.model.max_length, frames=config.prompts)
    state = build_run(config, dataset, tokenizer)
    state.model.load_state_dict(weights or {}, strict=False)
    state.momentum.update(state.model, decay=0)
    state.generator, state.step = torch.Generator().manual_seed(0), 100
    batch = data.Collate(state.tokenizer)([dataset[row] for row in range(0, 24, 3)])
    batch["images"] = data.augment(batch["images"], 0.8, 0.0, state.generator, config.distort)
    return train.RECIPES[config.recipe](state, batch)[0], state, batch


def test_each_part_of_soft_masks_is_a_switch_and_without_them_it_is_the_base():
    parts = {"soft_mask": "--no-soft-mask", "mask_text": "--no-mask-text", "focal": "--focal-gamma=0"}
    off = ["--recipe", "softmask", "--distort", "0", "--mlm-ratio", "0.3"]
    base, _, _ = first_losses("--recipe", "albef", "--mlm-ratio", "0.3")
    none, _, _ = first_losses(*off, *parts.values())
    assert all(none[key].item() == pytest.approx(base[key].item(), rel=1e-5) for key in base)
    moved = {"soft_mask": {"itm"}, "mask_text": {"itc", "itm"}, "focal": {"itc"}}
    for part, changed in moved.items():
        alone, _, _ = first_losses(*off, *(flag for other, flag in parts.items() if other != part),
                                   *(["--focal-gamma", "2"] if part == "focal" else []))  # fmt: skip
        differ = {key for key in base if abs(alone[key].item() - base[key].item()) > 1e-5}
        assert changed <= differ <= changed | {"mlm"} - ({"mlm"} if part != "mask_text" else set()), (part, differ)


def test_each_part_of_fashionfine_is_a_switch():
    """Without local tokens, alignment, detector and focal loss, what is left is the base on one masked text."""
    parts = {
        "adapter": ["--local-image", "0", "--local-text", "0"], "alignment": ["--no-alignment"],
        "detector": ["--no-detector"], "focal": ["--focal-gamma", "0", "--itc-weight", "1"],
    }  # fmt: skip
    flat = lambda chosen: [flag for flags in chosen for flag in flags]
    _, whole, _ = first_losses("--recipe", "fashionfine")
    weights = whole.model.state_dict()
    none, state, _ = first_losses("--recipe", "fashionfine", *flat(parts.values()), weights=weights)
    assert none.keys() == {"itc", "itm", "mlm"}
    assert all(module is None for module in (state.model.adapter, state.model.phrases, state.model.detector))
    moved = {"adapter": "itc", "alignment": "align", "detector": "rtd", "focal": "itc"}
    for part, changed in moved.items():
        others = flat(flags for other, flags in parts.items() if other != part)
        alone, _, _ = first_losses("--recipe", "fashionfine", *others, weights=weights)
        differ = {key for key in alone if key not in none or abs(alone[key].item() - none[key].item()) > 1e-5}
        assert {changed} <= differ <= {changed, "itm"}, (part, differ)  # other similarities, other negatives


def test_gradients_of_fashionfine_flow_where_they_should_and_nowhere_else():
    reached = {
        "itc": {"vision", "text", "vision_proj", "text_proj", "adapter", "temp"},
        "align": {"vision", "text", "vision_proj", "text_proj", "adapter", "phrases"},
        "itm": {"vision", "text", "fusion", "itm_head"},
        "mlm": {"vision", "text", "fusion", "mlm_head", "mlm_bias"},
        "rtd": {"vision", "text", "fusion", "detector"},
    }
    losses, state, batch = first_losses("--recipe", "fashionfine", "--queue", "20")
    assert losses.keys() == reached.keys()
    names, parameters = zip(*state.model.named_parameters(), strict=True)
    for key, loss in losses.items():
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        moved = {name.split(".")[0] for name, g in zip(names, gradients, strict=True) if g is not None and g.any()}
        assert moved == reached[key], key
    # keys are the momentum model's, of [CLS] alone and of the clean text
    keys = state.momentum.project_text(state.momentum.encode_text(batch["token_ids"], batch["attention_mask"]))
    torch.testing.assert_close(state.queue.filled()[1], keys)
    torch.testing.assert_close(
        state.queue.filled()[0], state.momentum.project_image(state.momentum.encode_image(batch["images"]))
    )


def test_hard_negative_mining_equals_a_loop_over_batch_and_queue():
    """HNM-F: 0.25 · focal ITC of integrated features against momentum keys of [CLS] alone, one target an own entry."""
    _, state, batch = first_losses("--recipe", "fashionfine", "--queue", "6")
    generator = torch.Generator().manual_seed(1)
    unit = lambda n: torch.nn.functional.normalize(torch.randn(n, 16, generator=generator), dim=1)
    old = unit(6), unit(6), torch.tensor([0, 1, 1, 90, 91, 92])
    state.queue.pushed.zero_()
    state.queue.push(*old)
    image_feat, text_feat = unit(8).requires_grad_(), unit(8).requires_grad_()
    keys = unit(8), unit(8)
    products = batch["product_ids"].tolist()
    ours, _, _ = contrast(state, batch, image_feat, text_feat, *keys)
    naive, owners = 0, products + old[2].tolist()
    for queries, own, older in ((image_feat, keys[1], old[1]), (text_feat, keys[0], old[0])):
        for b, query in enumerate(queries):
            scores = [query.double() @ key.double() / state.model.temp.item() for key in [*own, *older]]
            total = sum(torch.exp(score) for score in scores)
            right = [j for j, owner in enumerate(owners) if owner == products[b]]
            for j in right:
                p = torch.exp(scores[j]) / total
                naive = naive - 0.25 * (1 - p) ** 2 * torch.log(p) / len(right) / 8 / 2
    assert ours.item() == pytest.approx(naive.item(), rel=1e-5)
    mine, theirs = (torch.autograd.grad(loss, (image_feat, text_feat)) for loss in (ours, naive))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_soft_masks_suppress_patches_and_pass_no_gradient_through_the_mask():
    _, state, batch = first_losses("--recipe", "softmask")
    model, keep = state.model, batch["attention_mask"]
    image_embeds = model.encode_image(batch["images"]).detach().requires_grad_()
    fused, attentions = model.fuse(model.encode_text(batch["token_ids"], keep), keep, image_embeds, True)
    words = batch["words"].clone()
    words[2] = False  # a text without a readable word
    soft = train.soften(state, words, fused, attentions, image_embeds)
    share = (soft / image_embeds).detach()
    assert torch.equal(soft[:, 0], image_embeds[:, 0]) and torch.equal(soft[2], image_embeds[2])
    left = share[[0, 1, 3], 1:].mean(dim=2)
    assert left.amin(dim=1).max() < 0.7 and torch.allclose(left.amax(dim=1), torch.ones(3))
    (gradient,) = torch.autograd.grad(soft.sum(), image_embeds)
    assert torch.allclose(gradient, share, atol=1e-5)  # (1 − M), nothing by way of M itself


# ----------------------------------------------------------------------------- interruption and damage


def start(out, *flags):
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "train.py", *FAST, "--out", str(out), *flags]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_steps(process, out, count=1):
    deadline = time.time() + 60
    while time.time() < deadline and process.poll() is None:
        if (Path(out) / "last.pt").exists() and len((Path(out) / "metrics.jsonl").read_text().splitlines()) >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"no step was done: {process.communicate()[0]}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_cleanly(tmp_path, number):
    process = start(tmp_path, "--steps", "100000", "--save-every", "1", "--log-every", "1", "--workers", "1")
    wait_for_steps(process, tmp_path)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "Traceback" not in output
    assert f"({number.name}); saved in" in output
    step = checkpoint(tmp_path)["step"]
    assert lines(tmp_path)[-1]["step"] == step
    assert resume(tmp_path, "--stop-at", str(step + 1)) is None and checkpoint(tmp_path)["step"] == step + 1


def test_kill_at_any_moment_leaves_a_loadable_checkpoint(tmp_path):
    for attempt in range(3):
        process = start(tmp_path / str(attempt), "--steps", "100000", "--save-every", "1", "--log-every", "1")
        wait_for_steps(process, tmp_path / str(attempt), count=2)
        time.sleep(0.113 * attempt)
        process.kill()
        process.communicate()
        step = checkpoint(tmp_path / str(attempt))["step"]
        with open(tmp_path / str(attempt) / "metrics.jsonl", "a") as file:
            file.write('{"step": 999')  # a line half written
        resume(tmp_path / str(attempt), "--stop-at", str(step + 2))
        steps = [line["step"] for line in lines(tmp_path / str(attempt)) if "loss" in line]
        assert steps == sorted(set(steps)) and steps[-1] == step + 2


def test_a_gradient_that_is_not_finite_stops_too(tmp_path, monkeypatch):
    recipe = train.RECIPES["syncmask"]

    def poisoned(state, batch):
        losses, figures = recipe(state, batch)
        root = torch.sqrt(state.model.temp * 0)  # value 0, gradient infinite
        return losses | {"itm": losses["itm"] + (root if state.step == 3 else 0)}, figures

    monkeypatch.setitem(train.RECIPES, "syncmask", poisoned)
    with pytest.raises(NonFiniteLoss, match=r"step 4: .*grad_norm nan"):
        run(tmp_path, "--steps", "6", "--save-every", "1")
    state = checkpoint(tmp_path)
    assert state["step"] == 3 and all(p.isfinite().all() for p in state["model"].values())


def test_an_unforeseen_error_ends_the_run_with_its_workers(tmp_path):
    code = "import train; train.RECIPES['syncmask'] = lambda run, batch: 1 / 0; train.main()"
    command = [sys.executable, "-c", code, *FAST, "--out", str(tmp_path), "--workers", "2"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and "ZeroDivisionError" in ended.stderr
    config, given = parse_config([*FAST, "--out", str(tmp_path), "--steps", "1"])
    assert train.train(config, given)["step"] == 1  # nothing was saved, so the folder may be used again


def test_a_step_without_a_readable_photo_is_passed_over(tmp_path, monkeypatch):
    collate = data.Collate.__call__
    empty = lambda items: {"rows": torch.zeros(0, dtype=torch.long), "unreadable": ["2.png: broken"]}
    monkeypatch.setattr(
        data.Collate, "__call__", lambda self, items: empty(items) if items[0]["row"] % 3 == 0 else collate(self, items)
    )
    monkeypatch.setattr(train, "validate", lambda run, dataset: {"val_i2t_r1": 0.5})
    monkeypatch.setattr(train, "truth", lambda run, train_set, val_set: {})
    final = run(tmp_path, "--steps", "6", "--log-every", "1")
    assert final["step"] == 6 and final["val_i2t_r1"] == 0.5
    assert 0 < len([line for line in lines(tmp_path) if "loss" in line]) < 6


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    recipe = train.RECIPES["syncmask"]

    def poisoned(state, batch):
        losses, figures = recipe(state, batch)
        return losses | {"itm": losses["itm"] * (float("nan") if state.step == 3 else 1)}, figures

    monkeypatch.setitem(train.RECIPES, "syncmask", poisoned)
    with pytest.raises(NonFiniteLoss, match=r"step 4: the loss or its gradient is not finite .*itm nan.*last.pt"):
        run(tmp_path, "--steps", "6", "--save-every", "1")
    state = checkpoint(tmp_path)
    assert state["step"] == 3 and all(p.isfinite().all() for p in state["model"].values())


# ------------------------------------------------------------------------------------------ data sets


@pytest.mark.parametrize("recipe", train.RECIPES)
def test_every_data_set_trains(tmp_path, recipe):
    data.main(["export-fashiongen", str(tmp_path / "fg"), "--items", "10"])
    folder = tmp_path / "shop"
    folder.mkdir()
    drawn = Synthetic("train", 10, 48, progress=False)
    with open(folder / "train.jsonl", "w") as file:
        for row in range(len(drawn)):
            drawn.photos[row].save(folder / f"{row}.jpg")
            file.write(
                json.dumps(
                    {"image": f"{row}.jpg", "caption": drawn.captions[row], "product_id": int(drawn.product_ids[row])}
                )
                + "\n"
            )
    (folder / "5.jpg").write_bytes((folder / "5.jpg").read_bytes()[:300])
    sizes = [flag for flag in FAST if flag not in ("--products", "12")]
    for name, root in (("fashiongen", tmp_path / "fg"), ("jsonl", folder)):
        flags = [
            "--recipe",
            recipe,
            *FAST_FOR[recipe],
            "--preset",
            "tiny",
            "--steps",
            "5",
            "--out",
            str(tmp_path / name),
        ]
        config, given = parse_config([*sizes, *flags, "--data", name, "--root", str(root)])
        assert train.train(config, given)["step"] == 5
    assert (
        lines(tmp_path / "jsonl")[-2]["step"] == 5
        and max(line.get("unreadable", 0) for line in lines(tmp_path / "jsonl")) == 1
    )


def test_every_other_flag_runs(tmp_path):
    """What the defaults and the other tests leave alone, on the schedule of `base`, for one epoch."""
    flags = "--preset base --epochs 1 --seed 3 --clip 0.5 --weight-decay 0.1 --ema-decay 0.9 --crop-scale 0.9"
    flags += (
        " --mlm-ratio 0.3 --sampler hard --itm-negatives hard --patch-size 16 --max-length 16 --registers 2 --workers 0"
        " --mim-ratio 0.25 --mim-weight 0.5 --mim-layers 2 --word-mask random --word-score mass --mask-layer 1"
        " --mask-heads max --mask-noise 0.2 --mask-source attention --patch-layer 1 --patch-score all --itm-share 0.5"
        " --mask-warmup 2"
    )
    final = run(tmp_path, *flags.split(), "--no-compile", "--cls-context")
    config = config_from_dict(checkpoint(tmp_path)["config"])
    assert final["step"] == 6 and config.queue == 0 and config.model.grid == 2 and config.clip == 0.5


def test_text_and_whole_weights_can_be_given(tmp_path, capsys):
    (tmp_path / "vocab.txt").write_text(
        "\n".join([*data.SPECIAL_TOKENS, *"abcdefghij", *("##" + c for c in "abcdefghij")])
    )
    torch.save({"bert.embeddings.LayerNorm.weight": torch.full((32,), 0.5)}, tmp_path / "bert.bin")
    torch.save({"model": {"itm_head.bias": torch.tensor([0.25, -0.25])}}, tmp_path / "albef.pth")
    flags = [flag for flag in FAST if flag not in ("--vocab-size", "300")] + ["--vocab", str(tmp_path / "vocab.txt")]
    for name, flag, key in (
        ("bert.bin", "--text-weights", "text.norm.weight"),
        ("albef.pth", "--weights", "itm_head.bias"),
    ):
        given = [
            flag,
            str(tmp_path / name),
            "--lr",
            "0",
            "--final-lr",
            "0",
            "--steps",
            "1",
            "--out",
            str(tmp_path / key),
        ]
        train.main([*flags, *given])
        assert "1 tensors loaded" in capsys.readouterr().out
        assert checkpoint(tmp_path / key)["model"][key].abs().max() in (0.5, 0.25)


def test_resuming_on_other_data_is_refused(tmp_path):
    run(tmp_path, "--steps", "2", "--stop-at", "1")
    state = checkpoint(tmp_path)
    torch.save(state | {"data": 1}, tmp_path / "last.pt")
    with pytest.raises(ConfigError, match="other rows than the training split holds now"):
        resume(tmp_path)
    torch.save(state | {"config": state["config"] | {"colour": 1}}, tmp_path / "last.pt")
    with pytest.raises(ConfigError, match="another version of this code"):
        resume(tmp_path)


def test_similarities_stay_in_full_precision_under_bf16():
    config, _ = parse_config([*FAST, "--precision", "bf16"])
    dataset = Synthetic("train", 8, 32, progress=False)
    state = build_run(config, dataset, data.build_tokenizer(dataset.captions, 300, 64))
    batch = data.Collate(state.tokenizer)([dataset[row] for row in range(6)])
    with autocast(state):
        image_embeds = state.model.encode_image(data.normalise(batch["images"]))
        text_embeds = state.model.encode_text(batch["token_ids"], batch["attention_mask"])
        feats = state.model.project_image(image_embeds), state.model.project_text(text_embeds)
        _, sim_i2t, _ = contrast(state, batch, *feats, *feats)
    assert sim_i2t.dtype == torch.float32
    features = state.features[0].double()
    exact = features @ state.features[1].double().T / state.model.temp.item()
    assert (sim_i2t.double() - exact).abs().max() < 0.05


def test_a_vocabulary_and_vision_weights_can_be_given(tmp_path, capsys):
    run(tmp_path / "first", "--steps", "1")
    words = json.loads(checkpoint(tmp_path / "first")["tokenizer"])["model"]["vocab"]
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(words, key=words.get)) + "\n")
    state = checkpoint(tmp_path / "first")["model"]
    vision = {"cls_token": state["vision.cls_token"], "pos_embed": state["vision.position_embed"]}
    torch.save(vision, tmp_path / "vit.pth")
    flags = [flag for flag in FAST if flag not in ("--vocab-size", "300")]
    given = [
        "--vocab",
        str(tmp_path / "vocab.txt"),
        "--vision-weights",
        str(tmp_path / "vit.pth"),
        "--lr",
        "0",
        "--final-lr",
        "0",
    ]
    train.main([*flags, "--out", str(tmp_path / "second"), "--steps", "1", *given])
    assert "2 tensors loaded" in capsys.readouterr().out
    assert torch.equal(checkpoint(tmp_path / "second")["model"]["vision.cls_token"], state["vision.cls_token"])
    assert checkpoint(tmp_path / "second")["config"]["model"]["vocab_size"] == len(words)


def test_compiled_run_equals_eager(tmp_path, monkeypatch):
    """With the backend that compiles nothing: what is tested is our use of it, not the compiler."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_module(self, backend="eager"))
    run(tmp_path / "eager", "--steps", "2")
    run(tmp_path / "compiled", "--steps", "2", "--compile")
    one, two = checkpoint(tmp_path / "eager")["model"], checkpoint(tmp_path / "compiled")["model"]
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name])


def test_soft_masks_of_a_compiled_model_are_drawn(monkeypatch):
    """With a backend that, unlike "eager", traces the backward pass too, and so cuts the way of a gradient."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_module(self, backend="aot_eager"))
    masks = []
    for flags in ([], ["--compile"]):
        config, _ = parse_config([*FAST, "--fusion-layers", "2", *flags])
        dataset = data.build_dataset("synthetic", None, "train", 32, 0, 2)
        state = build_run(config, dataset, data.build_tokenizer(dataset.captions, 300, 64))
        batch = data.Collate(state.tokenizer)([dataset[0], dataset[1]])
        masks.append(shown_soft_masks(state, batch, torch.Generator().manual_seed(0))[0][1])
    torch.testing.assert_close(*masks)


# --------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--stepps", "3"], "unknown flag --stepps; did you mean --steps?"),
        (["--step", "3"], "unknown flag --step"),
        (["--steps", "3", "--epochs", "1"], "--steps and --epochs contradict each other"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--search-size", "64"], "--search-size 64 groups nothing unless it is above --batch-size"),
        (["--mlm-ratio", "1.5"], "--mlm-ratio 1.5: must be between 0 and 1"),
        (["--recipe", "clip"], "invalid choice: 'clip'"),
        (["--batch-size", "many"], "invalid int value: 'many'"),
        (["--mask-layer", "3"], "--mask-layer 3: there are 2 fusion layers"),
        (["--mask-source", "gradcam", "--mask-layer", "2"], "gradcam cannot read the last layer"),
        (["--mask-source", "gradcam", "--fusion-layers", "1"], "gradcam needs two --fusion-layers"),
        (["--mask-source", "gradcam", "--compile"], "--compile contradicts --mask-source gradcam"),
        (["--recipe", "albef", "--mim-layers", "2"], "--mim-layers is for --recipe syncmask"),
        (["--no-soft-mask"], "--soft-mask is for --recipe softmask, not for syncmask"),
        (["--recipe", "softmask", "--mask-source", "hidden", "--mask-layer", "2"], "before the last of two or more"),
        (["--recipe", "softmask", "--mim-weight", "2"], "--mim-weight is for --recipe syncmask, not for softmask"),
        (["--recipe", "albef", "--word-mask", "sync"], "--word-mask is for --recipe syncmask, not for albef"),
        (["--prompts", "--max-length", "9"], "--max-length 9: --prompts need 16 at least"),
        (["--alignment"], "--alignment is for --recipe fashionfine, not for syncmask"),
        (
            ["--recipe", "fashionfine", "--no-prompts"],
            "--alignment needs --prompts, which bring the category symbol; give --no-alignment too",
        ),
        (["--root", "x"], "--root is for data from files"),
        (["--data", "jsonl", "--products", "9"], "--products is for synthetic photos"),
        (["--data", "jsonl", "--root", "/nowhere"], "/nowhere: no such folder"),
        (["--text-weights", "x"], "need --vocab"),
        (["--weights", "x", "--vision-weights", "y", "--vocab", "z"], "--weights contradicts"),
        (["--vocab", "x", "--vocab-size", "9"], "--vocab-size contradicts --vocab"),
        (["--image-size", "60"], "not a multiple of patch_size"),
        (["--device", "cuda:99"], "no such GPU"),
        (["--device", "gpu"], "--device gpu"),
        (["--device", "meta"], "--device meta: cpu or cuda"),
        (["--vision-layers", "1", "--products", "1"], "--products 1: must be at least 2"),  # not: patch_layer 2
        (["--patch-layer", "5"], "patch_layer 5: there are 4 ViT layers"),
        (["--clip", "0"], "--clip 0.0: must be at least"),
        (["--patch-size", "0"], "patch_size 0 is less than 1"),
        (["--out", "/dev/null/x", "--products", "2"], "/dev/null/x"),
        (["--vision-weights", "/nowhere.pth", "--products", "2"], "/nowhere.pth: no such weights file"),
        (["--resume", "--out", "/nowhere"], "/nowhere/last.pt: no such checkpoint"),
    ],
)
def test_bad_flags_are_one_clear_line(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        train.main(flags)
    said = capsys.readouterr().err + (caught.value.code if isinstance(caught.value.code, str) else "")
    said = said.strip().splitlines()[-1]
    assert message in said and said.startswith("train.py: ")
    assert not (tmp_path / "runs").exists()


def test_precedence_defaults_preset_recipe_flags():
    config, _ = parse_config(["--recipe", "albef"])
    assert (config.preset, config.steps, config.model) == (
        "tiny",
        run_config.SCHEDULES["tiny"]["steps"],
        PRESETS["tiny"],
    )
    assert config.weight_decay == 0.02 and config.out == "runs/synthetic-albef-tiny"
    assert config.itm_negatives == run_config.SCHEDULES["tiny"]["itm_negatives"]
    config, _ = parse_config([])
    assert config.recipe == "syncmask" and config.model == replace(
        PRESETS["tiny"], registers=4, cls_context=False, patch_layer=2
    )
    assert config.itm_negatives == "semihard" and parse_config(["--itm-negatives", "hard"])[0].itm_negatives == "hard"
    config, _ = parse_config(["--epochs", "2", "--lr", "0.1", "--registers", "4"])
    assert (config.steps, config.epochs, config.lr, config.model.registers) == (None, 2, 0.1, 4)
    config, _ = parse_config(["--data", "fashiongen"])
    assert config.preset == "base" and config.model.width == PRESETS["base"].width
    assert config.queue == 0 and parse_config(["--preset", "base", "--recipe", "albef"])[0].queue == 65536
    config, _ = parse_config(["--no-compile", "--data", "jsonl"])
    assert config.compile is False and config.preset == "small"


def test_resume_refuses_flags_that_change_the_result_and_runs_are_not_overwritten(tmp_path):
    run(tmp_path, "--steps", "2")
    with pytest.raises(ConfigError, match="--lr 0.5 contradicts the run to resume"):
        resume(tmp_path, "--lr", "0.5")
    with pytest.raises(ConfigError, match="--width 64 contradicts"):
        resume(tmp_path, "--width", "64")
    before = lines(tmp_path)[-1]
    assert {k: v for k, v in resume(tmp_path, "--vocab-size", "300").items() if k.startswith("val")} == {
        k: v for k, v in before.items() if k.startswith("val")
    }  # finished already: the same final line
    with pytest.raises(ConfigError, match="--stop-at 1: the run is at step 2"):
        resume(tmp_path, "--stop-at", "1")
    with pytest.raises(ConfigError, match="--root is for data from files"):
        resume(tmp_path, "--root", "x")
    with pytest.raises(ConfigError, match="holds a run already; add --resume"):
        run(tmp_path, "--steps", "2")
    (tmp_path / "last.pt").write_text("something else")
    with pytest.raises(ConfigError, match="not a checkpoint of train.py"):
        resume(tmp_path)


# -------------------------------------------------------------------------------- schedules and metrics


def test_learning_rate_warms_up_and_falls_along_a_cosine():
    config = replace(parse_config([])[0], lr=1.0, final_lr=0.1, warmup=10)
    rates = [learning_rate(step, config, 111) for step in range(111)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_alpha_ramps_over_the_first_epoch_and_negatives_start_random():
    dataset = Synthetic("train", 12, 32, progress=False)
    config, _ = parse_config(
        [*FAST, "--alpha", "0.4", "--itm-negatives", "hard", "--itm-share", "0.6", "--itm-warmup", "10"]
    )
    state = build_run(config, dataset, data.build_tokenizer(dataset.captions, 300, 64))
    seen = []
    for step in (0, 1, 10, 15, 1000):
        state.step = step
        seen.append((state.alpha, state.hard_share))
    assert seen[0] == (0.0, 0.0) and seen[2][1] == 0 and seen[3][1] == pytest.approx(0.3) and seen[4] == (0.4, 0.6)
    assert seen[1][0] == pytest.approx(0.4 / state.epoch_steps)
    assert ema_decay(0, 0.99) == 0.1 and ema_decay(10**6, 0.99) == 0.99
    state.generator = torch.Generator().manual_seed(0)
    sim, forbidden = torch.arange(200.0).expand(200, 200), torch.zeros(200, 200, dtype=torch.bool)
    assert 0.45 < (state.negatives(sim, forbidden) == 199).float().mean() < 0.75  # 0.6 of them the hardest one
    assert replace(state, config=replace(config, itm_warmup=0), step=0).hard_share == 0.6


def test_weight_decay_is_on_matrices_only():
    config, _ = parse_config([*FAST, "--registers", "2"])
    with torch.device("meta"):
        model = VisionLanguageModel(config.model)
    decayed, rest = build_optimizer(model, config).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(names) == len(decayed["params"]) + len(rest["params"])
    assert decayed["weight_decay"] == 0.02 and rest["weight_decay"] == 0
    assert "vision.patch_embed.weight" in {names[id(p)] for p in decayed["params"]}
    for parameter in decayed["params"]:
        name = names[id(parameter)]
        assert name.endswith("weight") and not any(part in name for part in ("norm", "word_embeddings"))


def test_retrieval_recall_by_hand():
    """Three products with 2, 1, 1 photos on a line of similarity; ranks worked out on paper."""
    text = torch.eye(3)
    image = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.5], [0.1, 0.7, 0.6], [0.3, 0.4, 0.6]])
    owner, products = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 2])
    recalls = retrieval_recalls(image, text, owner, products, ranks=(1, 2, 3))
    # photo → text ranks: 0, 2 (0.2 below 0.8 and 0.5), 0, 0
    assert [recalls[f"i2t_r{k}"] for k in (1, 2, 3)] == pytest.approx([0.75, 0.75, 1.0])
    # text 0: best photo 0 first. text 1: own 0.7 behind 0.8 of product 0. text 2: own 0.6 ties with photo 2: counted against
    assert [recalls[f"t2i_r{k}"] for k in (1, 2, 3)] == pytest.approx([1 / 3, 1.0, 1.0])


class Oracle:
    """Stands in for a momentum model: gives every photo and text the feature that the test wants it to have."""

    def __init__(self, dataset, image_feat, text_feat):
        self.of_photo = {dataset[row]["image"].numpy().tobytes(): feat for row, feat in enumerate(image_feat)}
        self.texts, self.feats = dataset, text_feat

    def encode_image(self, images):
        return images

    def project_image(self, images):
        pixels = (
            images * images.new_tensor(data.IMAGENET_STD)[:, None, None]
            + images.new_tensor(data.IMAGENET_MEAN)[:, None, None]
        )
        return torch.stack([self.of_photo[image.numpy().tobytes()] for image in (pixels * 255).round().byte()])

    def encode_text(self, ids, keep):
        return ids

    def project_text(self, ids):
        whole = [tuple(e.ids) for e in self.tokenizer.encode_batch(self.texts.captions)]
        return torch.stack(
            [self.feats[next(i for i, t in enumerate(whole) if t[: len(row)] == tuple(row))] for row in ids.tolist()]
        )


def test_false_negatives_are_counted_by_hand():
    """Four products seen from the front. 0: a navy shirt with a red logo. 1: the same without it, so its text fits
    photo 0, but not the other way round. 2: the shirt in teal. 3: a bag. Similarities are chosen so that the hardest
    negatives are 0 <-> 1 and 2 <-> 3, above the own pair, and the semi-hard ones 0 <-> 2 and 1 <-> 3."""
    shirt = Product("shirt", "navy", None, "long", "spread", (("logo", "red", ""),), "Logo shirt")
    products = [
        shirt,
        replace(shirt, details=(), marked_caption="Plain shirt"),
        replace(shirt, colour="teal", marked_caption="Teal shirt"),
        Product("tote bag", "pink", None, None, None, (), "Pink bag"),
    ]
    dataset = Synthetic("train", 4, 64, progress=False)
    dataset.products, dataset.rows = products, [(i, "front") for i in range(4)]
    dataset.captions = [product.marked_caption for product in products]
    dataset.product_ids = dataset.caption_ids = torch.arange(4).numpy()
    dataset.photos = [dataset._render(row)[0] for row in range(4)]
    own, above, below, far = 0.75, 0.9, 0.5, 0.1
    sim = torch.tensor(
        [[own, above, below, far], [above, own, far, below], [below, far, own, above], [far, below, above, own]]
    )
    config, _ = parse_config(
        [*FAST, "--image-size", "64", "--patch-size", "16", "--batch-size", "4", "--search-size", "5"]
    )
    state = build_run(config, dataset, data.build_tokenizer(dataset.captions, 300, 64))
    state.momentum = Oracle(dataset, sim, torch.eye(4))
    state.momentum.tokenizer = state.tokenizer
    figures = negative_truth(state, dataset)
    # hard: photo 0 gets text 1 (false), photo 1 text 0 (true negative: it shows no logo), 2 and 3 each other's;
    # texts the same way round: text 1 gets photo 0 (false)
    assert figures["false_negative_rate_hard"] == pytest.approx(2 / 8)
    assert figures["negative_similarity_hard"] == pytest.approx(above)
    assert figures["false_negative_rate"] == 0 and figures["negative_similarity"] == pytest.approx(below)
    assert far <= figures["negative_similarity_random"] <= above


def test_mask_truth_of_a_model_that_looks_at_the_right_place(monkeypatch):
    """With the truth itself as attention every mask and every word is right; beside it what random masks get."""
    dataset = Synthetic("val", 10, 32, progress=False)
    config, _ = parse_config(
        [*FAST, "--mim-ratio", "0.05", "--mlm-ratio", "0.1", "--word-score", "max", "--patch-size", "4"]
    )
    state = build_run(config, dataset, data.build_tokenizer(dataset.captions, 300, 64))

    def attention(run, batch, *_):
        regions = word_truth(dataset, batch["rows"].tolist(), state.tokenizer, 8).regions.float()
        return torch.nn.functional.pad(regions, (1, 0))[:, None]

    monkeypatch.setattr("measures.truth.momentum_attention", attention)
    figures = mask_truth(state, dataset)
    for key in ("patch_cooccurrence", "word_cooccurrence", "detail_cooccurrence", "pointing", "pointing_whole"):
        assert figures[key] == 1 and 0 < figures[key + "_random"] < 0.95, key
    assert truth_in_words(figures | {f"{key}{end}": 0.0 for key in ("false_negative_rate", "negative_similarity")
                                           for end in ("", "_random", "_hard")})[0].startswith(
        "masks, skill over random ones: patches 1.00, words 1.00, of details 1.00")  # fmt: skip


@pytest.mark.parametrize("source", typing.get_args(MaskSource))
def test_momentum_attention_of_every_source(source):
    config, _ = parse_config(
        [*FAST, "--mask-source", source, "--fusion-layers", "2", "--registers", "2", "--mask-layer", "1"]
    )
    dataset = Synthetic("train", 8, 32, progress=False)
    state = build_run(config, dataset, data.build_tokenizer(dataset.captions, 300, 64))
    batch = data.Collate(state.tokenizer)([dataset[row] for row in range(6)])
    count, length = batch["token_ids"].shape
    image_embeds = state.momentum.encode_image(data.normalise(batch["images"]))
    text_embeds = state.momentum.encode_text(batch["token_ids"], batch["attention_mask"])
    read = lambda: momentum_attention(state, batch, image_embeds, text_embeds, torch.Generator().manual_seed(0))
    attention = read()
    assert attention.shape == (count, 2, length, 17) and not attention.requires_grad and (attention[..., 0] == 0).all()
    if source == "gradcam":
        assert attention.min() >= 0 and attention.amax(1)[batch["words"]].max() > 0
        weight = state.momentum.itm_head.weight.clone()
        state.momentum.itm_head.weight[1] = 0  # "match" no longer depends on anything
        assert (read() == 0).all()
        state.momentum.itm_head.weight.copy_(weight)
    else:
        torch.testing.assert_close(attention[..., 1:].sum(-1)[:, :, 1:2], torch.ones(count, 2, 1))
    if source == "attention":
        fused = state.momentum.fuse(text_embeds, batch["attention_mask"], image_embeds, return_attention=True)
        torch.testing.assert_close(attention, fused[1][0])
    # a word that is hidden must be found by the rest of the text and the photo: changing it changes nothing of its row
    word = 3
    batch["token_ids"] = batch["token_ids"].clone()
    batch["token_ids"][:, word] = (batch["token_ids"][:, word] + 7) % 200 + 5
    text_embeds = state.momentum.encode_text(batch["token_ids"], batch["attention_mask"])
    same = torch.allclose(attention[:, :, word], read()[:, :, word], rtol=1e-3, atol=0)
    assert same == (source == "hidden")


@pytest.mark.parametrize(
    "flags, patches, words",
    [
        (["--mask-hint", "0"], "sync", "sync"),
        (["--mask-hint", "1"], "random", "random"),
        (["--mask-hint", "0", "--mask-warmup", "9"], "random", "random"),
        (["--mask-hint", "0", "--patch-mask", "random"], "random", "sync"),
        (["--mask-hint", "0", "--word-mask", "random"], "sync", "random"),
        (["--mask-hint", "0", "--word-mask", "random", "--patch-mask", "block"], "block", "random"),
    ],
)
def test_masks_are_chosen_as_the_config_says(flags, patches, words, monkeypatch):
    """The attention is on the last patches and words alone, so a synchronized mask is known in advance."""
    config, _ = parse_config([*FAST, "--mlm-ratio", "0.3", "--mim-ratio", "0.5", "--mask-noise", "0", *flags])
    dataset = Synthetic("train", 8, 32, progress=False)
    state = build_run(config, dataset, data.build_tokenizer(dataset.captions, 300, 64))
    state.step = 5
    batch = data.Collate(state.tokenizer)([dataset[row] for row in range(6)])
    first = batch["words"].sum(1) - word_counts(batch["words"], 0.3)
    last_words = (batch["words"].cumsum(1) > first[:, None]) & batch["words"]
    attention = torch.zeros(6, 1, batch["words"].shape[1], 17)
    attention[:, 0, :, 9:] = last_words[..., None].float()  # the last eight of sixteen patches
    monkeypatch.setattr(train, "momentum_attention", lambda *_: attention)

    def chosen(seed):
        state.generator = torch.Generator().manual_seed(seed)
        return train.choose_masks(state, batch, None, None)

    patch_mask, word_mask = chosen(0)
    assert (patch_mask.sum(1) == 8).all() and not (word_mask & ~batch["words"]).any()
    assert (patch_mask[:, 8:].all()) == (patches == "sync")
    assert torch.equal(word_mask, last_words) == (words == "sync")
    assert torch.equal(chosen(0)[0], patch_mask) and (patches == "sync") == torch.equal(chosen(1)[0], patch_mask)
    if patches == "block":
        assert not torch.equal(patch_mask, random_patch_mask(6, 16, 0.5, torch.Generator().manual_seed(0)))


def test_layers_are_read_one_by_one_or_where_they_agree():
    one, two = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    assert torch.equal(read_layer([one, two], 2, "mean"), two)
    torch.testing.assert_close(read_layer([one, two], 0, "mean")[:, 0], (one.mean(1) * two.mean(1)).sqrt())
    torch.testing.assert_close(read_layer([one, two], 0, "max")[:, 0], (one.amax(1) * two.amax(1)).sqrt())


def test_equal_features_earn_nothing():
    same = torch.ones(6, 4)
    recalls = retrieval_recalls(same, same, torch.arange(6), torch.arange(6), ranks=(1, 5))
    assert recalls == {"i2t_r1": 0, "i2t_r5": 0, "t2i_r1": 0, "t2i_r5": 0}


def test_accuracy_ignores_unlabelled_rows():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]])
    assert accuracy(logits, torch.tensor([0, 0, -100])) == 0.5
