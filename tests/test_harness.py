"""Flags, schedules, resuming, published weights, splits, wiring."""

import argparse
import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import FAST, checkpoint, lines, resume, run
from test_model import SMALL, close, make_model

import data
import train
from harness import config as run_config
from harness.config import ema_decay, learning_rate, parse_config
from harness.flags import ConfigError
from harness.precision import fitting_precision
from harness.run import Job, NonFiniteLoss, autocast, build_optimizer, build_run
from harness.splits import hold_out
from harness.weights import WeightsError, load_pretrained
from harness.wiring import Teacher, accuracy, contrast
from harness.writer import Writer
from model import PRESETS, ModelConfig, VisionLanguageModel
from photos.dataset import DataError
from photos.synthetic import Synthetic

pytestmark = pytest.mark.usefixtures("quick")


@given(st.lists(st.integers(0, 12), min_size=2, max_size=60), st.floats(0.05, 0.6), st.integers(0, 3))
def test_hold_out_takes_whole_groups_and_leaves_every_label_in_training(groups, share, seed):
    labels = [str(group % 4) for group in groups]
    ids, groups_of = np.array(groups), {}
    for group in groups:
        groups_of.setdefault(str(group % 4), set()).add(group)
    if all(len(found) == 1 for found in groups_of.values()):
        with pytest.raises(DataError, match="too few products"):
            hold_out(ids, share, 100, seed, labels)
        return
    kept, held = hold_out(ids, share, 100, seed, labels)
    assert sorted([*kept, *held]) == list(range(len(groups))) and not set(ids[kept]) & set(ids[held])
    assert {labels[row] for row in kept} == set(labels) and len(held)
    assert len(set(ids[held])) <= max(2, round(share * len(set(groups))))
    assert all(
        np.array_equal(*pair) for pair in zip(hold_out(ids, share, 100, seed, labels), (kept, held), strict=True)
    )
    assert len(set(ids[hold_out(ids, 0.5, 1, seed, labels)[1]])) == 1


def test_best_step_is_the_first_of_the_highest():
    job = Job("x", None, None, {}, "val_a", 2)
    said = [{"step": step, "val_a": value} for step, value in ((1, 0.2), (2, 0.7), (3, 0.7), (4, 0.1))]
    assert job.best_step(said) == 2 and job.best_step([{"step": 1, "loss": 3}]) is None
    assert job.stalled(said) and not job.stalled(said[:3]) and not job.stalled([])
    assert not Job("x", None, None, {}).stalled(said)


def timm_names(vit):
    """Our ViT's weights under timm's names, which DeiT, MAE and ALBEF share."""
    state = {"cls_token": vit.cls_token, "pos_embed": vit.position_embed}
    for part in ("weight", "bias"):
        state[f"patch_embed.proj.{part}"] = getattr(vit.patch_embed, part)
        state[f"norm.{part}"] = getattr(vit.norm, part)
        for i, layer in enumerate(vit.layers):
            a = layer.attention
            state[f"blocks.{i}.attn.qkv.{part}"] = torch.cat([getattr(m, part) for m in (a.query, a.key, a.value)])
            for name, module in (("attn.proj", a.output), ("norm1", layer.norm1), ("norm2", layer.norm2),
                                 ("mlp.fc1", layer.mlp[0]), ("mlp.fc2", layer.mlp[2])):  # fmt: skip
                state[f"blocks.{i}.{name}.{part}"] = getattr(module, part)
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def bert_names(model):
    """Our text and fusion encoders under BERT's names, as ALBEF stores them."""
    table = model.text.position_embeddings
    state = {
        "embeddings.word_embeddings.weight": model.text.word_embeddings.weight,
        "embeddings.position_embeddings.weight": torch.cat([table, torch.zeros(9, table.shape[1])]),
        "embeddings.token_type_embeddings.weight": torch.zeros(2, table.shape[1]),
        "embeddings.position_ids": torch.arange(29)[None],
        "embeddings.LayerNorm.weight": model.text.norm.weight,
        "embeddings.LayerNorm.bias": model.text.norm.bias,
    }
    for i, layer in enumerate([*model.text.layers, *model.fusion.layers]):
        for ours, theirs in (("attention", "attention"), ("cross_attention", "crossattention")):
            if not hasattr(layer, ours):
                continue
            module = getattr(layer, ours)
            for part in ("weight", "bias"):
                for piece in ("query", "key", "value"):
                    state[f"encoder.layer.{i}.{theirs}.self.{piece}.{part}"] = getattr(getattr(module, piece), part)
                state[f"encoder.layer.{i}.{theirs}.output.dense.{part}"] = getattr(module.output, part)
                state[f"encoder.layer.{i}.{theirs}.output.LayerNorm.{part}"] = getattr(
                    getattr(layer, f"{ours}_norm"), part
                )
        for part in ("weight", "bias"):
            state[f"encoder.layer.{i}.intermediate.dense.{part}"] = getattr(layer.mlp[0], part)
            state[f"encoder.layer.{i}.output.dense.{part}"] = getattr(layer.mlp[2], part)
            state[f"encoder.layer.{i}.output.LayerNorm.{part}"] = getattr(layer.mlp_norm, part)
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def hub_vit_names(vit):
    """Hugging Face's names as they stand in published ViT files."""
    state = {}
    for name, tensor in timm_names(vit).items():
        name = name.replace("cls_token", "vit.embeddings.cls_token").replace(
            "pos_embed", "vit.embeddings.position_embeddings"
        )
        name = name.replace("patch_embed.proj", "vit.embeddings.patch_embeddings.projection").replace(
            "blocks.", "vit.encoder.layer."
        )
        name = name.replace("norm1", "layernorm_before").replace("norm2", "layernorm_after")
        name = (
            name.replace("attn.proj", "attention.output.dense")
            .replace("mlp.fc1", "intermediate.dense")
            .replace("mlp.fc2", "output.dense")
        )
        if name.startswith("norm."):
            name = "vit.layernorm." + name.removeprefix("norm.")
        if "attn.qkv" in name:
            for piece, t in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                state[name.replace("attn.qkv", f"attention.attention.{piece}")] = t.clone()
        else:
            state[name] = tensor
    return state


