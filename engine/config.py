"""The configuration of a pretraining run: fields, presets, recipes, schedules, and the command line."""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import torch

from data import DataName
from engine.flags import (
    ConfigError,
    OneLineParser,
    add_flags,
    check_device,
    check_flag_applies,
    check_ranges,
    option,
)
from engine.sizes import sizes_from_folders
from losses import NegativeMode
from model import PRESETS, ModelConfig
from sampler import SEARCH_SIZE, SamplerMode

MaskMode = Literal["random", "sync", "oracle"]
MaskSource = Literal["masked", "clean"]
Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class LoopConfig:
    """The settings of the training loop, shared by pretraining and fine-tuning. Every field but `model` is a flag."""

    out: str | None = option(None, "output folder (default runs/<data>-<recipe or task>-<preset>)")
    resume: bool = option(False, "continue the run in the output folder from its last.pt")
    seed: int = option(0, "seed of all random numbers", low=0, high=2**63 - 1)

    steps: int | None = option(None, "number of optimiser steps, instead of --epochs", low=1)
    epochs: int | None = option(None, "number of passes over the training images, instead of --steps", low=1)
    batch_size: int = option(64, "images per batch, over all processes together", low=2)
    lr: float = option(1e-4, "peak learning rate", low=0)
    min_lr: float = option(1e-5, "learning rate at the last step, the end of the cosine", low=0)
    warmup: int = option(500, "steps of linear learning-rate warm-up", low=0)
    weight_decay: float = option(0.02, "weight decay of AdamW; biases, norms and embeddings have none", low=0)
    ema_decay: float = option(0.995, "decay of the momentum model per step", low=0, high=1)
    alpha: float = option(
        0.4, "weight of the momentum model's soft targets; grows from 0 over the first epoch", low=0, high=1
    )
    queue_size: int = option(0, "momentum features of earlier batches, used as more ITC negatives; 0: no queue", low=0)
    negatives: NegativeMode = option(
        "similar",
        "choice of ITM negatives; similar: drawn by similarity; hard, semihard: also batches of similar images",
    )
    itm_hard_ratio: float = option(
        1.0, "share of ITM negatives chosen by --negatives; the others are random", low=0, high=1
    )
    itm_hard_warmup: int = option(
        0, "steps with random ITM negatives only; the share then grows for as many steps", low=0
    )
    margin: float = option(
        0.0, "semihard: a negative's cosine is lower than the positive pair's by more than this", low=0, high=2
    )
    crop_scale: float = option(0.5, "smallest area of a random crop, as a share of the image", low=0.01, high=1)
    distort: float = option(0.0, "strength of random rotation, shear, blur and noise", low=0, high=1)
    focal_gamma: float = option(0.0, "exponent of focal ITC: higher gives easy pairs less weight; 0: plain ITC", low=0)
    itc_weight: float = option(1.0, "weight of ITC in the loss", low=0)

    num_products: int = option(4000, "number of synthetic training products", low=2)
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "device: cpu, cuda, cuda:1, …")
    precision: Precision = option(
        "auto", "number format of the forward pass; auto: bf16 where the hardware computes in bf16, else fp32"
    )
    compile: bool = option(False, "compile the layers with torch.compile")
    workers: int = option(0, "data loading processes per training process; 0: no extra processes", low=0, high=1024)
    log_every: int = option(10, "steps between training lines in metrics.jsonl", low=1)
    val_every: int = option(200, "steps between validations; each also saves a checkpoint", low=1)
    val_products: int = option(1000, "largest number of held-out products in a validation", low=2)
    model: ModelConfig = field(default_factory=ModelConfig)


@dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """The settings of a pretraining run. Every field with a help text is a flag, here and in `ModelConfig`."""

    data: DataName = option("synthetic", "data set")
    root: str | None = option(None, "folder of the data set (default data/<data>)")
    recipe: str = option("syncmask", "method: syncmask, softmask, fashionfine or albef")
    preset: Literal["tiny", "small", "base"] = option(
        "tiny", "model sizes and schedule; if not given: synthetic tiny, jsonl small, fashiongen base"
    )
    prompts: bool = option(False, "add the category symbol and attribute prompts to the training captions")
    mlm_ratio: float = option(0.15, "share of the words that MLM masks", low=0, high=1)
    mim_ratio: float = option(0.5, "share of the patches that MIM masks", low=0, high=1)
    mim_weight: float = option(1.0, "weight of MIM in the loss", low=0)
    patch_mask: MaskMode = option("sync", "how MIM chooses patches: random, synchronized, from the ground truth")
    word_mask: MaskMode = option("sync", "how MLM chooses words: random, synchronized, from the ground truth")
    mask_source: MaskSource = option(
        "masked",
        "how sync masks score words; masked: while they are masked; clean: by the attention of the unmasked pair",
    )
    score_ratio: float = option(
        0.5,
        "share of the words, random ones, that are masked to score them; at least --mlm-ratio",
        low=0,
        high=1,
    )
    random_mask_prob: float = option(0.0, "share of the pairs that keep random masks", low=0, high=1)
    mask_warmup: int = option(0, "steps with random masks, before the attention is useful", low=0)
    soft_mask: bool = option(True, "add a positive ITM pair whose image has the patches of one word suppressed")
    mask_text: bool = option(True, "use masked captions for ITC and ITM, too, not for MLM alone")

    vocab: str | None = option(
        None,
        "BERT's vocab.txt or tokenizer.json, a folder with one, or a checkpoint (default: train one on the captions)",
    )
    weights: tuple[str, ...] = option(
        (), "weights to start from: a ViT; a BERT or ALBEF, which need --vocab; or last.pt or best.pt of a run"
    )
    sizes_from: tuple[str, ...] = option(
        (), "folders with the config.json of a ViT or BERT, which sets the model's sizes"
    )


