"""Export of trained weights: safetensors, without pickle, under Hugging Face's names.

python experiments/export.py --checkpoint runs/…/last.pt --file exported/model.safetensors

The command also writes config.json, vocab.txt, tokenizer.json, metrics.jsonl and a model card, README.md, beside the
file. finetune.py, the explorer and the walkthrough take the folder as their --checkpoint. `transformers` reads it, too:

    vit.*     our ViT           ViTModel.from_pretrained(folder, add_pooling_layer=False)
    bert.*    text encoder      BertModel.from_pretrained(folder, add_pooling_layer=False): the lower layers of one BERT
              fusion encoder    its upper layers, which have cross-attention ("multimodal_config"); set is_causal False
    cls.*     MLM head          BertForMaskedLM's; its decoder is tied to the word embeddings, its input is fused

Parts without a counterpart keep our names, and the command prints them. Token types are written as zeros, since our
position embeddings include them. Poolers are not written.

`python train.py --weights exported/model.safetensors --vocab exported` starts from exactly these weights and tokens.
"""

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from safetensors.torch import save_file
from torch import Tensor

from data import IMAGENET_MEAN, IMAGENET_STD
from engine.checkpoints import load_checkpoint, read_tokenizer
from engine.flags import ConfigError, OneLineParser, in_one_line
from engine.log import read_metrics
from engine.weights import TOKEN_TYPES, other_names, split_qkv
from model import ModelConfig, VisionLanguageModel

# Settings with paths of a machine, which are not exported. The folder of the data, root, is: evaluation needs it.
PRIVATE = {"out", "vocab", "weights", "sizes_from", "checkpoint", "image", "index"}


def rename(model: VisionLanguageModel) -> tuple[dict[str, Tensor], list[str]]:
    """Rename the weights of a model to Hugging Face's names.

    -> name -> tensor; the parts of the model that have no such name and keep ours
    """
    tensors = {TOKEN_TYPES: torch.zeros(2, model.config.width)}  # from_pretrained draws missing weights at random
    own_parts = []
    for name, tensor in split_qkv(model.state_dict()).items():
        hugging_face_names = other_names(name, model.config)
        if hugging_face_names:
            tensors[hugging_face_names[0]] = tensor.clone()
            continue
        tensors[name] = tensor.clone()  # since safetensors refuses tensors that share memory
        part = name.split(".")[0]
        if part not in own_parts:
            own_parts.append(part)
    return tensors, own_parts


def hugging_face_config(config: ModelConfig, pad_id: int) -> dict:
    """Return the config.json: sizes for ViTConfig and BertConfig, our whole config, and the normalisation of images."""
    sizes = {
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "intermediate_size": 4 * config.width,
    }
    vision = {
        **sizes,
        "model_type": "vit",
        "num_hidden_layers": config.vision_layers,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "layer_norm_eps": 1e-6,
    }
    text = {
        **sizes,
        "model_type": "bert",
        "num_hidden_layers": config.text_layers,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "pad_token_id": pad_id,
        "attention_probs_dropout_prob": config.dropout,
        "hidden_dropout_prob": config.dropout,
    }
    fusion = {
        **text,
        "num_hidden_layers": config.text_layers + config.fusion_layers,
        "is_decoder": True,
        "add_cross_attention": True,
    }
    return {
        "model_type": "albef",
        "vision_config": vision,
        "multimodal_config": fusion,
        "text_config": text,  # after the other BERT, since transformers reads the last one
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
        "model": asdict(config),  # for --sizes-from
    }


