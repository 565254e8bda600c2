"""The configuration of fine-tuning, evaluation and search, and the command line."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np

from data import build_dataset, build_statements, build_triplets
from engine.checkpoints import load_checkpoint
from engine.config import LoopConfig, check_loop
from engine.flags import ConfigError, OneLineParser, add_flags, check_readers, flag_of, option
from model import ModelConfig
from readers.dataset import DataError, PairDataset
from readers.prompts import CAPTION_PREFIX, DIFFERENCE_PREFIX

TaskName = Literal["retrieval", "tgir", "category", "subcategory", "entailment", "search"]
RECOGNITION = ("category", "subcategory", "entailment")
FOUND = 10  # photos that search shows
IMAGE_SETS, CAPTIONED = ("synthetic", "fashiongen", "jsonl"), ("flickr30k", "coco")
TASK_DATA = {  # of the others: IMAGE_SETS
    "retrieval": (*IMAGE_SETS, *CAPTIONED),
    "tgir": ("synthetic", "fashioniq"),
    "entailment": ("synthetic", "snlive"),
    "search": (*IMAGE_SETS, *CAPTIONED, "fashioniq"),
}
TESTED = (*CAPTIONED, "fashioniq", "snlive")  # have a test split; fashioniq's targets are not published
# settings of pretraining that retrieval goes on with
CONTRAST = ("queue_size", "negatives", "itm_hard_ratio", "margin", "focal_gamma", "itc_weight")
TASK_FLAGS = {  # flags that not all tasks read
    "retrieval": (*CONTRAST, "ema_decay", "alpha", "itm_hard_warmup", "rerank"),
    **dict.fromkeys(RECOGNITION, ("modality", "freeze")),
    "search": ("query", "image", "index", "rerank"),
}


@dataclass(frozen=True)
class FinetuneConfig(LoopConfig):
    """A fine-tuning, an evaluation or a search. Every field with a help text is a flag."""

    task: TaskName | None = option(None, "what to do")
    checkpoint: str = option("runs/synthetic-syncmask-tiny/last.pt", "what train.py, or an earlier fine-tuning, left")
    data: Literal["synthetic", "fashiongen", "jsonl", "fashioniq", "flickr30k", "coco", "snlive"] | None = option(
        None, "data set (default: that of the checkpoint)"
    )
    root: str | None = option(None, "folder of the data set (default: that of the checkpoint, or data/<data>)")
    split: Literal["val", "train", "test"] = option("val", "split to report on, or to search in")
    eval_only: bool = option(False, "do not train: evaluate the checkpoint as it is")
    from_scratch: bool = option(False, "random weights instead of the checkpoint's, to compare with")
    held_out: float = option(0.1, "share of the products to choose the best step by", low=0.001, high=0.9)
    patience: int = option(0, "stop after so many validations without a better one; 0: never", low=0)
    rerank: int = option(0, "let the ITM head re-rank so many of the best by similarity", low=0)
    modality: Literal["both", "image", "text"] = option("both", "what recognition and entailment read")
    query: str | None = option(None, "words to search by")
    image: str | None = option(None, "photo to search by, alone or with words that change it")
    freeze: bool = option(False, "train the recognition head alone; with --modality image the usual linear probe")
    index: str | None = option(None, "file that keeps the features of the photos to search; made if it is not there")
    # the checkpoint's, or counted; not flags
    start: str | None = None  # task that the checkpoint was fine-tuned for, None after pretraining alone
    preset: str = "tiny"
    prompts: bool = False  # pretraining has framed its texts; here they get a lead alone, as in Fashion-FINE
    data_seed: int = 0  # decides what is in which split: the same as in pretraining
    classes: tuple[str, ...] = ()  # of recognition, in the order of the head


# Flags that only a training reads: those of its loop, but for these, and five more.
UNTRAINED = {"out", "seed", "batch_size", "num_products", "device", "precision", "workers"}
TRAINED = {spec.name for spec in fields(LoopConfig)} - UNTRAINED
TRAINED |= {"from_scratch", "held_out", "patience", "freeze", "modality"}

# Choices, but for base: learning rates, epochs and weight decay of retrieval and tgir are Fashion-FINE's.
SCHEDULES = {
    "tiny": dict(steps=200, lr=5e-4, min_lr=1e-5, warmup=20, ema_decay=0.99, alpha=0.0, crop_scale=0.8, val_every=50),
    "tiny tgir": dict(steps=300, lr=1e-3),
    "tiny category": dict(steps=600, lr=1e-3, patience=4),
    "tiny subcategory": dict(steps=600, lr=1e-3, patience=4),
    "tiny entailment": dict(steps=600, lr=3e-4),  # with 1e-3 it may stand still
    "small": dict(epochs=10, batch_size=128, lr=1e-4, min_lr=1e-6, workers=4),
    "base": dict(epochs=10, lr=3e-5, min_lr=1e-6, workers=8),
    "base retrieval": dict(epochs=30, lr=1e-5),
    "base tgir": dict(min_lr=1e-7, weight_decay=0.3),
}


def parse_config(argv: list[str] | None = None) -> tuple[FinetuneConfig, set[str], dict]:
    """Read the command line. -> config, names of the flags given, parts of the checkpoint to start from"""
    parser = OneLineParser("finetune.py", description="Downstream tasks, and search.", allow_abbrev=False)
    add_flags(parser, FinetuneConfig, SCHEDULES)
    given = vars(parser.parse_args(argv))
    if not given.get("task"):
        raise ConfigError("say with --task what to do: retrieval, tgir, category, subcategory, entailment or search")
    if given.get("resume") and (given.get("eval_only") or given["task"] == "search"):
        raise ConfigError("--resume goes on with a training, which is not done here")
    path = given.get("checkpoint", FinetuneConfig.checkpoint)
    if given.get("resume") and "out" in given:  # whose config holds what the checkpoint's config held
        path = f"{given['out']}/last.pt"
    elif not Path(path).exists():
        raise ConfigError(f"--checkpoint {path}: no such file; `python train.py` makes the default one")
    source = load_checkpoint(path)
    source = {part: source[part] for part in ("model", "tokenizer", "config", "step")}  # the rest is large
    try:
        config = layer_config(given, source["config"])
    except (TypeError, KeyError, ValueError) as error:
        raise ConfigError(f"{path}: was saved by another version of this code ({error})") from None
    if not config.resume:  # otherwise the run to resume has a say first
        check_start(config)
        check_flags(config, set(given))
    return config, set(given), source


def layer_config(given: dict, saved: dict) -> FinetuneConfig:
    """Layer the config: defaults < the checkpoint's config, `saved` < preset and task < flags, `given`."""
    task, preset, data = given["task"], saved["preset"], given.get("data", saved["data"])
    model = ModelConfig(**saved["model"])
    local_tokens = model.local_tokens and task != "tgir"  # which reads [CLS] alone, as in Fashion-FINE
    layers = {name: saved[name] for name in ("preset", "num_products", "prompts")}
    layers |= {
        "model": replace(model, local_tokens=local_tokens, alignment=False, detector=False),
        "data": data,
        "root": saved["root"] if data == saved["data"] else None,
        "start": saved.get("task"),
        "data_seed": saved.get("data_seed", saved["seed"]),
        "classes": tuple(saved.get("classes", ())),
        "modality": saved.get("modality", "both"),
    }
    if task == "retrieval":
        layers |= {name: saved[name] for name in CONTRAST}
    schedule = SCHEDULES[preset] | SCHEDULES.get(f"{preset} {task}", {})
    if "steps" in given or "epochs" in given:  # the one replaces the other
        schedule |= {"steps": None, "epochs": None}
    config = FinetuneConfig(**layers | schedule | given)
    if config.out:
        return config
    name = f"runs/{data}-{task}"
    name += f"-{config.modality}" if config.modality != "both" else ""
    for flag in ("freeze", "from_scratch", "eval_only"):
        name += f"-{flag}" if getattr(config, flag) else ""
    return replace(config, out=f"{name}-{preset}")