@pytest.mark.parametrize("naming", [timm_names, hub_vit_names])
@pytest.mark.parametrize("wrapped", [False, True])
def test_vision_weights_in_every_naming(tmp_path, naming, wrapped):
    source, target = make_model(seed=1), make_model(seed=2)
    state = naming(source.vision) | {"head.weight": torch.zeros(3, 48), "decoder_blocks.0.norm1.weight": torch.zeros(9)}
    torch.save({"model": state, "args": argparse.Namespace(lr=1)} if wrapped else state, tmp_path / "vit.pth")
    report = load_pretrained(target, [tmp_path / "vit.pth"])
    assert set(report.skipped) == {"head.weight", "decoder_blocks.0.norm1.weight"}
    for (name, ours), theirs in zip(target.vision.named_parameters(), source.vision.parameters(), strict=True):
        assert name == "registers" or torch.equal(ours, theirs)
    assert "text.norm.weight" in report.missing and "vision.norm.weight" in report.loaded


def test_position_embeddings_are_interpolated_to_the_grid(tmp_path):
    finer = ModelConfig(**{**SMALL.__dict__, "image_size": 64})
    source, target = make_model(seed=1), make_model(finer)
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
def test_whole_albef_checkpoint(tmp_path, wrapper):
    source, target = make_model(seed=1), make_model(seed=2)
    state = {f"visual_encoder.{k}": v for k, v in timm_names(source.vision).items()}
    state |= {f"text_encoder.bert.{k}": v for k, v in bert_names(source).items()}
    own = dict(source.named_parameters())
    for name in ("vision_proj", "text_proj", "itm_head"):
        state |= {f"{name}.{part}": own[f"{name}.{part}"].detach() for part in ("weight", "bias")}
    state["temp"] = source.temp.detach()
    state |= {"text_encoder.cls.predictions.bias": source.mlm_bias.detach(), "image_queue": torch.zeros(4, 9)}
    state |= {
        f"text_encoder.cls.predictions.transform.dense.{p}": getattr(source.mlm_head[0], p).detach()
        for p in ("weight", "bias")
    }
    state |= {
        f"text_encoder.cls.predictions.transform.LayerNorm.{p}": getattr(source.mlm_head[2], p).detach()
        for p in ("weight", "bias")
    }
    state |= {f"visual_encoder_m.{k}": v + 1 for k, v in timm_names(source.vision).items()}
    state |= {f"text_encoder_m.bert.{k}": v + 1 for k, v in bert_names(source).items()}
    torch.save({"model": {wrapper + k: v for k, v in state.items()}, "epoch": 3}, tmp_path / "albef.pth")
    report = load_pretrained(target, [tmp_path / "albef.pth"])
    assert [name for name in report.missing if not name.startswith("decoder.")] == ["vision.registers"]
    for (name, ours), theirs in zip(target.named_parameters(), source.parameters(), strict=True):
        assert name.startswith("decoder.") or torch.equal(ours, theirs), name
    assert "image_queue" in report.skipped


