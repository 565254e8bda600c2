"""What study/export.py writes is read by `transformers`, with the same outputs, and by ourselves, bit for bit."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import BertConfig, BertForMaskedLM, BertModel, BertTokenizerFast, ViTModel

import train
from data import build_tokenizer
from harness.trust import PARTS
from harness.weights import TEXT_RULES, VISION_RULES, load_pretrained
from model import ModelConfig, VisionLanguageModel
from study import export
from tests.small import FAST, checkpoint, run

WORDS = ["a red dress with a round neck and long sleeves", "a blue shirt with white stripes, short sleeves"] * 3
PLAIN = ModelConfig(image_size=32, patch_size=8, width=48, heads=4, vision_layers=3, text_layers=2, fusion_layers=2,
                    embed_dim=16, max_length=24, vocab_size=80)  # fmt: skip
FULL = replace(PLAIN, registers=3, patch_layer=2, cls_context=False, local_image=0.05, local_text=0.25, alignment=True,
               detector=True, classes=7)  # fmt: skip


def write(folder, config, **more):
    """A checkpoint of random weights, every one of them, and what is exported of it. -> model, average, folder."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(WORDS, config.vocab_size, config.max_length)
    config = replace(config, vocab_size=tokenizer.get_vocab_size())
    model, average = VisionLanguageModel(config).eval(), VisionLanguageModel(config).eval()
    with torch.no_grad():
        for parameter in (*model.parameters(), *average.parameters()):
            parameter.normal_(std=0.2)
    state = dict.fromkeys(PARTS) | {
        "model": dict(model.state_dict()), "momentum": dict(average.state_dict()), "tokenizer": tokenizer.to_str(),
        "config": {"model": vars(config)},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state | more, folder / "last.pt")
    return model, average


def exported(folder, *flags):
    export.main(["--checkpoint", str(folder / "last.pt"), "--file", str(folder / "out" / "model.safetensors"), *flags])
    return folder / "out"


def inputs(model):
    ids = torch.randint(5, model.config.vocab_size, (3, 11))
    keep = torch.ones(3, 11, dtype=torch.long)
    keep[1, 7:] = 0
    return torch.randn(3, 3, 32, 32), ids, keep


def close(ours, theirs, keep=None):
    mine, other = (ours, theirs) if keep is None else (ours[keep.bool()], theirs[keep.bool()])
    torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_transformers_reads_it_with_the_same_outputs(tmp_path):
    model, _ = write(tmp_path, PLAIN)
    folder = exported(tmp_path)
    images, ids, keep = inputs(model)
    image_embeds, text_embeds = model.encode_image(images), model.encode_text(ids, keep)

    vit, report = ViTModel.from_pretrained(folder, add_pooling_layer=False, output_loading_info=True)
    assert not report["missing_keys"]
    close(image_embeds, vit.eval()(images).last_hidden_state)
    bert, report = BertModel.from_pretrained(folder, add_pooling_layer=False, output_loading_info=True)
    assert not report["missing_keys"]
    close(text_embeds, bert.eval()(ids, attention_mask=keep).last_hidden_state, keep)

    sizes = json.loads((folder / "config.json").read_text())["multimodal_config"]
    whole, report = BertForMaskedLM.from_pretrained(folder, config=BertConfig(**sizes), output_loading_info=True)
    lower = tuple(f"bert.encoder.layer.{number}.crossattention." for number in range(PLAIN.text_layers))
    assert report["missing_keys"] and all(name.startswith(lower) for name in report["missing_keys"])
    hidden, mask = text_embeds, keep[:, None, None, :].bool().expand(-1, 1, ids.shape[1], -1)
    for layer in whole.eval().bert.encoder.layer[PLAIN.text_layers :]:
        layer.attention.self.is_causal = False
        out = layer(hidden, attention_mask=mask, encoder_hidden_states=image_embeds)
        hidden = out[0] if isinstance(out, tuple) else out
    fused = model.fuse(text_embeds, keep, image_embeds)
    close(fused, hidden, keep)
    close(model.mlm_logits(fused), whole.cls(hidden), keep)


@torch.no_grad()
def test_with_registers_and_earlier_patches_vit_needs_a_few_lines_more(tmp_path, capsys):
    model, _ = write(tmp_path, FULL)
    folder = exported(tmp_path)
    assert "registers 3, patch_layer 2: ViTModel alone computes something else" in capsys.readouterr().out
    images = inputs(model)[0]
    vit = ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
    registers = load_file(folder / "model.safetensors")["vision.registers"]
    x, patches = torch.cat([vit.embeddings(images), registers.expand(3, -1, -1)], dim=1), None
    for number, layer in enumerate(vit.layers, start=1):
        x = layer(x)
        patches = x[:, 1:17] if number == FULL.patch_layer else patches
    close(model.encode_image(images), vit.layernorm(torch.cat([x[:, :1], patches], dim=1)))