SCHEDULES = {
    # Our choices for so few steps: no soft targets, which slow MLM down; no ITM negatives drawn by similarity, many of
    # which are false and undo what random ones have taught; a momentum model that follows closely; more weight for ITC.
    # itm_hard_ratio and itm_hard_warmup act where a recipe or a flag chooses other negatives than random ones.
    "tiny": dict(
        steps=1360,
        lr=1e-3,
        min_lr=1e-5,
        warmup=50,
        ema_decay=0.95,
        alpha=0.0,
        mlm_ratio=0.5,
        negatives="random",
        itm_hard_ratio=0.5,
        itm_hard_warmup=100,
        mask_warmup=100,
        mim_weight=0.5,
        itc_weight=2.0,
        crop_scale=0.8,
        val_every=680,
    ),
    "small": dict(
        epochs=20,
        batch_size=128,
        lr=3e-4,
        queue_size=16384,
        mlm_ratio=0.3,
        itm_hard_warmup=1000,
        mask_warmup=1000,
        workers=4,
    ),
    # a validation saves a checkpoint, here of 3.5 GB
    "base": dict(epochs=30, queue_size=65536, workers=8, itm_hard_warmup=1000, mask_warmup=2000, val_every=2000),
}
# Defaults of a recipe, which replace those of its preset; "recipe preset" holds for one preset alone. All values of
# syncmask are our choices; its mask settings were tuned on the ground truth of synthetic images. Grouped batches
# replace the queue, as in GRIT-VLP.
RECIPE_DEFAULTS = {
    "syncmask": dict(
        mlm_ratio=0.3,
        random_mask_prob=0.2,
        negatives="semihard",
        margin=0.2,
        queue_size=0,
    ),
    "syncmask tiny": dict(mlm_ratio=0.5, score_ratio=0.7),
    "softmask": dict(focal_gamma=2.0, distort=0.5),
    "softmask tiny": dict(mlm_ratio=0.3),  # the preset's 0.5 would leave ITC too few words to read
    "fashionfine": dict(
        prompts=True, local_tokens=True, alignment=True, detector=True, focal_gamma=2.0, itc_weight=0.25, max_length=180
    ),
    "fashionfine tiny": dict(mlm_ratio=0.3, max_length=96),
    "fashionfine base": dict(epochs=10, lr=6e-5),
    "albef": {},
}
# Fields that only one recipe uses in training.
RECIPE_FLAGS = {
    "syncmask": (
        "mim_weight",
        "patch_mask",
        "word_mask",
        "mask_source",
        "score_ratio",
        "random_mask_prob",
        "mask_warmup",
    ),
    "softmask": ("soft_mask", "mask_text"),
    "fashionfine": ("local_tokens", "alignment", "detector"),
}
DEFAULT_PRESET = {"synthetic": "tiny", "jsonl": "small", "fashiongen": "base"}
# Fields that a resumed run may change. Two of them change its result: a GPU draws other random numbers, and a run that
# diverged can continue from an earlier checkpoint with a lower --lr.
FREE_ON_RESUME = {"out", "root", "resume", "device", "workers", "log_every", "lr"}
MAX_GRAD_NORM = 1.0


def parse_config(argv: list[str] | None = None) -> tuple[TrainConfig, set[str]]:
    """Parse the command line of train.py. Precedence: defaults < preset < recipe < --sizes-from < flags.

    -> the config, and the names of the fields whose flags were given
    Raises ConfigError for flags that contradict each other; a flag that cannot be parsed ends the process.
    """
    parser = OneLineParser(
        "train.py",
        description="Pretraining: one recipe per method, one flat loop.",
        allow_abbrev=False,
    )
    overrides = SCHEDULES | RECIPE_DEFAULTS
    add_flags(parser, TrainConfig, overrides)
    add_flags(parser.add_argument_group("sizes of the model (defaults: tiny's)"), ModelConfig, overrides)
    given = vars(parser.parse_args(argv))
    config = layer_config(given)
    if not config.resume:  # a resumed run is checked once its config is read from the checkpoint
        check_flags(config, set(given))
    return config, set(given)


