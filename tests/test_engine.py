"""Flags, schedules, resuming, published weights, held-out splits."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import FAST, batch_of, built, checkpoint, lines, resume, run
from test_model import SMALL, bert_config, close, make_model, randomise
from transformers import BertModel

import data
import train
from engine import config as run_config
from engine.config import ema_decay, itm_hard_share, learning_rate, parse_config, scored_share
from engine.finetune_config import FinetuneConfig
from engine.flags import ConfigError
from engine.run import autocast, build_optimizer
from engine.weights import load_pretrained
from finetune import hold_out
from model import PRESETS, VisionLanguageModel
from readers.dataset import DataError, PairDataset

pytestmark = pytest.mark.usefixtures("quick")


@given(st.lists(st.integers(0, 12), min_size=2, max_size=60), st.floats(0.05, 0.6), st.integers(0, 3))
def test_hold_out_takes_whole_groups_and_leaves_every_label_in_training(groups, share, seed):
    labels = [str(group % 4) for group in groups]
    dataset = PairDataset(
        [str(row) for row in range(len(groups))], groups, [], 32
    )  # a caption is the number of its row
    config = FinetuneConfig(held_out=share, val_products=100, data_seed=seed)
    ids, groups_by_label = np.array(groups), {}
    for group in groups:
        groups_by_label.setdefault(str(group % 4), set()).add(group)
    if all(len(groups_of_label) == 1 for groups_of_label in groups_by_label.values()):
        with pytest.raises(DataError, match="too few products"):
            hold_out(config, dataset, ids, labels)
        return
    parts = [[int(caption) for caption in part.captions] for part in hold_out(config, dataset, ids, labels)]
    training, held = parts
    assert sorted([*training, *held]) == list(range(len(groups))) and not set(ids[training]) & set(ids[held])
    assert {labels[row] for row in training} == set(labels) and len(held)
    assert len(set(ids[held])) <= max(2, round(share * len(set(groups))))
    again = hold_out(config, dataset, ids, labels)
    assert [[int(caption) for caption in part.captions] for part in again] == parts
    _, one_group = hold_out(replace(config, val_products=1), dataset, ids, labels)
    assert one_group.product_ids.max() == 0


def timm_names(vit):
    """Our ViT's weights under timm's names, which DeiT, MAE and ALBEF share."""
    state = {"cls_token": vit.cls_token, "pos_embed": vit.position_embed}
    for part in ("weight", "bias"):
        state[f"patch_embed.proj.{part}"] = getattr(vit.patch_embed, part)
        state[f"norm.{part}"] = getattr(vit.norm, part)
        for i, layer in enumerate(vit.layers):
            a = layer.attention
            state[f"blocks.{i}.attn.qkv.{part}"] = getattr(a.qkv, part)
            state[f"blocks.{i}.attn.proj.{part}"] = getattr(a.output, part)
            state[f"blocks.{i}.norm1.{part}"] = getattr(layer.norm1, part)
            state[f"blocks.{i}.norm2.{part}"] = getattr(layer.norm2, part)
            state[f"blocks.{i}.mlp.fc1.{part}"] = getattr(layer.mlp[0], part)
            state[f"blocks.{i}.mlp.fc2.{part}"] = getattr(layer.mlp[2], part)
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def bert_names(vocab_size=SMALL.vocab_size):
    """Random weights of BERT with cross-attention, as ALBEF stores it."""
    config = bert_config(replace(SMALL, vocab_size=vocab_size), is_decoder=True, add_cross_attention=True)
    return randomise(BertModel(config, add_pooling_layer=False)).state_dict()


def test_position_embeddings_are_interpolated_to_the_grid(tmp_path):
    source, target = make_model(seed=1), make_model(replace(SMALL, image_size=64))
    with torch.no_grad():  # a smooth table: interpolation must keep it smooth
        ramp = torch.linspace(0, 1, 4).repeat_interleave(4)[:, None].expand(16, 48)
        source.vision.position_embed[0, 1:] = ramp
    torch.save(timm_names(source.vision), tmp_path / "vit.pth")
    load_pretrained(target, [tmp_path / "vit.pth"])
    table = target.vision.position_embed[0]
    assert table.shape == (65, 48)
    close(table[0], source.vision.position_embed[0, 0])
    rows = table[1:].reshape(8, 8, 48)[:, 0, 0]
    assert (rows.diff() > -0.02).all() and rows[0] < 0.1 and rows[-1] > 0.9


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_a_whole_albef_checkpoint_fills_what_a_vit_and_a_bert_fill_and_the_heads(tmp_path, wrapper):
    source, parts, whole = make_model(seed=1), make_model(seed=2), make_model(seed=2)
    vit, bert = timm_names(source.vision), bert_names()
    torch.save(vit, tmp_path / "vit.pth")
    torch.save(bert, tmp_path / "bert.pth")
    load_pretrained(parts, [tmp_path / "vit.pth", tmp_path / "bert.pth"])
    for (name, ours), theirs in zip(parts.vision.named_parameters(), source.vision.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    heads = "vision_proj.weight vision_proj.bias text_proj.weight text_proj.bias itm_head.weight itm_head.bias temp"
    state = {name: weight for name, weight in source.state_dict().items() if name in heads.split()}
    state["text_encoder.cls.predictions.bias"] = source.mlm_bias.detach()
    for part in ("weight", "bias"):
        state[f"text_encoder.cls.predictions.transform.dense.{part}"] = getattr(source.mlm_head[0], part).detach()
        state[f"text_encoder.cls.predictions.transform.LayerNorm.{part}"] = getattr(source.mlm_head[2], part).detach()
    state["image_queue"] = torch.zeros(4, 9)
    for copy, moved in (("", 0), ("_m", 1)):  # the momentum model's come after
        state |= {f"visual_encoder{copy}.{name}": weight + moved for name, weight in vit.items()}
        state |= {f"text_encoder{copy}.bert.{name}": weight + moved for name, weight in bert.items()}
    torch.save(
        {"model": {wrapper + name: weight for name, weight in state.items()}, "epoch": 3}, tmp_path / "albef.pth"
    )
    report = load_pretrained(whole, [tmp_path / "albef.pth"])
    assert [name for name in report.missing if not name.startswith("decoder.")] == []
    for name, weight in whole.state_dict().items():
        filled = parts if name.startswith(("vision.", "text.", "fusion.", "decoder.")) else source
        assert torch.equal(weight, filled.state_dict()[name]), name
    assert "image_queue" in report.skipped


def test_weights_of_another_size_are_refused_and_partial_fits_reported(tmp_path):
    other, target = make_model(replace(SMALL, width=64)), make_model()
    torch.save(timm_names(other.vision), tmp_path / "vit.pth")
    with pytest.raises(
        DataError, match="vit.pth: does not fit .* give --width 64, and --heads as its config.json says"
    ):
        load_pretrained(target, [tmp_path / "vit.pth"])
    torch.save(bert_names(vocab_size=99), tmp_path / "bert.bin")
    report = load_pretrained(target, [tmp_path / "bert.bin"])
    assert "shape (99, 48), this model has (60, 48)" in str(report)
    assert "text.word_embeddings.weight" in report.missing
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(DataError, match="list.pth"):
        load_pretrained(target, [tmp_path / "list.pth"])


def test_published_words_fill_a_vocabulary_that_ends_with_the_symbols(tmp_path):
    state = bert_names()
    torch.save(state, tmp_path / "bert.bin")
    target = make_model(replace(SMALL, vocab_size=SMALL.vocab_size + 9))
    before = target.text.word_embeddings.weight.detach().clone()
    report = load_pretrained(target, [tmp_path / "bert.bin"])
    after, words = target.text.word_embeddings.weight, state["embeddings.word_embeddings.weight"]
    assert torch.equal(after[:-9], words) and torch.equal(after[-9:], before[-9:])
    assert "text.word_embeddings.weight" in report.loaded


def test_the_precision_taken_is_recorded_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.run.fitting_precision", lambda _: "bf16")
    run(tmp_path, "--precision", "auto", "--steps", "2", stop_at=1)
    assert json.loads((tmp_path / "config.json").read_text())["precision"] == "bf16"
    monkeypatch.setattr("engine.run.fitting_precision", lambda _: "fp32")
    with pytest.raises(ConfigError, match="--precision fp32 contradicts"):
        resume(tmp_path, "--precision", "fp32")
    resume(tmp_path, "--precision", "auto")
    assert checkpoint(tmp_path)["config"]["precision"] == "bf16"


def test_similarities_stay_in_full_precision_under_bf16():
    state, dataset = built("--precision", "bf16")
    batch = batch_of(state, dataset, range(6))
    with autocast(state):
        image_embeds = state.model.vision(data.normalise(batch["images"]))
        text_embeds = state.model.text(batch["token_ids"], batch["attention_mask"])
        feats = state.model.project_image(image_embeds), state.model.project_text(text_embeds)
        _, sim_i2t, _ = train.compute_itc(state, batch, *feats, *feats)
    assert sim_i2t.dtype == torch.float32
    exact = feats[0].double() @ feats[1].double().T / state.model.temp.item()
    assert (sim_i2t.double() - exact).abs().max() < 0.05


def test_a_vocabulary_and_weights_can_be_given(tmp_path, capsys):
    (tmp_path / "vocab.txt").write_text("\n".join([*data.SPECIAL_TOKENS, *"abcdef", *("##" + c for c in "abcdef")]))
    files = {
        "vision.cls_token": {"cls_token": torch.full((1, 1, 32), 0.5), "pos_embed": torch.zeros(1, 17, 32)},
        "text.norm.weight": {"LayerNorm.weight": torch.full((32,), 0.5), "word_embeddings.weight": torch.zeros(17, 32)},
        "itm_head.bias": {"itm_head.bias": torch.tensor([0.5, -0.5]), "vision_proj.bias": torch.zeros(256)},
    }
    files["text.norm.weight"] = {f"bert.embeddings.{name}": w for name, w in files["text.norm.weight"].items()}
    flags = [flag for flag in FAST if flag not in ("--vocab-size", "300")]
    flags += ["--vocab", str(tmp_path / "vocab.txt"), "--lr", "0", "--min-lr", "0", "--steps", "1"]
    for key, state in files.items():
        torch.save({"model": state}, tmp_path / "weights.pth")
        train.main([*flags, "--weights", str(tmp_path / "weights.pth"), "--out", str(tmp_path / key)])
        assert "2 tensors loaded" in capsys.readouterr().out
        saved = checkpoint(tmp_path / key)
        assert (saved["model"][key].abs() == 0.5).all() and saved["config"]["model"]["vocab_size"] == 17


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--stepps", "3"], "unknown flag --stepps; did you mean --steps?"),
        (["--steps", "3", "--epochs", "1"], "--steps and --epochs contradict each other"),
        (["--mlm-ratio", "1.5"], "--mlm-ratio 1.5: must be between 0 and 1"),
        (["--recipe", "clip"], "--recipe clip: no such recipe; choose syncmask, softmask"),
        (["--recipe", "albef", "--word-mask", "sync"], "--word-mask is for --recipe syncmask, not for albef"),
        (
            ["--data", "jsonl", "--root", "x", "--word-mask", "oracle"],
            "--data jsonl has no ground truth; use random or sync",
        ),
        (["--recipe", "fashionfine", "--no-prompts"], "--alignment needs the category symbol of --prompts"),
        (["--data", "jsonl", "--root", "/nowhere"], "/nowhere: no such folder"),
        (["--image-size", "60"], "not a multiple of patch_size"),
        (["--lr", "inf"], "--lr inf: must be a finite number"),
        (["--device", "cuda:99"], "cuda:99: not on this machine; choose cpu"),
        (["--weights", "/nowhere.pth", "--num-products", "2"], "/nowhere.pth: no such weights file"),
        (["--resume", "--out", "/nowhere"], "/nowhere/last.pt: no such checkpoint"),
    ],
)
def test_bad_flags_are_one_clear_line(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        train.main(flags)
    printed = capsys.readouterr().err + (caught.value.code if isinstance(caught.value.code, str) else "")
    last_line = printed.strip().splitlines()[-1]
    assert message in last_line and last_line.startswith("train.py: ")
    assert not (tmp_path / "runs").exists()


def test_precedence_defaults_preset_recipe_flags():
    config, _ = parse_config(["--recipe", "albef"])
    assert config.preset == "tiny" and config.model == PRESETS["tiny"]
    assert config.steps == run_config.SCHEDULES["tiny"]["steps"]
    assert config.weight_decay == 0.02 and config.out == "runs/synthetic-albef-tiny"
    assert config.negatives == run_config.SCHEDULES["tiny"]["negatives"]
    config, _ = parse_config([])
    expected = PRESETS["tiny"]
    assert config.recipe == "syncmask" and config.model == expected
    assert config.negatives == "semihard" and parse_config(["--negatives", "hard"])[0].negatives == "hard"
    config, _ = parse_config(["--epochs", "2", "--lr", "0.1", "--heads", "8"])
    assert (config.steps, config.epochs, config.lr, config.model.heads) == (None, 2, 0.1, 8)
    config, _ = parse_config(["--data", "fashiongen"])
    assert config.preset == "base" and config.model.width == PRESETS["base"].width
    assert config.queue_size == 0 and parse_config(["--preset", "base", "--recipe", "albef"])[0].queue_size == 65536
    config, _ = parse_config(["--no-compile", "--data", "jsonl"])
    assert config.compile is False and config.preset == "small"


def test_resume_refuses_flags_that_change_the_result_and_runs_are_not_overwritten(tmp_path):
    run(tmp_path, "--steps", "2")
    with pytest.raises(ConfigError, match="--weight-decay 0.5 contradicts the run to resume"):
        resume(tmp_path, "--weight-decay", "0.5")
    with pytest.raises(ConfigError, match="--width 64 contradicts"):
        resume(tmp_path, "--width", "64")
    before, again = lines(tmp_path)[-1], resume(tmp_path, "--vocab-size", "300")
    val_keys = [key for key in before if key.startswith("val")]
    assert all(again[key] == pytest.approx(before[key], abs=1e-5) for key in val_keys)  # it is finished already
    with pytest.raises(ConfigError, match="--root is for data sets in files"):
        resume(tmp_path, "--root", "x")
    with pytest.raises(ConfigError, match="holds a run already; add --resume"):
        run(tmp_path, "--steps", "2")
    torch.save(checkpoint(tmp_path) | {"data": 1}, tmp_path / "last.pt")
    with pytest.raises(ConfigError, match="other rows than the training split holds now"):
        resume(tmp_path)


def test_learning_rate_warms_up_and_falls_along_a_cosine():
    config = replace(parse_config([])[0], lr=1.0, min_lr=0.1, warmup=10)
    rates = [learning_rate(step, config, 111) for step in range(111)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_alpha_ramps_over_the_first_epoch_and_negatives_start_random():
    state, _ = built("--alpha 0.4 --negatives hard --itm-hard-ratio 0.6 --itm-hard-warmup 10", products=12)
    alphas, shares = {}, {}
    for step in (0, 1, 10, 15, 1000):
        state.step = step
        alphas[step], shares[step] = state.alpha, itm_hard_share(step, state.config)
    assert alphas[0] == 0 and alphas[1] == pytest.approx(0.4 / state.epoch_steps) and alphas[1000] == 0.4
    assert shares[0] == shares[10] == 0 and shares[15] == pytest.approx(0.3) and shares[1000] == 0.6
    assert ema_decay(0, 0.99) == 0.1 and ema_decay(10**6, 0.99) == 0.99
    state.generator = torch.Generator().manual_seed(0)
    sim, batch = torch.arange(200.0).expand(200, 200), dict.fromkeys(("product_ids", "caption_ids"), torch.arange(200))
    hardest = train.sample_itm_negatives(state, batch, sim, sim)[0] == 199
    assert 0.45 < hardest.float().mean() < 0.75  # 0.6 of them
    assert itm_hard_share(0, replace(state.config, itm_hard_warmup=0)) == 0.6


def test_weight_decay_is_on_matrices_only():
    config, _ = parse_config([*FAST])
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


def test_as_many_words_are_scored_as_are_masked_whatever_flag_is_given_alone():
    for flags, share in (([], 0.7), (["--mlm-ratio", "0.9"], 0.9), (["--score-ratio", "0.2"], 0.5)):
        config, _ = parse_config(flags)
        assert scored_share(config) == share