@pytest.mark.parametrize("config", [PLAIN, FULL])
@pytest.mark.parametrize("flags", [[], ["--momentum"]])
def test_it_is_read_back_bit_for_bit(tmp_path, config, flags, capsys):
    model, average = write(tmp_path, config)
    folder, source = exported(tmp_path, *flags), average if flags else model
    said = capsys.readouterr().out
    own = {name.split(".")[0] for name in load_file(folder / "model.safetensors")} - {"vit", "bert", "cls", "vision"}
    assert own and all(name in said for name in (*own, "token types", "poolers"))
    assert ("vision.registers" in said) == (config is FULL)
    target = VisionLanguageModel(ModelConfig(**json.loads((folder / "config.json").read_text())["model"]))
    report = load_pretrained(target, [folder / "model.safetensors"])
    assert not report.missing and not report.skipped
    for (name, ours), theirs in zip(target.state_dict().items(), source.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_vocabulary_is_read_back(tmp_path):
    write(tmp_path, PLAIN)
    words = exported(tmp_path) / "vocab.txt"
    theirs, ours = BertTokenizerFast(str(words)), build_tokenizer(WORDS, 80, PLAIN.max_length, words)
    saved = Tokenizer.from_str(torch.load(tmp_path / "last.pt", weights_only=True)["tokenizer"])
    ids = [[number for number in one.encode("A blue dress").ids if number] for one in (saved, ours)]  # [PAD] is 0
    assert theirs("A blue dress")["input_ids"] == ids[0] == ids[1] and len(ids[0]) > 4


def test_every_rule_turned_round_leads_back():
    for rules in (VISION_RULES, TEXT_RULES):
        for (pattern, theirs), (_, ours) in zip(export.turned(rules), rules, strict=True):
            name = ours.replace(r"\1", "7").replace(r"\2", "key") + "weight"
            there = pattern.match(name).expand(theirs) + "weight"
            back = next(m.expand(o) + there[m.end() :] for p, o in rules if (m := re.match(p, there)))
            assert back == name


def test_a_run_starts_from_an_export(tmp_path, capsys):
    run(tmp_path / "one", "--steps", "1")
    export.main(["--checkpoint", str(tmp_path / "one/last.pt"), "--file", str(tmp_path / "x/model.safetensors")])
    words = ["--weights", str(tmp_path / "x/model.safetensors"), "--vocab", str(tmp_path / "x/vocab.txt")]
    flags = [flag for flag in FAST if flag not in ("--vocab-size", "300")]
    train.main([*flags, *words, "--lr", "0", "--final-lr", "0", "--steps", "1", "--out", str(tmp_path / "two")])
    assert "0 skipped, 0 missing" in capsys.readouterr().out
    one, two = checkpoint(tmp_path / "one")["model"], checkpoint(tmp_path / "two")["model"]
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_cannot_be_exported_is_one_line(tmp_path, capsys):
    write(tmp_path / "good", PLAIN)
    write(tmp_path / "other", PLAIN, momentum={}, model={})
    (tmp_path / "text.pt").write_text("no checkpoint")
    out = ["--file", str(tmp_path / "x" / "model.safetensors")]
    for flags, complaint in (
        (["--checkpoint", "/nowhere.pt", *out], "export.py: /nowhere.pt: no such checkpoint"),
        (["--checkpoint", str(tmp_path / "text.pt"), *out], "text.pt: damaged, or not a checkpoint of train.py"),
        (["--checkpoint", str(tmp_path / "other/last.pt"), *out], "other/last.pt: does not fit its own config"),
        (["--checkpoint", str(tmp_path / "good/last.pt"), "--file", "x.bin"], "has to end with .safetensors"),
    ):
        with pytest.raises(SystemExit) as caught:
            export.main(flags)
        said = str(caught.value.code) + capsys.readouterr().err
        assert complaint in said and "Traceback" not in said and not (tmp_path / "x").exists()
    exported(tmp_path / "good")
    with pytest.raises(SystemExit, match=r"model.safetensors is there already; give a --file in another folder"):
        exported(tmp_path / "good")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("a run's own")
    with pytest.raises(SystemExit, match=r"run/config.json is there already"):
        export.main(["--checkpoint", str(tmp_path / "good/last.pt"), "--file", str(tmp_path / "run/model.safetensors")])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]
