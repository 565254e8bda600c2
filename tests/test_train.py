"""Recipes, the loop, resuming, stopping, refusing: end to end on small runs."""

import contextlib
import json
import platform
import re
import resource
import signal
from pathlib import Path
from unittest import mock

import pytest
import small
import torch
from small import FAST_FOR, OF_FILES, batch_of, built, checkpoint, lines, resume, run, same_state, write_jsonl
from torch._dynamo.testing import CompileCounter

import data
import train
from engine import config as run_config
from engine.batches import augmented
from engine.checkpoints import config_from_dict
from engine.config import parse_config
from engine.weights import split_qkv
from evaluation.ground_truth import token_labels
from masking import concentration, word_counts

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(autouse=True)
def synchronized_from_the_first_step(monkeypatch):
    """Runs here are too short for a warm-up with random masks."""
    monkeypatch.setitem(run_config.SCHEDULES["tiny"], "mask_warmup", 0)


@pytest.mark.whole
def test_a_run_leaves_what_it_promises(tmp_path):
    final = run(tmp_path, "--steps", "4", "--val-every", "2", "--log-every", "1")
    left = ["config.json", "curves.png", "last-2.pt", "last.pt", "masks.png", "metrics.jsonl"]
    assert sorted(p.name for p in tmp_path.iterdir()) == left
    written = lines(tmp_path)
    training = [line for line in written if "loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4]
    assert [line["step"] for line in written if "val_i2t_r1" in line and "final" not in line] == [2, 4]
    losses = sum(training[0][key] for key in ("itc", "itm", "mlm", "mim"))
    assert training[0]["loss"] == pytest.approx(losses, abs=1e-4)
    known = [key + end for key in ("word_precision", "patch_precision", "pointing_game") for end in ("", "_random")]
    known += ["choice_coarse", "choice_fine", "choice_coarse_itm", "choice_fine_itm"]
    known += ["false_negative_rate" + end for end in ("", "_random", "_hard")]
    recalls = {f"val_{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)}
    assert all(0 <= written[-1][key] <= 1 for key in [*known, *recalls, "val_mlm_accuracy", "val_itm_accuracy"])
    documented = set(re.findall(r"`(\w+)`", (ROOT / "docs/glossary.md").read_text()))
    assert {re.sub("_(random|hard)$", "", key) for line in written for key in line} <= documented
    assert written[-1]["final"] is True and written[-1].keys() == final.keys()
    saved = config_from_dict(json.loads((tmp_path / "config.json").read_text()))
    assert saved == config_from_dict(checkpoint(tmp_path)["config"]) and saved.model.width == 32


@pytest.mark.parametrize(
    "flags",
    [
        "--margin 0.1 --mask-warmup 2 --random-mask-prob 0.3 --precision bf16 --workers 1",
        "--queue-size 20 --negatives similar --alpha 0.4 --patch-mask oracle --word-mask oracle",
        "--recipe albef --negatives hard --alpha 0.4",
        "--recipe softmask --fusion-layers 2 --alpha 0.4",
        "--recipe fashionfine --alpha 0.4 --queue-size 20",
    ],
)
def test_three_and_three_resumed_steps_equal_six_bitwise(tmp_path, flags):
    """Six steps cross an epoch: 12 products have about 42 photos, six batches of eight."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    final = run(whole, "--steps", "6", *flags.split())
    assert run(halves, "--steps", "6", *flags.split(), stop_at=3) is None
    assert checkpoint(halves)["step"] == 3
    resumed = resume(halves)
    same_state(checkpoint(whole), checkpoint(halves))
    assert all(resumed[key] == final[key] for key in final if key.startswith("val"))


def test_threads_change_nothing_about_resuming(tmp_path):
    """Two threads, at a size where both are used: what they sum up in any order would differ in the last digits."""
    flags = [
        "--recipe",
        "softmask",
        "--steps",
        "2",
        "--num-products",
        "10",
        "--val-products",
        "2",
        "--batch-size",
        "16",
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    for out, stop_at in (("whole", None), ("halves", 1)):
        train.train(*parse_config([*flags, "--out", str(tmp_path / out)]), stop_at)
    resume(tmp_path / "halves")
    torch.set_num_threads(before)
    same_state(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "halves"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library decides for itself")
def test_the_memory_of_freed_tensors_is_kept_for_the_next():
    """Otherwise every step would wait for tens of thousands of pages, which the system clears."""
    built()

    def faults():
        tensors = [torch.ones(2**21) for _ in range(10)]  # 8 MiB, 2,048 pages each
        del tensors
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    faults()
    before = faults()
    assert faults() - before < 2048


@pytest.mark.parametrize("recipe", train.RECIPES)
def test_overfits_one_batch(recipe):
    """Four products, no crop, no soft targets: every objective goes down to its floor."""
    torch.manual_seed(0)
    state, dataset = built("--dropout 0 --alpha 0 --negatives random --recipe", recipe, *FAST_FOR[recipe], products=4)
    one_of_each = [list(dataset.product_ids).index(product) for product in range(4)]
    batch = batch_of(state, dataset, one_of_each)
    batch["images"] = data.normalise(batch["images"])
    steps = {"syncmask": 160, "fashionfine": 200}.get(recipe, 110)  # masks vary while the momentum model learns
    first = None
    for step in range(steps):
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
    assert figures["itm_batch_accuracy"] == 1 and figures["mlm_accuracy"] > 0.9
    assert "mim" not in losses or losses["mim"] < 0.6 * first["mim"]
    if recipe == "fashionfine":
        assert losses["rtd"] < 0.1 * first["rtd"] and figures["replaced_recall"] == 1
        assert losses["align"] < first["align"] and losses["align"] < 0.1


def first_losses(*flags, weights=None):
    """Losses of the first batch of a fixed model, or of one with some of another's weights; the run, the batch."""
    state, dataset = built("--fusion-layers 2 --dropout 0 --alpha 0 --crop-scale 0.8", *flags)
    state.model.load_state_dict(weights or {}, strict=False)
    state.momentum.update(state.model, decay=0)
    state.generator, state.step = torch.Generator().manual_seed(0), 100
    batch = augmented(state, batch_of(state, dataset, range(0, 24, 3)))
    return train.RECIPES[state.config.recipe](state, batch)[0], state, batch


@pytest.mark.parametrize("recipe", train.RECIPES)
def test_no_gradient_reaches_the_momentum_model_and_every_parameter_gets_one(recipe):
    losses, state, _ = first_losses("--recipe", recipe)
    sum(losses.values()).backward()
    assert all(p.grad is None for p in state.momentum.parameters())
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in state.model.named_parameters()}
    silent = [name for name, gradient in split_qkv(gradients).items() if not gradient.any()]
    if "mim" not in losses:
        silent = [name for name in silent if not name.startswith("decoder.")]
    assert all("key.bias" in name for name in silent), silent  # softmax does not feel a constant shift of its keys


SWITCHES = {  # each with the losses that it changes
    "softmask": {"--no-soft-mask": {"itm"}, "--no-mask-text": {"itc", "itm"}, "--focal-gamma=0": {"itc"}},
    "fashionfine": {
        "--no-local-tokens": {"itc"},
        "--no-alignment": {"align"},
        "--no-detector": {"rtd"},
        "--focal-gamma=0 --itc-weight=1": {"itc"},
    },
}


@pytest.mark.parametrize("recipe", SWITCHES)
def test_each_part_of_a_recipe_is_a_switch(recipe):
    parts, flags = SWITCHES[recipe], f"--recipe {recipe} --focal-gamma 2 --distort 0 --mlm-ratio 0.3"
    weights = first_losses(flags)[1].model.state_dict()
    none, _, _ = first_losses(flags, *parts, weights=weights)
    assert none.keys() == {"itc", "itm", "mlm"}
    for part, changed in parts.items():
        alone, _, _ = first_losses(flags, *(other for other in parts if other != part), weights=weights)
        differ = {key for key in alone if key not in none or abs(alone[key].item() - none[key].item()) > 1e-5}
        assert changed <= differ <= changed | {"itm"}, part  # other similarities, other negatives
    if recipe == "softmask":  # without its parts it is the base
        base, _, _ = first_losses("--recipe albef --mlm-ratio 0.3", weights=weights)
        assert all(none[key].item() == pytest.approx(base[key].item(), rel=1e-5) for key in base)


def test_gradients_of_fashionfine_flow_where_they_should_and_nowhere_else():
    reached = {
        "itc": {"vision", "text", "vision_proj", "text_proj", "adapter", "temp"},
        "align": {"vision", "text", "vision_proj", "text_proj", "adapter", "phrases"},
        "itm": {"vision", "text", "fusion", "itm_head"},
        "mlm": {"vision", "text", "fusion", "mlm_head", "mlm_bias"},
        "rtd": {"vision", "text", "fusion", "detector"},
    }
    losses, state, batch = first_losses("--recipe", "fashionfine", "--queue-size", "20")
    assert losses.keys() == reached.keys()
    names, parameters = zip(*state.model.named_parameters(), strict=True)
    for key, loss in losses.items():
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        moved = {name.split(".")[0] for name, g in zip(names, gradients, strict=True) if g is not None and g.any()}
        assert moved == reached[key], key
    momentum = state.momentum.model  # whose features of [CLS] alone and of the clean text the keys are
    texts = momentum.text(batch["token_ids"], batch["attention_mask"])
    torch.testing.assert_close(state.queue[1], momentum.project_text(texts))
    images = momentum.vision(batch["images"])
    torch.testing.assert_close(state.queue[0], momentum.project_image(images))


def test_hard_negatives_are_mined_in_batch_and_queue():
    """HNM-F: 0.25 · focal ITC against the momentum keys of the batch and of the queue; right is what is of one product
    or has the same caption."""
    _, state, batch = first_losses("--recipe", "fashionfine", "--queue-size", "6")
    generator = torch.Generator().manual_seed(1)
    image_feat, text_feat, image_feat_m, text_feat_m, old_images, old_texts = torch.nn.functional.normalize(
        torch.randn(6, 8, 256, generator=generator), dim=2
    )
    products = torch.cat([batch["product_ids"], torch.tensor([0, 1, 1, 90, 91, 92])])
    captions = torch.cat([batch["caption_ids"], torch.tensor([90, 91, 92, 93, 94, batch["caption_ids"][3]])])
    state.queue = [old_images[:6], old_texts[:6], products[8:], captions[8:]]
    ours, *_ = train.compute_itc(state, batch, image_feat, text_feat, image_feat_m, text_feat_m)
    texts, images = torch.cat([text_feat_m, old_texts[:6]]), torch.cat([image_feat_m, old_images[:6]])
    right = (products[:8, None] == products) | (captions[:8, None] == captions)
    expected = 0
    for queries, keys in ((image_feat, texts), (text_feat, images)):
        log_p = (queries @ keys.T / state.model.temp).log_softmax(dim=1)
        focal = (1 - log_p.exp()) ** 2 * log_p * right / right.sum(dim=1, keepdim=True)
        expected = expected - focal.sum(dim=1).mean() / 2
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5) and state.config.itc_weight == 0.25


