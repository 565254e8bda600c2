"""What a fine-tuning, an evaluation or a search is told, and the command line that says it."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from data import build_dataset, build_statements, build_triplets
from engine.checkpoints import load_checkpoint
from engine.config import LoopConfig, check_loop
from engine.flags import ConfigError, OneLineParser, add_flags, check_readers, flag_of, option
from model import ModelConfig
from readers.dataset import PhotoDataset
from readers.prompts import DESCRIPTION, DIFFERENCE
from readers.triplets import Triplets

TaskName = Literal["retrieval", "tgir", "category", "subcategory", "entailment", "search"]
RECOGNITION = ("category", "subcategory", "entailment")
FOUND = 10  # photos that search shows
PHOTOS, CAPTIONED = ("synthetic", "fashiongen", "jsonl"), ("flickr30k", "coco")
TASK_DATA = {  # of the others: PHOTOS
    "retrieval": (*PHOTOS, *CAPTIONED), "tgir": ("synthetic", "fashioniq"), "entailment": ("synthetic", "snlive"),
    "search": (*PHOTOS, *CAPTIONED, "fashioniq"),
}  # fmt: skip
CONTRAST = ("queue", "negatives", "itm_share", "margin", "focal_gamma", "itc_weight")  # retrieval goes on with these
TASK_FLAGS = {  # flags that not all tasks read
    "retrieval": (*CONTRAST, "ema_decay", "alpha", "itm_warmup", "rerank"),
    **dict.fromkeys(RECOGNITION, ("modality", "freeze")),
    "search": ("query", "image", "index", "rerank"),
}
UNTRAINED = (  # flags that are read where nothing is trained, too
    "task", "checkpoint", "data", "root", "split", "eval_only", "out", "seed", "batch_size", "products", "device",
    "precision", "workers", "rerank", "query", "image", "index",
)  # fmt: skip
TESTED = (*CAPTIONED, "fashioniq", "snlive")  # have a test split


@dataclass(frozen=True)
class FinetuneConfig(LoopConfig):
    """A fine-tuning, an evaluation or a search. Every field with a help text is a flag."""

    task: TaskName | None = option(None, "what to do")
    checkpoint: str = option("runs/synthetic-syncmask-tiny/last.pt", "what train.py, or an earlier fine-tuning, left")
    data: Literal["synthetic", "fashiongen", "jsonl", "fashioniq", "flickr30k", "coco", "snlive"] | None = option(
        None, "data set (default: that of the checkpoint)"
    )
    root: str | None = option(None, "folder of the data set (default: that of the checkpoint, or data/<data>)")
    split: Literal["val", "train", "test"] = option(
        "val",
        "split to report on, or to search in; test: of flickr30k, coco, snlive, and of fashioniq, whose targets are not"
        " published: it writes ranked ids",
    )
    eval_only: bool = option(False, "do not train: evaluate the checkpoint as it is")
    from_scratch: bool = option(False, "random weights instead of the checkpoint's, to compare with")
    held_out: float = option(
        0.1, "share of the training products, --val-products at most, held out to choose the best step by",
        low=0.001, high=0.9,
    )  # fmt: skip
    patience: int = option(0, "stop after so many validations without a better one; 0: never", low=0)
    rerank: int = option(0, "let the matching head re-rank so many of the best by similarity", low=0)
    modality: Literal["both", "image", "text"] = option(
        "both", "what recognition and entailment see: photo and text, or one of them alone"
    )
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


# Choices, but for base: learning rates, epochs and weight decay of retrieval and tgir are Fashion-FINE's.
SCHEDULES = {
    "tiny": dict(steps=200, lr=5e-4, final_lr=1e-5, warmup=20, ema_decay=0.99, alpha=0.0, crop_scale=0.8, val_every=50),
    "tiny tgir": dict(steps=300, lr=1e-3),
    "tiny category": dict(steps=600, lr=1e-3, patience=4),
    "tiny subcategory": dict(steps=600, lr=1e-3, patience=4),
    "tiny entailment": dict(steps=600, lr=3e-4),  # with 1e-3 it may stand still
    "small": dict(epochs=10, batch_size=128, lr=1e-4, final_lr=1e-6, workers=4),
    "base": dict(epochs=10, lr=3e-5, final_lr=1e-6, workers=8),
    "base retrieval": dict(epochs=30, lr=1e-5),
    "base tgir": dict(epochs=10, final_lr=1e-7, weight_decay=0.3),
}


def parse_config(argv: list[str] | None = None) -> tuple[FinetuneConfig, set[str], dict]:
    """Command line -> config, names of the flags given, the checkpoint to start from.

    Precedence: defaults < checkpoint < preset and task < flags.
    """
    parser = OneLineParser(
        "finetune.py", description="What a pretrained model is for: downstream tasks, and search.", allow_abbrev=False
    )
    add_flags(parser, FinetuneConfig, SCHEDULES)
    given = vars(parser.parse_args(argv))
    if not given.get("task"):
        raise ConfigError("say with --task what to do: retrieval, tgir, category, subcategory, entailment or search")
    if given.get("resume") and (given.get("eval_only") or given["task"] == "search"):
        raise ConfigError("--resume goes on with a training, which is not done here")
    path = given.get("checkpoint", FinetuneConfig.checkpoint)
    going_on = given.get("resume") and "out" in given  # all that the checkpoint says, the run to resume says too
    if going_on:
        path = f"{given['out']}/last.pt"
    elif not Path(path).exists():
        raise ConfigError(f"--checkpoint {path}: no such file; `python train.py` makes the default one")
    source = load_checkpoint(path)
    source = {part: source[part] for part in ("model", "tokenizer", "config", "step")}  # the rest is large
    try:
        config = layer_config(given, source["config"])
    except (TypeError, KeyError, ValueError) as error:
        raise ConfigError(f"{path}: was saved by another version of this code ({error})") from None
    if going_on and not config.start:
        raise ConfigError(f"{path}: is of a pretraining run, which train.py goes on with")
    if not config.resume:  # otherwise the run to resume has a say first
        check_start(config)
        check_flags(config, set(given))
    return config, set(given), source


def layer_config(given: dict, saved: dict) -> FinetuneConfig:
    """defaults < the checkpoint's config, `saved` < preset and task < `given`."""
    task, preset, data = given["task"], saved["preset"], given.get("data", saved["data"])
    own = {"data": data, "preset": preset, "prompts": saved["prompts"], "start": saved.get("task")}
    own |= {"data_seed": saved.get("data_seed", saved["seed"]), "classes": tuple(saved.get("classes", ()))}
    own |= {"root": saved["root"]} if data == saved["data"] else {}
    own |= {"modality": saved["modality"]} if "modality" in saved else {}
    trains = not (given.get("eval_only") or task == "search")
    inherited = ("products", *CONTRAST) if trains and task == "retrieval" else ("products",)
    own |= {name: saved[name] for name in inherited}
    model = replace(ModelConfig(**saved["model"]), alignment=False, detector=False)
    if task == "tgir":  # [CLS] alone, as in Fashion-FINE
        model = replace(model, local_tokens=False)
    schedule = SCHEDULES[preset] | SCHEDULES.get(f"{preset} {task}", {})
    if "steps" in given or "epochs" in given:  # the one replaces the other
        schedule.pop("steps", None), schedule.pop("epochs", None)
    config = FinetuneConfig(model=model, **own | schedule | given)
    ending = f"-{config.modality}" if task in RECOGNITION and config.modality != "both" else ""
    ending += "-frozen" if config.freeze else ""
    ending += "-scratch" if config.from_scratch else "-eval" if config.eval_only else ""
    return config if config.out else replace(config, out=f"runs/{data}-{task}{ending}-{preset}")


