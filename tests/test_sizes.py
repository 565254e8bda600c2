"""Published weights and their sizes: what fits, what is refused with which flags, and what a config.json sets."""

import json
from dataclasses import replace

import pytest
import torch
from small import FAST, checkpoint
from test_model import SMALL, bert_config, make_model, randomise
from transformers import BertConfig, BertModel, BertTokenizerFast, ViTConfig, ViTModel

import train
from data import SPECIAL_TOKENS, build_tokenizer, tokenize
from engine.config import parse_config
from engine.flags import ConfigError
from engine.weights import load_pretrained
from model import PRESETS, VisionLanguageModel

WORDS = [*SPECIAL_TOKENS, *["a", "red", "dress", "with", "long", "sleeves", "navy", "shirt", "in"], "##s", ".", ","]
CAPTIONS = ["A red dress, with long sleeves.", "Navy shirts in red", "unseen"]
BERT = dict(vocab_size=len(WORDS), hidden_size=48, intermediate_size=192, num_attention_heads=3, num_hidden_layers=2)
VIT = dict(
    hidden_size=48, intermediate_size=192, num_attention_heads=3, num_hidden_layers=5, image_size=40, patch_size=8
)


def bert_folder(folder, **sizes):
    """Write a random BERT as its publishers do: weights, config.json, tokenizer.json. -> BERT, tokenizer"""
    model = randomise(BertModel(BertConfig(**BERT | sizes), add_pooling_layer=False))
    model.save_pretrained(folder)
    tokenizer = BertTokenizerFast(vocab={word: number for number, word in enumerate(WORDS)})
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def vit_folder(folder, **sizes):
    randomise(ViTModel(ViTConfig(**VIT | sizes), add_pooling_layer=False)).save_pretrained(folder)


@torch.no_grad()
def test_a_minilm_gives_its_own_tokens_and_outputs(tmp_path):
    """A BERT of 6 layers of width 384, as docs/training.md shows: the flags fit it, and so does --sizes-from."""
    folder = tmp_path / "minilm"
    sizes = dict(hidden_size=384, intermediate_size=1536, num_attention_heads=12, num_hidden_layers=6)
    bert, reference = bert_folder(folder, **sizes)
    flags = ["--data", "jsonl", "--preset", "small"]
    by_flags = parse_config([*flags, "--heads", "12"])[0].model
    assert parse_config([*flags, "--sizes-from", str(folder)])[0].model == by_flags
    tokenizer = build_tokenizer([], 0, by_flags.max_length, vocab=folder)
    small = replace(by_flags, vocab_size=tokenizer.get_vocab_size(), vision_layers=1, fusion_layers=1)
    with pytest.raises(ConfigError, match=f"give --heads 12, or --sizes-from {folder}"):
        load_pretrained(VisionLanguageModel(replace(small, heads=6)), [folder / "model.safetensors"])
    model = VisionLanguageModel(small).eval()
    report = load_pretrained(model, [folder / "model.safetensors"])
    assert not report.skipped and not report.hints
    assert not [name for name in report.missing if name.startswith("text.")]
    batch = tokenize(tokenizer, [("", caption) for caption in CAPTIONS])
    expected = reference(CAPTIONS, padding=True, pad_to_multiple_of=8, return_tensors="pt")
    assert torch.equal(batch["token_ids"], expected["input_ids"])
    ours = model.text(batch["token_ids"], batch["attention_mask"])
    theirs = bert(**expected).last_hidden_state
    is_token = batch["attention_mask"].bool()
    assert (ours - theirs)[is_token].abs().max() < 3e-6


def test_a_run_takes_sizes_weights_and_vocabulary_from_published_folders(tmp_path, quick, capsys):
    bert_folder(tmp_path / "bert"), vit_folder(tmp_path / "vit")
    folders = [str(tmp_path / "vit"), str(tmp_path / "bert")]
    schedule = FAST[FAST.index("--batch-size") :]
    flags = [*schedule, "--steps", "1", "--out", str(tmp_path / "out"), "--vocab", folders[1], "--sizes-from", *folders]
    train.main([*flags, "--weights", *(f"{folder}/model.safetensors" for folder in folders)])
    assert "0 skipped" in capsys.readouterr().out
    sizes = checkpoint(tmp_path / "out")["config"]["model"]
    assert [sizes[name] for name in ("image_size", "patch_size", "width", "heads")] == [40, 8, 48, 3]
    assert [sizes[name] for name in ("vision_layers", "text_layers", "fusion_layers")] == [5, 2, 2]
    train.main(["--resume", *flags])  # the run is finished


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 96, "intermediate_size": 384}, "give --width 96 --heads 3, or --sizes-from"),
        ({"num_attention_heads": 6, "num_hidden_layers": 8}, "give --heads 6 --text-layers 4 --fusion-layers 4, or"),
    ],
)
def test_the_refusal_of_a_bert_names_the_flags_that_fit(tmp_path, changes, message):
    bert_folder(tmp_path, **changes)
    with pytest.raises(ConfigError, match=rf"model.safetensors: does not fit the sizes of this model; {message}"):
        load_pretrained(make_model(), [tmp_path / "model.safetensors"])