def test_weights_of_another_size_are_refused_and_partial_fits_reported(tmp_path):
    other = make_model(ModelConfig(**{**SMALL.__dict__, "width": 64}))
    target = make_model()
    torch.save(timm_names(other.vision), tmp_path / "vit.pth")
    with pytest.raises(WeightsError, match="none of its tensors fits"):
        load_pretrained(target, [tmp_path / "vit.pth"])
    state = bert_names(make_model(seed=3))
    state["embeddings.word_embeddings.weight"] = torch.zeros(99, 48)
    torch.save(state, tmp_path / "bert.bin")
    report = load_pretrained(target, [tmp_path / "bert.bin"])
    assert "shape (99, 48), this model has (60, 48)" in str(report)
    assert "text.word_embeddings.weight" in report.missing


class Malicious:
    def __reduce__(self):
        return (print, ("ran pickled code",))


@pytest.mark.parametrize("kind", ["absent", "text", "pickle", "safetensors", "truncated", "list"])
def test_unreadable_weights_are_one_clear_line(tmp_path, kind, capsys):
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pth")
    if kind in ("text", "safetensors"):
        path.write_text("not weights at all, but long enough to be read as a header of some kind")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"model": Malicious()}))
    elif kind == "truncated":
        torch.save(timm_names(make_model().vision), path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "list":
        torch.save([1, 2], path)
    with pytest.raises(WeightsError, match=str(path.name)) as caught:
        load_pretrained(make_model(), [path])
    assert "\n" not in str(caught.value) and "ran pickled code" not in capsys.readouterr().out


def test_published_words_fill_a_vocabulary_that_ends_with_the_symbols(tmp_path):
    state = bert_names(make_model(seed=3))
    torch.save(state, tmp_path / "bert.bin")
    target = make_model(replace(SMALL, vocab_size=SMALL.vocab_size + 9))
    before = target.text.word_embeddings.weight.detach().clone()
    report = load_pretrained(target, [tmp_path / "bert.bin"])
    after, words = target.text.word_embeddings.weight, state["embeddings.word_embeddings.weight"]
    assert torch.equal(after[:-9], words) and torch.equal(after[-9:], before[-9:])
    assert "text.word_embeddings.weight" in report.loaded
    narrow = make_model(replace(SMALL, vocab_size=SMALL.vocab_size + 9, width=32, text_layers=1))
    state["cls.predictions.bias"] = torch.zeros(SMALL.vocab_size)
    torch.save(state, tmp_path / "bert.bin")
    assert "shape (60, 48), this model has (69, 32)" in str(load_pretrained(narrow, [tmp_path / "bert.bin"]))


def test_text_and_whole_weights_can_be_given(tmp_path, capsys):
    (tmp_path / "vocab.txt").write_text(
        "\n".join([*data.SPECIAL_TOKENS, *"abcdefghij", *("##" + c for c in "abcdefghij")])
    )
    bert = {"LayerNorm.weight": torch.full((32,), 0.5), "word_embeddings.weight": torch.zeros(25, 32)}
    torch.save({f"bert.embeddings.{name}": tensor for name, tensor in bert.items()}, tmp_path / "bert.bin")
    albef = {"itm_head.bias": torch.tensor([0.25, -0.25]), "vision_proj.bias": torch.zeros(256)}
    torch.save({"model": albef}, tmp_path / "albef.pth")
    flags = [flag for flag in FAST if flag not in ("--vocab-size", "300")] + ["--vocab", str(tmp_path / "vocab.txt")]
    for name, key in (("bert.bin", "text.norm.weight"), ("albef.pth", "itm_head.bias")):
        given = [
            "--weights",
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
        assert "2 tensors loaded" in capsys.readouterr().out
        assert checkpoint(tmp_path / key)["model"][key].abs().max() in (0.5, 0.25)


def test_resuming_on_other_data_is_refused(tmp_path):
    run(tmp_path, "--steps", "2", stop_at=1)
    state = checkpoint(tmp_path)
    torch.save(state | {"data": 1}, tmp_path / "last.pt")
    with pytest.raises(ConfigError, match="other rows than the training split holds now"):
        resume(tmp_path)
    torch.save(state | {"config": state["config"] | {"colour": 1}}, tmp_path / "last.pt")
    with pytest.raises(ConfigError, match="another version of this code"):
        resume(tmp_path)


def test_precision_fits_the_machine():
    has = lambda **flags: mock.patch("torch.cpu.get_capabilities", lambda: flags)
    one_dnn = lambda there: mock.patch("torch.backends.mkldnn.is_available", lambda: there)
    cpu = torch.device("cpu")
    with has(avx512_bf16=True, amx_bf16=False), one_dnn(True):
        taken, why = fitting_precision(cpu)
        assert taken == "bf16" and "AVX-512" in why
    with has(avx512_bf16=True, amx_bf16=True), one_dnn(True):
        assert "AMX" in fitting_precision(cpu)[1]
    with has(avx512_bf16=True), one_dnn(False):
        assert fitting_precision(cpu)[0] == "fp32"
    with has(avx512_f=True, neon=True), one_dnn(True):  # could compute in bf16, and would not be faster
        assert fitting_precision(cpu)[0] == "fp32"
    for there in (True, False):
        with mock.patch("torch.cuda.is_bf16_supported", lambda including_emulation, there=there: there):
            assert fitting_precision(torch.device("cuda"))[0] == ("bf16" if there else "fp32")


def test_the_precision_taken_is_recorded_and_kept(tmp_path, capsys, monkeypatch):
    for where in ("harness.run", "train"):
        monkeypatch.setattr(f"{where}.fitting_precision", lambda _: ("bf16", "for this test"))
    run(tmp_path, "--precision", "auto", "--steps", "2", stop_at=1)
    assert json.loads((tmp_path / "config.json").read_text())["precision"] == "bf16"
    assert "precision bf16, for this test" in capsys.readouterr().out
    for where in ("harness.run", "train"):
        monkeypatch.setattr(f"{where}.fitting_precision", lambda _: ("fp32", "for another machine"))
    with pytest.raises(ConfigError, match="--precision fp32 contradicts"):
        resume(tmp_path, "--precision", "fp32")
    resume(tmp_path, "--precision", "auto")
    assert checkpoint(tmp_path)["config"]["precision"] == "bf16"
    assert "precision bf16; auto takes fp32 here" in capsys.readouterr().out


def test_a_checkpoint_is_of_the_moment_and_what_fails_in_writing_is_told(tmp_path, monkeypatch):
    writer, state = Writer(), {"part": [torch.ones(3)], "step": 1}
    writer.write(state, tmp_path / "last.pt")
    state["part"][0].zero_()  # training goes on
    writer.wait()
    assert torch.load(tmp_path / "last.pt")["part"][0].sum() == 3
    monkeypatch.setattr("harness.writer.torch.save", mock.Mock(side_effect=OSError("no space left")))
    writer.write(state, tmp_path / "last.pt")
    with pytest.raises(OSError, match="no space"):
        writer.write(state, tmp_path / "last.pt")
    assert torch.load(tmp_path / "last.pt")["step"] == 1  # the old one is whole


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path):
    script = "import sys, time; from pathlib import Path; from harness.host import claimed\n"
    script += "with claimed(Path(sys.argv[1])): print('mine', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(train.__file__).parent, text=True) as other:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(ConfigError, match=f"is being written by process {other.pid}; choose another --out"):
            run(tmp_path, "--steps", "1")
        assert not (tmp_path / "config.json").exists()
        other.kill()
    run(tmp_path, "--steps", "1")  # what is left of a killed run claims nothing


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    with pytest.raises(NonFiniteLoss, match=r"step \d: the (weights|loss)"):
        run(tmp_path, "--steps", "4", "--lr", "1e38", "--warmup", "0", "--val-every", "1")
    if (tmp_path / "last.pt").exists():
        assert all(weight.isfinite().all() for weight in checkpoint(tmp_path)["model"].values())


def test_similarities_stay_in_full_precision_under_bf16():
    config, _ = parse_config([*FAST, "--precision", "bf16"])
    dataset = Synthetic("train", 8, 32, progress=False)
    state = build_run(config, dataset, data.build_tokenizer(dataset.captions, 300, 64))
    batch = data.Collate(state.tokenizer)([dataset[row] for row in range(6)])
    with autocast(state):
        image_embeds = state.model.encode_image(data.normalise(batch["images"]))
        text_embeds = state.model.encode_text(batch["token_ids"], batch["attention_mask"])
        feats = state.model.project_image(image_embeds), state.model.project_text(text_embeds)
        itc = contrast(state, batch, *feats, Teacher(state.momentum, image_embeds, text_embeds, *feats))
    assert itc.sim_i2t.dtype == torch.float32
    exact = feats[0].double() @ feats[1].double().T / state.model.temp.item()
    assert (itc.sim_i2t.double() - exact).abs().max() < 0.05


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
        "--weights",
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


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--stepps", "3"], "unknown flag --stepps; did you mean --steps?"),
        (["--steps", "3", "--epochs", "1"], "--steps and --epochs contradict each other"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--mlm-ratio", "1.5"], "--mlm-ratio 1.5: must be between 0 and 1"),
        (["--recipe", "clip"], "invalid choice: 'clip'"),
        (["--no-soft-mask"], "--soft-mask is for --recipe softmask, not for syncmask"),
        (["--recipe", "albef", "--word-mask", "sync"], "--word-mask is for --recipe syncmask, not for albef"),
        (["--data", "jsonl", "--root", "x", "--word-mask", "true"], "what photos show is not known of jsonl"),
        (["--prompts", "--max-length", "9"], "--max-length 9: --prompts need 16 at least"),
        (["--recipe", "fashionfine", "--no-prompts"], "--alignment needs --prompts"),
        (["--root", "x"], "--root is for data from files"),
        (["--data", "jsonl", "--root", "/nowhere"], "/nowhere: no such folder"),
        (["--weights", "x", "y", "z"], "--weights takes one file, or two"),
        (["--vocab", "x", "--vocab-size", "9"], "--vocab-size contradicts --vocab"),
        (["--image-size", "60"], "not a multiple of patch_size"),
        (["--lr", "inf"], "--lr inf: must be a finite number"),
        (["--seed", str(2**64)], "--seed 18446744073709551616: must be between 0 and"),
        (["--device", "cuda:99"], "no such GPU"),
        (["--vision-layers", "1", "--products", "1"], "--products 1: must be at least 2"),  # not: patch_layer 2
        (["--out", "/dev/null/x", "--products", "2"], "/dev/null/x"),
        (["--weights", "/nowhere.pth", "--products", "2"], "/nowhere.pth: no such weights file"),
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
    assert config.negatives == run_config.SCHEDULES["tiny"]["negatives"]
    config, _ = parse_config([])
    assert config.recipe == "syncmask" and config.model == replace(
        PRESETS["tiny"], registers=4, cls_context=False, patch_layer=2
    )
    assert config.negatives == "semihard" and parse_config(["--negatives", "hard"])[0].negatives == "hard"
    config, _ = parse_config(["--epochs", "2", "--lr", "0.1", "--registers", "4"])
    assert (config.steps, config.epochs, config.lr, config.model.registers) == (None, 2, 0.1, 4)
    config, _ = parse_config(["--data", "fashiongen"])
    assert config.preset == "base" and config.model.width == PRESETS["base"].width
    assert config.queue == 0 and parse_config(["--preset", "base", "--recipe", "albef"])[0].queue == 65536
    config, _ = parse_config(["--no-compile", "--data", "jsonl"])
    assert config.compile is False and config.preset == "small"


def test_resume_refuses_flags_that_change_the_result_and_runs_are_not_overwritten(tmp_path):
    run(tmp_path, "--steps", "2")
    with pytest.raises(ConfigError, match="--weight-decay 0.5 contradicts the run to resume"):
        resume(tmp_path, "--weight-decay", "0.5")
    with pytest.raises(ConfigError, match="--width 64 contradicts"):
        resume(tmp_path, "--width", "64")
    before = lines(tmp_path)[-1]
    assert {k: v for k, v in resume(tmp_path, "--vocab-size", "300").items() if k.startswith("val")} == {
        k: v for k, v in before.items() if k.startswith("val")
    }  # finished already: the same final line
    with pytest.raises(ConfigError, match="--root is for data from files"):
        resume(tmp_path, "--root", "x")
    with pytest.raises(ConfigError, match="holds a run already; add --resume"):
        run(tmp_path, "--steps", "2")
    (tmp_path / "last.pt").write_text("something else")
    with pytest.raises(ConfigError, match="not a checkpoint of train.py"):
        resume(tmp_path)


def test_learning_rate_warms_up_and_falls_along_a_cosine():
    config = replace(parse_config([])[0], lr=1.0, final_lr=0.1, warmup=10)
    rates = [learning_rate(step, config, 111) for step in range(111)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_alpha_ramps_over_the_first_epoch_and_negatives_start_random():
    dataset = Synthetic("train", 12, 32, progress=False)
    config, _ = parse_config(
        [*FAST, "--alpha", "0.4", "--negatives", "hard", "--itm-share", "0.6", "--itm-warmup", "10"]
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


def test_accuracy_ignores_unlabelled_rows():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]])
    assert accuracy(logits, torch.tensor([0, 0, -100])) == 0.5
