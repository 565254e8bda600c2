"""`transformers` reads an export with the same outputs, and train.py reads it bit for bit."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file
from test_model import SMALL, close, make_model
from tokenizers import Tokenizer
from transformers import BertConfig, BertForMaskedLM, BertModel, BertTokenizerFast, ViTModel

import finetune
import train
from data import build_tokenizer
from engine.checkpoints import CHECKPOINT_KEYS
from engine.config import TrainConfig
from engine.weights import load_pretrained
from experiments import export
from model import ModelConfig, VisionLanguageModel
from readers.dataset import DataError
from tests.small import FAST, checkpoint, run
from tutorial import explore

WORDS = ["a red dress with a round neck and long sleeves", "a blue shirt with white stripes, short sleeves"] * 3
MORE = dict(local_tokens=True, alignment=True, detector=True, classes=7)
FULL = replace(SMALL, **MORE)


def write(folder, config):
    """Write a checkpoint of random weights. -> the model"""
    tokenizer = build_tokenizer(WORDS, config.vocab_size, config.max_length)
    config = replace(config, vocab_size=tokenizer.get_vocab_size())
    model = make_model(config, seed=0)
    state = dict.fromkeys(CHECKPOINT_KEYS) | {
        "model": dict(model.state_dict()),
        "tokenizer": tokenizer.to_str(),
        "config": asdict(TrainConfig(model=config)),
        "informative": torch.zeros(2, config.vocab_size, dtype=torch.bool).unbind(),
        "step": 0,
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "last.pt")
    return model


def exported(folder):
    """Export the checkpoint of a folder. -> the folder that `transformers` reads"""
    export.main(["--checkpoint", str(folder / "last.pt"), "--file", str(folder / "out" / "model.safetensors")])
    return folder / "out"


def from_folder(kind, folder, **settings):
    """Read a `transformers` model. -> the model, the names of its weights that the export lacks"""
    model, report = kind.from_pretrained(folder, output_loading_info=True, **settings)
    return model.eval(), report["missing_keys"]


@torch.no_grad()
def test_transformers_reads_it_with_the_same_outputs(tmp_path):
    model = write(tmp_path, SMALL)
    folder = exported(tmp_path)
    images, ids = torch.randn(3, 3, 32, 32), torch.randint(5, model.config.vocab_size, (3, 11))
    attention_mask = torch.ones(3, 11, dtype=torch.long)
    attention_mask[1, 7:] = 0

    vit, missing = from_folder(ViTModel, folder, add_pooling_layer=False)
    image_embeds = model.vision(images)
    assert not missing
    close(image_embeds, vit(images).last_hidden_state)
    bert, missing = from_folder(BertModel, folder, add_pooling_layer=False)
    text_embeds = model.text(ids, attention_mask)
    assert not missing
    close(text_embeds, bert(ids, attention_mask=attention_mask).last_hidden_state, attention_mask)

    config = json.loads((folder / "config.json").read_text())["multimodal_config"]
    whole, missing = from_folder(BertForMaskedLM, folder, config=BertConfig(**config))
    lower = tuple(f"bert.encoder.layer.{number}.crossattention." for number in range(SMALL.text_layers))
    assert missing and all(name.startswith(lower) for name in missing)
    hidden_state, mask = text_embeds, attention_mask[:, None, None, :].bool().expand(-1, 1, ids.shape[1], -1)
    for layer in whole.bert.encoder.layer[SMALL.text_layers :]:
        layer.attention.self.is_causal = False
        out = layer(hidden_state, attention_mask=mask, encoder_hidden_states=image_embeds)
        hidden_state = out[0] if isinstance(out, tuple) else out
    fused = model.fusion(text_embeds, attention_mask, model.fusion.project_image_kv(image_embeds))
    close(fused, hidden_state, attention_mask)
    close(model.mlm_logits(fused), whole.cls(hidden_state), attention_mask)


@pytest.mark.parametrize("config", [SMALL, FULL])
def test_it_is_read_back_bit_for_bit(tmp_path, config, capsys):
    model = write(tmp_path, config)
    folder = exported(tmp_path)
    printed, file = capsys.readouterr().out, folder / "model.safetensors"
    own_parts = {name.split(".")[0] for name in load_file(file)} - {"vit", "bert", "cls", "vision"}
    assert own_parts and all(name in printed for name in own_parts)
    target = VisionLanguageModel(ModelConfig(**json.loads((folder / "config.json").read_text())["model"]))
    report = load_pretrained(target, [file])
    assert not report.missing and not report.skipped
    for (name, ours), theirs in zip(target.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    with pytest.raises(DataError, match="a whole file like .*; give files of different kinds"):
        load_pretrained(target, [file, file])


def test_a_run_starts_from_an_export_and_the_vocabulary_is_read_back(tmp_path, capsys):
    run(tmp_path / "one", "--steps", "1")
    folder = exported(tmp_path / "one")
    saved = Tokenizer.from_str(checkpoint(tmp_path / "one")["tokenizer"])
    ids = [number for number in saved.encode("A blue dress").ids if number]  # without [PAD], which is 0
    assert BertTokenizerFast(str(folder / "vocab.txt"))("A blue dress")["input_ids"] == ids and len(ids) > 4
    weights = ["--weights", str(folder / "model.safetensors"), "--vocab", str(folder / "vocab.txt")]
    flags = [flag for flag in FAST if flag not in ("--vocab-size", "300")]
    train.main([*flags, *weights, "--lr", "0", "--min-lr", "0", "--steps", "1", "--out", str(tmp_path / "two")])
    assert "0 skipped, 0 missing" in capsys.readouterr().out
    one, two = checkpoint(tmp_path / "one")["model"], checkpoint(tmp_path / "two")["model"]
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert json.loads(checkpoint(tmp_path / "two")["tokenizer"])["model"] == json.loads(saved.to_str())["model"]


def test_what_cannot_be_exported_is_one_line(tmp_path):
    write(tmp_path, SMALL)
    with pytest.raises(SystemExit, match=r"export.py: .*last.pt: no such checkpoint"):
        exported(tmp_path / "nowhere")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("a run's own")
    with pytest.raises(SystemExit, match=r"out/config.json exists already"):
        exported(tmp_path)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]


def test_an_export_is_a_checkpoint(tmp_path):
    """Evaluation of an exported folder, also in fp16, agrees with evaluation of the run."""
    run(tmp_path / "run", "--steps", "2")
    out, metrics = exported(tmp_path / "run"), {}
    export.main(
        [
            f"--checkpoint={tmp_path}/run/last.pt",
            f"--file={tmp_path}/half/model.safetensors",
            "--half",
            "--note=A laptop.",
        ]
    )
    assert "A laptop." in (tmp_path / "half" / "README.md").read_text()
    explore.main(["--checkpoint", str(tmp_path / "half"), "--file", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").stat().st_size > 10_000
    assert (tmp_path / "half" / "model.safetensors").stat().st_size < 0.6 * (out / "model.safetensors").stat().st_size
    for name, path in {"run": tmp_path / "run" / "last.pt", "whole": out, "half": tmp_path / "half"}.items():
        flags = f"--task retrieval --eval-only --precision fp32 --checkpoint {path} --out {tmp_path}/of-{name}"
        finetune.main(flags.split())
        metrics[name] = json.loads((tmp_path / f"of-{name}" / "results.json").read_text())["metrics"]
    assert metrics["whole"] == metrics["run"] and metrics["half"].keys() == metrics["run"].keys()
    card = (out / "README.md").read_text()
    assert "Trained for 2 steps on drawn images of garments, seed 0" in card and "| `val_i2t_r1` | " in card

    flags = f"--task retrieval --steps 1 --checkpoint {tmp_path}/half --num-products 20 --out {tmp_path}/tuned"
    finetune.main(flags.split())
    export.main([f"--checkpoint={tmp_path}/tuned/best.pt", f"--file={tmp_path}/of-tuned/model.safetensors"])
    assert (tmp_path / "of-tuned" / "README.md").read_text().startswith("# retrieval, tiny")
    assert str(tmp_path) not in (tmp_path / "of-tuned" / "config.json").read_text()
    flags = f"--task retrieval --eval-only --checkpoint {tmp_path}/of-tuned --out {tmp_path}/again"
    finetune.main(flags.split())
    with pytest.raises(SystemExit, match="must be called model.safetensors"):
        export.main([f"--checkpoint={tmp_path}/half", f"--file={tmp_path}/new/weights.safetensors"])

    (out / "tokenizer.json").unlink()
    flags = f"--task retrieval --eval-only --checkpoint {out} --out {tmp_path}/no"
    with pytest.raises(SystemExit, match="not a complete folder of experiments/export.py"):
        finetune.main(flags.split())