def check_start(config: FinetuneConfig) -> None:
    """Raise ConfigError for a checkpoint that the task cannot start from."""
    start, where = config.start, f"--checkpoint {config.checkpoint}"
    if config.task == "search":
        if start in RECOGNITION:
            raise ConfigError(f"{where}: was fine-tuned for {start}, not for finding; give a pretraining checkpoint")
        if start == "tgir" and not config.image:
            raise ConfigError(f"{where}: was fine-tuned for tgir, it needs --image to search by (and --query)")
    elif start and not (config.eval_only and start == config.task):
        raise ConfigError(f"{where}: is fine-tuned already; add --task {start} --eval-only, or give a pretraining one")
    elif not start and config.eval_only and config.task in RECOGNITION:
        raise ConfigError(f"{where}: has no classes yet; fine-tune it without --eval-only first")


def check_flags(config: FinetuneConfig, given: set[str]) -> None:
    """Raise ConfigError, in one line, for values out of range and for flags that contradict each other."""
    check_loop(config, given)
    fitting = TASK_DATA.get(config.task, IMAGE_SETS)
    if config.data not in fitting:
        raise ConfigError(f"--task {config.task} needs --data {' or '.join(fitting)}, not {config.data}")
    check_readers("task", config.task, given, TASK_FLAGS)
    if config.task == "search" or config.eval_only:
        for name in sorted(given & TRAINED):
            raise ConfigError(f"{flag_of(name)} is for training, which is not done here")
    if config.split == "train" and config.task != "search":
        raise ConfigError("--split train: metrics of what was trained on mean nothing; it is for --task search")
    if config.split == "test" and config.data not in TESTED:
        raise ConfigError(f"--split test is for {', '.join(TESTED)}; the others have val")
    if config.task == "search" and not (config.query or config.image):
        raise ConfigError("say with --query, --image or both what to search for")
    if config.rerank and config.image:
        raise ConfigError("--rerank contradicts --image: the ITM head compares photos with words alone")


def open_data(config: FinetuneConfig, split: str) -> PairDataset:
    """Open a split as the task reads it: images, triplets or statements; of recognition what has a label."""
    build = build_dataset
    if config.task == "tgir" or config.data == "fashioniq":
        build = build_triplets
    elif config.task == "entailment":
        build = build_statements
    dataset = build(config.data, config.root, split, config.model.image_size, config.data_seed, config.num_products)
    if config.task == "search" and config.data == "fashioniq":
        dataset = dataset.image_set
    elif config.task in ("category", "subcategory"):
        labelled = np.flatnonzero([bool(label) for label in labels_of(config, dataset)])
        if not len(labelled):
            raise DataError(f"no photo of the {split} split has a {config.task}")
        dataset, problems = dataset.subset(labelled), dataset.problems
        dataset.problems = problems
    dataset.caption_prefix = caption_prefix(config)
    return dataset


def labels_of(config: FinetuneConfig, dataset: PairDataset) -> list[str]:
    """The label of each row; of a statement it is kept as the category."""
    return dataset.subcategories if config.task == "subcategory" else dataset.categories


def caption_prefix(config: FinetuneConfig) -> str:
    """What stands before each text, where pretraining has framed its texts."""
    if not config.prompts:
        return ""
    return DIFFERENCE_PREFIX if "tgir" in (config.task, config.start) else CAPTION_PREFIX