def layer_config(given: dict) -> TrainConfig:
    """Build the config of a run and its model: defaults < preset < recipe < --sizes-from < flags.

    given: field -> value, of the flags that were given
    Raises ConfigError for an unknown recipe, for model sizes that do not fit together, and as `sizes_from_folders`.
    """
    data = given.get("data", "synthetic")
    preset = given.get("preset", DEFAULT_PRESET[data])
    recipe = given.get("recipe", TrainConfig.recipe)
    recipes = [name for name in RECIPE_DEFAULTS if " " not in name]
    if recipe not in recipes:
        raise ConfigError(f"--recipe {recipe}: no such recipe; choose {', '.join(recipes)}")

    values = {"preset": preset, "out": f"runs/{data}-{recipe}-{preset}"}
    values.update(SCHEDULES[preset])
    values.update(RECIPE_DEFAULTS[recipe])
    values.update(RECIPE_DEFAULTS.get(f"{recipe} {preset}", {}))
    if "steps" in given or "epochs" in given:  # the given one replaces the preset's
        values.update(steps=None, epochs=None)
    values.update(sizes_from_folders(given.get("sizes_from", ()), PRESETS[preset]))
    values.update(given)

    size_names = {spec.name for spec in fields(ModelConfig)}
    sizes, settings = {}, {}
    for name, value in values.items():
        if name in size_names:
            sizes[name] = value
        else:
            settings[name] = tuple(value) if isinstance(value, list) else value
    try:
        model = replace(PRESETS[preset], **sizes)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return TrainConfig(model=model, **settings)


def check_loop(config: LoopConfig, given: set[str]) -> None:
    """Check what pretraining and fine-tuning have in common.

    given: names of the fields whose flags were given
    Raises ConfigError for values out of range and for flags that contradict each other.
    """
    if config.steps and config.epochs:
        raise ConfigError("--steps and --epochs contradict each other; give one of them")
    if grouping_of(config) != "random" and config.batch_size >= SEARCH_SIZE:
        raise ConfigError(
            f"--batch-size {config.batch_size}: must be below {SEARCH_SIZE} with --negatives {config.negatives}"
        )
    if config.data == "synthetic" and config.root:
        raise ConfigError("--root is for data sets in files; drop it, since --data synthetic draws its images")
    if config.data != "synthetic" and "num_products" in given:
        raise ConfigError(f"--num-products is for --data synthetic, not for {config.data}; drop it")
    check_ranges(config)
    check_device(config.device)


def check_flags(config: TrainConfig, given: set[str]) -> None:
    """Check the config of a pretraining run.

    given: names of the fields whose flags were given
    Raises ConfigError for values out of range and for flags that contradict each other.
    """
    check_loop(config, given)
    if config.vocab and "vocab_size" in given:
        raise ConfigError("--vocab-size contradicts --vocab, whose file sets the size; drop --vocab-size")
    check_flag_applies("recipe", config.recipe, given, RECIPE_FLAGS)
    if config.recipe == "softmask" and config.soft_mask and config.model.fusion_layers == 1:
        raise ConfigError("--soft-mask needs two or more --fusion-layers; add layers, or --no-soft-mask")
    if "oracle" in (config.patch_mask, config.word_mask) and config.data != "synthetic":
        raise ConfigError(
            f"--patch-mask oracle, --word-mask oracle: --data {config.data} has no ground truth; use random or sync"
        )
    if config.prompts and config.model.max_length < 16:
        raise ConfigError(
            f"--max-length {config.model.max_length}: must be at least 16 with --prompts, to leave room for the caption"
        )
    if config.model.alignment and not config.prompts:
        raise ConfigError("--alignment needs the category symbol of --prompts; add --prompts or --no-alignment")


def learning_rate(step: int, config: LoopConfig, total_steps: int) -> float:
    """Compute the learning rate of a step: linear warm-up to `lr`, then half a cosine down to `min_lr`."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, total_steps - 1 - config.warmup)
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return config.min_lr + (config.lr - config.min_lr) * cosine


def grouping_of(config: LoopConfig) -> SamplerMode:
    """Return how the sampler composes batches: by --negatives where they are hard or semi-hard, else at random."""
    return config.negatives if config.negatives in ("hard", "semihard") else "random"


def ema_decay(step: int, decay: float) -> float:
    """Compute the momentum model's decay in a step t: min(decay, (1 + t) / (10 + t)), so it follows closely at first.

    Our choice, after TensorFlow's ExponentialMovingAverage.
    """
    return min(decay, (1 + step) / (10 + step))


def itm_hard_share(step: int, config: LoopConfig) -> float:
    """Compute the share of ITM negatives in a step that --negatives chooses; the others are random.

    The share is 0 until step itm_hard_warmup. It reaches itm_hard_ratio at twice that step.
    Our choice, a curriculum: with hard negatives from the start ITM stays at chance, and with hard negatives alone it
    forgets the easy ones.
    """
    if not config.itm_hard_warmup:
        return config.itm_hard_ratio
    return config.itm_hard_ratio * min(1.0, max(0.0, step / config.itm_hard_warmup - 1))


def scored_share(config: TrainConfig) -> float:
    """Return the share of the words that are masked to score them: --score-ratio, and at least --mlm-ratio."""
    return max(config.score_ratio, config.mlm_ratio)