def check_start(config: FinetuneConfig) -> None:
    """Raise ConfigError when the checkpoint is not one that the task can start from."""
    kind, where = config.start, f"--checkpoint {config.checkpoint}"
    if config.task == "search":
        if kind in RECOGNITION:
            raise ConfigError(f"{where}: was fine-tuned for {kind}, not for finding; give a pretraining checkpoint")
        if kind == "tgir" and not config.image:
            raise ConfigError(f"{where}: was fine-tuned for tgir, it needs --image to search by (and --query)")
    elif kind not in (None, config.task):
        raise ConfigError(f"{where}: is one of --task {kind}; give a pretraining checkpoint")
    elif kind and not config.eval_only:
        raise ConfigError(f"{where}: is fine-tuned already; add --eval-only, or give a pretraining checkpoint")
    elif not kind and config.eval_only and config.task in RECOGNITION:
        raise ConfigError(f"{where}: has no classes yet; fine-tune it without --eval-only first")


def check_flags(config: FinetuneConfig, given: set[str]) -> None:
    """Raise ConfigError, in one line, for values out of range and for flags that contradict each other."""
    check_loop(config, given)
    fitting = TASK_DATA.get(config.task, PHOTOS)
    if config.data not in fitting:
        raise ConfigError(f"--task {config.task} needs --data {' or '.join(fitting)}, not {config.data}")
    check_readers("task", config.task, given, TASK_FLAGS)
    if config.task == "search" or config.eval_only:
        for name in sorted(given - {*UNTRAINED}):
            raise ConfigError(f"{flag_of(name)} is for training, which is not done here")
    if config.eval_only and "products" in given:
        raise ConfigError("--products is of the training split, which is not used here")
    if config.task == "search":
        check_search(config)
    if config.split == "train" and config.task != "search":
        raise ConfigError("--split train: figures on what was trained on mean nothing; it is for --task search")
    if config.split == "test" and config.data not in TESTED:
        raise ConfigError(f"--split test is for {', '.join(TESTED)}; the others have val")


def check_search(config: FinetuneConfig) -> None:
    """`check_flags` for what to search by."""
    if not (config.query or config.image):
        raise ConfigError("say with --query, --image or both what to search for")
    if config.query is not None and not re.search(r"\w", config.query):
        raise ConfigError(f"--query {config.query!r}: there is no word in it")
    if config.rerank and config.image:
        raise ConfigError("--rerank contradicts --image: the matching head compares photos with words alone")
    if 0 < config.rerank < FOUND:
        raise ConfigError(f"--rerank {config.rerank}: {FOUND} photos are shown, give at least as many")


def open_photos(config: FinetuneConfig, split: str) -> PhotoDataset:
    """A data set of photos; what is in which split follows the pretraining run's seed."""
    photos = open_triplets(config, split).photos if config.data == "fashioniq" else build_dataset(*where(config, split))
    photos.lead = lead_of(config)
    return photos


def open_triplets(config: FinetuneConfig, split: str) -> Triplets:
    """A set of triplets, by the same rule."""
    triplets = build_triplets(*where(config, split))
    triplets.lead = lead_of(config)
    return triplets


def open_statements(config: FinetuneConfig, split: str) -> PhotoDataset:
    """A set of statements, by the same rule."""
    statements = build_statements(*where(config, split))
    statements.lead = lead_of(config)
    return statements


def where(config: FinetuneConfig, split: str) -> tuple:
    """Arguments of `build_dataset`, `build_triplets` and `build_statements`."""
    return config.data, config.root, split, config.model.image_size, config.data_seed, config.products


def lead_of(config: FinetuneConfig) -> str:
    """What stands before each text, where pretraining has framed its texts."""
    return (DIFFERENCE if "tgir" in (config.task, config.start) else DESCRIPTION) if config.prompts else ""