def test_the_refusal_of_a_vit_names_the_flags_that_fit(tmp_path):
    vit_folder(tmp_path, patch_size=4, num_attention_heads=4)
    with pytest.raises(ConfigError, match="give --patch-size 4 --vision-layers 5, or --sizes-from"):
        load_pretrained(make_model(), [tmp_path / "model.safetensors"])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))  # of other weights
    with pytest.raises(ConfigError, match="--vision-layers 5, and --heads as its config.json says"):
        load_pretrained(make_model(), [tmp_path / "model.safetensors"])


def test_another_number_of_layers_is_loaded_with_a_hint(tmp_path):
    """SMALL has 3 layers in the ViT, 2 in the text and 2 in the fusion encoder."""
    torch.save(BertModel(bert_config(layers=6), add_pooling_layer=False).state_dict(), tmp_path / "bert.bin")
    report = load_pretrained(make_model(), [tmp_path / "bert.bin"])
    assert str(report).endswith("bert.bin: --text-layers 3 --fusion-layers 3 would load all of its layers")
    for layers in (2, 4):
        torch.save(BertModel(bert_config(layers=layers), add_pooling_layer=False).state_dict(), tmp_path / "bert.bin")
        assert not load_pretrained(make_model(), [tmp_path / "bert.bin"]).hints
    vit_folder(tmp_path, num_attention_heads=4, image_size=32)
    report = load_pretrained(make_model(), [tmp_path / "model.safetensors"])
    assert report.hints == [f"{tmp_path}/model.safetensors: --vision-layers 5 would load all of its layers"]


def write_config(folder, name, **content):
    (folder / name).mkdir()
    (folder / name / "config.json").write_text(json.dumps(content))
    return str(folder / name)


def bert_sizes(layers, **more):
    return dict(model_type="bert", hidden_size=768, num_attention_heads=12, num_hidden_layers=layers) | more


@pytest.mark.parametrize(
    ("preset", "layers", "expected"),
    [("base", 12, (6, 6)), ("base", 24, (12, 12)), ("base", 4, (4, 6)), ("tiny", 12, (6, 6)), ("tiny", 2, (2, 2))],
)
def test_the_layers_of_a_bert_are_divided(tmp_path, preset, layers, expected):
    folder = write_config(tmp_path, "bert", **bert_sizes(layers))
    model = parse_config(["--preset", preset, "--sizes-from", folder])[0].model
    assert (model.text_layers, model.fusion_layers) == expected and (model.width, model.heads) == (768, 12)
    assert model.vision_layers == PRESETS[preset].vision_layers


def test_flags_come_before_sizes_from_and_an_export_sets_its_own_sizes(tmp_path):
    folder = write_config(tmp_path, "bert", **bert_sizes(12))
    model = parse_config(["--sizes-from", folder, "--heads", "8", "--text-layers", "1"])[0].model
    assert (model.heads, model.text_layers, model.fusion_layers) == (8, 1, 6)
    own = replace(SMALL, max_length=50)
    folder = write_config(tmp_path, "export", model_type="albef", model=vars(own))
    model = parse_config(["--recipe", "albef", "--sizes-from", folder])[0].model
    assert model == replace(own, vocab_size=model.vocab_size)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bert_sizes(12, model_type="roberta"), "of a model of type roberta; only BERT and ViT fit"),
        ({"a": 1}, "of a model of type None"),
        ([], "not a config of a model"),
        (bert_sizes("x"), "key num_hidden_layers is missing, or is no whole number"),
        (bert_sizes(12, hidden_size=312, intermediate_size=1200), "intermediate_size must be 4 times hidden_size"),
        (bert_sizes(12, hidden_size=10**9), "width 1000000000 is not between"),
        (bert_sizes(12, num_attention_heads=7), "width 768 is not a multiple of heads 7"),
        (None, "config.json: no such file"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused_in_one_line(tmp_path, content, message, capsys):
    if content is not None:
        (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit) as caught:
        train.main(["--sizes-from", str(tmp_path)])
    assert message in caught.value.code and "\n" not in caught.value.code


def test_two_models_of_unlike_sizes_are_refused(tmp_path):
    bert = write_config(tmp_path, "bert", **bert_sizes(12))
    vit = dict(model_type="vit", hidden_size=768, num_attention_heads=6, num_hidden_layers=12)
    vit = write_config(tmp_path, "vit", **vit, image_size=224, patch_size=16)
    with pytest.raises(ConfigError, match=f"--sizes-from: --heads 6 for {vit}, but 12 for another; all encoders"):
        parse_config(["--sizes-from", bert, vit])