def test_soft_masks_suppress_patches_and_pass_no_gradient_through_the_mask():
    _, state, batch = first_losses("--recipe", "softmask")
    model, keep = state.model, batch["attention_mask"]
    image_embeds = model.vision(batch["images"]).detach().requires_grad_()
    text_embeds = model.text(batch["token_ids"], keep)
    fused, attentions = model.fusion(
        text_embeds, keep, model.fusion.project_image_kv(image_embeds), return_attention=True
    )
    words = batch["maskable"].clone()
    words[2] = False  # a text without a readable word
    soft = train.apply_soft_mask(state, words, fused, attentions, image_embeds)
    share = (soft / image_embeds).detach()
    assert torch.equal(soft[:, 0], image_embeds[:, 0]) and torch.equal(soft[2], image_embeds[2])
    left = share[[0, 1, 3], 1:].mean(dim=2)
    assert left.amin(dim=1).max() < 0.7 and torch.allclose(left.amax(dim=1), torch.ones(3))
    (gradient,) = torch.autograd.grad(soft.sum(), image_embeds)
    assert torch.allclose(gradient, share, atol=1e-5)  # (1 − M), nothing by way of M itself


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_cleanly(tmp_path, monkeypatch, capsys, number):
    recipe = train.RECIPES["syncmask"]

    def interrupted(state, batch):
        if state.step == 2:
            signal.raise_signal(number)
        return recipe(state, batch)

    monkeypatch.setitem(train.RECIPES, "syncmask", interrupted)
    assert run(tmp_path, "--steps", "9", "--log-every", "1") is None
    assert f"({number.name}); saved in" in capsys.readouterr().out
    assert checkpoint(tmp_path)["step"] == lines(tmp_path)[-1]["step"] == 3
    assert resume(tmp_path, stop_at=4) is None and checkpoint(tmp_path)["step"] == 4