def model_card(state: dict, metrics: dict, note: str) -> str:
    """Write a model card in Markdown: what the model is, how it was trained, and its last metrics.

    state: the checkpoint
    metrics: the line of metrics.jsonl of the checkpoint's step, {} without one
    note: a sentence on the training that the checkpoint does not hold, its machine for example
    """
    config = state["config"]
    data = "drawn images of garments" if config["data"] == "synthetic" else config["data"]
    lines = [
        f"# {config.get('recipe') or config['task']}, {config['preset']}",
        "",
        f"Trained for {state['step']:,} steps on {data}, seed {config['seed']}, {config['precision']}. {note}".strip(),
        "",
        "`config.json` holds all settings, `metrics.jsonl` the training curves. The last metrics, shares from 0 to 1 "
        "(keys: `docs/glossary.md`):",
        "",
        "| metric | value |",
        "|---|---|",
    ]
    for key, value in metrics.items():
        if isinstance(value, float) and key not in ("seconds", "peak_memory_mib"):
            lines.append(f"| `{key}` | {value:.4f} |")
    return "\n".join(lines) + "\n"


def export(checkpoint: str, file: Path, half: bool = False, note: str = "") -> None:
    """Write the weights, config.json, vocabulary, metrics and model card, and print their names.

    checkpoint: last.pt or best.pt of a run, or an exported folder
    file: of the weights, called model.safetensors; the others are written beside it
    half: write the weights in fp16, half as large
    note: a sentence for the model card
    Raises ConfigError for a checkpoint that cannot be read, another file name, or a folder that is in use.
    Raises OSError where nothing can be written.
    """
    if file.name != "model.safetensors":
        raise ConfigError(f"--file {file}: must be called model.safetensors, in a folder of your choice")
    state = load_checkpoint(checkpoint)
    model = VisionLanguageModel(ModelConfig(**state["config"]["model"]))
    model.load_state_dict(state["model"])
    tokenizer = read_tokenizer(state)
    config_file = file.with_name("config.json")
    if config_file.exists():
        raise ConfigError(f"{config_file} exists already; give a --file in another folder")
    tensors, own_parts = rename(model.half() if half else model)
    words = [tokenizer.id_to_token(number) for number in range(tokenizer.get_vocab_size())]
    config = hugging_face_config(model.config, tokenizer.token_to_id("[PAD]"))
    saved = dict(state["config"])
    for name in PRIVATE & saved.keys():
        saved[name] = () if isinstance(saved[name], tuple | list) else None
    config |= {"config": saved, "step": state["step"]}
    informative = state.get("informative") or ()  # fine-tuning has none
    config["informative"] = [flags.nonzero().flatten().tolist() for flags in informative]  # token ids
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, metadata={"format": "pt"})
    config_file.write_text(json.dumps(config, indent=1) + "\n")
    file.with_name("vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    tokenizer.save(str(file.with_name("tokenizer.json")))
    run_folder = Path(checkpoint) if Path(checkpoint).is_dir() else Path(checkpoint).parent
    metrics_file = run_folder / "metrics.jsonl"
    if metrics_file.exists():
        shutil.copyfile(metrics_file, file.with_name("metrics.jsonl"))
    of_this_step = [line for line in read_metrics(metrics_file) if line["step"] == state["step"]]
    card = model_card(state, of_this_step[-1] if of_this_step else {}, note)
    file.with_name("README.md").write_text(card, encoding="utf-8")
    print(f"{file}: {len(tensors)} tensors; config.json, vocabulary, metrics and README.md are beside it")
    print(f"parts without a counterpart, under our names: {', '.join(own_parts)}")


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Errors end the process with one line."""
    parser = OneLineParser("export.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, help="last.pt or best.pt of a run, or an exported folder")
    parser.add_argument("--file", type=Path, required=True, help="file to write, model.safetensors in a new folder")
    parser.add_argument("--half", action="store_true", help="write the weights in fp16, half as large")
    parser.add_argument("--note", default="", help="a sentence for the model card, on the machine for example")
    args = parser.parse_args(argv)
    try:
        export(args.checkpoint, args.file, args.half, args.note)
    except (ConfigError, OSError) as error:
        sys.exit(f"export.py: {in_one_line(error)}")


if __name__ == "__main__":
    main()