@pytest.mark.parametrize("of_gradient", [False, True])
def test_what_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, of_gradient):
    recipe = train.RECIPES["syncmask"]

    def poisoned(state, batch):
        losses, figures = recipe(state, batch)
        no_slope = torch.sqrt(state.model.temp * 0)  # value 0, gradient infinite
        if state.step == 3:
            losses["itm"] = losses["itm"] + no_slope if of_gradient else losses["itm"] * torch.nan
        return losses, figures

    monkeypatch.setitem(train.RECIPES, "syncmask", poisoned)
    with pytest.raises(train.NonFiniteLoss, match="step 4: .*grad_norm not finite; .*last.pt"):
        run(tmp_path, "--steps", "6", "--val-every", "1")
    state = checkpoint(tmp_path)
    assert state["step"] == 3 and all(p.isfinite().all() for p in state["model"].values())
    monkeypatch.setitem(train.RECIPES, "syncmask", recipe)
    assert resume(tmp_path, "--lr", "1e-4", stop_at=5) is None and checkpoint(tmp_path)["config"]["lr"] == 1e-4


@pytest.fixture(scope="module")
def shops(tmp_path_factory):
    """FashionGen's files, and photos of our own with a damaged one. -> data set -> folder."""
    root = tmp_path_factory.mktemp("shops")
    small.export_fashiongen(root / "fashiongen", 10, image_size=32)
    folder = root / "jsonl"
    records = [{"image": f"{i}.jpg", "caption": f"tee of style {i}", "product_id": i // 3} for i in range(40)]
    write_jsonl(folder, train=records)
    (folder / "5.jpg").write_bytes((folder / "5.jpg").read_bytes()[:300])
    return {"fashiongen": root / "fashiongen", "jsonl": folder}


@pytest.mark.parametrize("recipe", train.RECIPES)
def test_every_data_set_trains(tmp_path, shops, recipe):
    for name, root in shops.items():
        flags = ["--recipe", recipe, *FAST_FOR[recipe], "--preset", "tiny", "--steps", "5", "--out", tmp_path / name]
        flags += ["--data", name, "--root", root]
        assert train.train(*parse_config([*OF_FILES, *map(str, flags)]))["step"] == 5
    assert max(line.get("unreadable", 0) for line in lines(tmp_path / "jsonl")) == 1


def test_every_other_flag_runs(tmp_path):
    """What the defaults and the other tests leave alone, on the schedule of `base`, for one epoch."""
    flags = "--preset base --epochs 1 --seed 3 --weight-decay 0.1 --ema-decay 0.9 --crop-scale 0.9"
    flags += " --mlm-ratio 0.3 --negatives hard --patch-size 16 --max-length 16 --workers 0"
    flags += " --mim-ratio 0.25 --mim-weight 0.5 --word-mask random --itm-hard-ratio 0.5 --mask-warmup 2"
    final = run(tmp_path, *flags.split(), "--no-compile")
    config = config_from_dict(checkpoint(tmp_path)["config"])
    assert final["step"] == 6 and config.queue_size == 0 and config.model.grid == 2


@contextlib.contextmanager
def compiled_by(backend, **other):
    """Instead of a compiler: our use of it is tested, not the compiler."""
    compile_module = torch.nn.Module.compile

    def ours(self, **how):
        return compile_module(self, **how | other, backend=backend)

    strict = torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
    torch._dynamo.reset()
    with mock.patch.object(torch.nn.Module, "compile", ours), strict:
        yield


@pytest.mark.whole
def test_compiled_run_equals_eager_and_compiles_in_its_first_steps_alone(tmp_path):
    flags = ["--epochs", "2", "--val-every", "2"]
    run(tmp_path / "eager", *flags, stop_at=3)
    with compiled_by(counter := CompileCounter()):
        run(tmp_path / "compiled", *flags, "--compile", stop_at=3)
        one, two = checkpoint(tmp_path / "eager")["model"], checkpoint(tmp_path / "compiled")["model"]
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(one[name], two[name])
        graphs = counter.frame_count
        # to the end of the second epoch: other lengths, another size of batch, more validations, and nothing new
        assert resume(tmp_path / "compiled")["step"] > 9 and counter.frame_count == graphs == 14


def test_soft_masks_are_trained_with_where_layers_are_compiled():
    """With a backend that traces the backward pass too, and so cuts the way of a gradient in compiled code."""
    eager = first_losses("--recipe", "softmask")[0]
    with compiled_by("aot_eager", dynamic=False):  # which is sooner done
        compiled = first_losses("--recipe", "softmask", "--compile")[0]
    assert compiled.keys() == eager.keys()
    assert all(compiled[key].item() == pytest.approx(eager[key].item(), rel=1e-4) for key in eager)


def known_masks(flags, monkeypatch):
    """The attention is on the last patches and words alone, so a synchronized mask is known in advance. -> what chooses
    masks by a seed, the batch, its last words (6, L), the numbers of pairs whose attention was computed."""
    state, dataset = built("--mlm-ratio 0.3 --mim-ratio 0.5 --mask-source clean", flags)
    dataset.with_ground_truth, state.step = True, 5
    batch = batch_of(state, dataset, range(6))
    computed = []

    def last_words(maskable):
        is_caption = maskable > 0
        first = is_caption.sum(1, keepdim=True) - word_counts(maskable, 0.3)
        return (is_caption.cumsum(1) > first) & is_caption

    def score_clean_words(momentum, pairs, *_):
        computed.append(len(pairs["maskable"]))
        attention = torch.zeros(*pairs["maskable"].shape, 16)
        attention[:, :, 8:] = last_words(pairs["maskable"])[..., None].float()  # the last eight of sixteen patches
        return attention, concentration(attention)

    monkeypatch.setattr("train.score_clean_words", score_clean_words)
    image_embeds_m, *_ = train.encode_momentum(state, batch | {"images": data.normalise(batch["images"])})

    def chosen(seed):
        state.generator = torch.Generator().manual_seed(seed)
        return train.choose_masks(state, batch, image_embeds_m)

    return chosen, batch, last_words(batch["maskable"]), computed


@pytest.mark.parametrize(
    "flags, patches, words",
    [
        ("--random-mask-prob 0", "sync", "sync"),
        ("--random-mask-prob 1", "random", "random"),
        ("--random-mask-prob 0 --mask-warmup 9", "random", "random"),
        ("--random-mask-prob 0 --patch-mask random", "random", "sync"),
        ("--random-mask-prob 0 --word-mask random", "sync", "random"),
        ("--random-mask-prob 0 --mask-warmup 9 --patch-mask oracle --word-mask oracle", "oracle", "oracle"),
        ("--random-mask-prob 0 --patch-mask random --word-mask oracle", "random", "oracle"),
    ],
)
def test_masks_are_chosen_as_the_config_says(flags, patches, words, monkeypatch):
    chosen, batch, last_words, _ = known_masks(flags, monkeypatch)
    patch_mask, word_mask = chosen(0)
    assert (patch_mask.sum(1) == 8).all() and not (word_mask & (batch["maskable"] == 0)).any()
    assert (patch_mask[:, 8:].all()) == (patches == "sync")
    assert torch.equal(word_mask, last_words) == (words == "sync")
    assert torch.equal(chosen(0)[0], patch_mask) and (patches == "sync") == torch.equal(chosen(1)[0], patch_mask)
    known = token_labels(batch, 4)
    half = word_counts(batch["maskable"] * known.visible, 0.5)  # of the words that are seen
    shown = not (word_mask & ~known.visible).any() and torch.equal(word_mask.sum(1, keepdim=True), half)
    assert shown == (words == "oracle")
    named = known.regions.any(dim=1)
    on_named = [not (mask & ~there).any() or not (there & ~mask).any() for mask, there in zip(patch_mask, named)]
    assert all(on_named) == (patches == "oracle")


def test_a_pair_keeps_random_masks_of_both_its_patches_and_its_words(monkeypatch):
    """The share is exact, every pair has the same chance, and masks are computed for the other pairs alone."""
    chosen, _, last_words, computed = known_masks("--random-mask-prob 0.35", monkeypatch)
    kept = []
    for seed in range(60):
        patch_mask, word_mask = chosen(seed)
        kept.append(~patch_mask[:, 8:].all(dim=1))
        assert torch.equal(kept[-1], (word_mask != last_words).any(dim=1))
    kept = torch.stack(kept).float()
    assert (kept.sum(dim=1) == 2).all() and set(computed) == {4}
    assert ((kept.mean(dim=0) - 1 / 3).abs() < 0.2).all()
