"""What a pretrained model is for: three downstream tasks with their evaluation protocols, and search.

    python finetune.py --task retrieval                        photo ↔ text: ITC + ITM, full and sampled protocol
    python finetune.py --task tgir                             reference photo + "is red and has long sleeves" → photo
    python finetune.py --task category | subcategory           recognition from photo and text, or --modality image
    python finetune.py --task search --query "long sleeve dress in red" [--image photo.jpg]

All start from --checkpoint (default: the one that `python train.py` leaves); data, sizes and vocabulary are its own.
`--eval-only` evaluates a checkpoint as it is; `--from-scratch` takes only its sizes and vocabulary, to compare with.

What a task leaves in --out: config.json, metrics.jsonl, curves.png, last.pt as train.py; best.pt, the step that did
best on products held out from the training split; results.json, that step on the split that is reported; and a
picture: examples.png, or confusion.png with classes.tsv. Keys of metrics.jsonl beyond train.py's:

    accuracy                    of that step's batch: recognition; or targets told from the batch's others (tgir)
    val_mean                    held out: mean of the six recalls (retrieval), of R@10 and R@50 (tgir); best.pt is by it
    val_r1, val_r10, val_r50    held out, tgir
    val_accuracy, val_macro_f1  held out, recognition; best.pt is by accuracy
"""

import hashlib
import json
import math
import re
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (
    DESCRIPTION,
    DIFFERENCE,
    Collate,
    DataError,
    PhotoDataset,
    Text,
    Triplets,
    build_dataset,
    build_triplets,
    encode,
    normalise,
    open_photo,
    square,
    to_device,
    tokenize,
)
from losses import cross_entropy, forbidden_negatives, itc_loss, itc_targets, itm_loss
from model import ModelConfig
from train import (
    INK,
    PAPER,
    ConfigError,
    Job,
    LoopConfig,
    NonFiniteLoss,
    OneLineParser,
    Run,
    accuracy,
    add_flags,
    autocast,
    begin,
    build_run,
    check_device,
    check_ranges,
    contrast,
    letters,
    load_checkpoint,
    match_rank,
    option,
    text_features,
    work,
)

TaskName = Literal["retrieval", "tgir", "category", "subcategory", "search"]
Metrics = dict[str, float]


# ------------------------------------------------------------------------------- config and command line


@dataclass(frozen=True)
class FinetuneConfig(LoopConfig):
    """A fine-tuning, an evaluation or a search. Every field with a help text is a flag."""

    task: TaskName | None = option(None, "what to do")
    checkpoint: str = option("runs/synthetic-syncmask-tiny/last.pt", "what train.py, or an earlier fine-tuning, left")
    data: Literal["synthetic", "fashiongen", "jsonl", "fashioniq"] | None = option(
        None, "data set (default: that of the checkpoint)"
    )
    root: str | None = option(None, "folder of the data set (default: that of the checkpoint, or data/<data>)")
    split: Literal["val", "train", "test"] = option(
        "val", "split to report on, or to search in; test: of FashionIQ, writes ranked ids instead of figures"
    )
    eval_only: bool = option(False, "do not train: evaluate the checkpoint as it is")
    from_scratch: bool = option(False, "random weights instead of the checkpoint's, to compare with")
    held_out: float = option(
        0.1,
        "share of the training products, --val-products at most, held out to choose the best step by",
        low=0.001,
        high=0.9,
    )
    patience: int = option(0, "stop after so many validations without a better one; 0: never", low=0)
    rerank: int = option(0, "let the matching head re-rank so many of the best by similarity", low=0)
    modality: Literal["both", "image"] = option("both", "what recognition sees: photo and text, or the photo alone")
    query: str | None = option(None, "words to search by")
    image: str | None = option(None, "photo to search by, alone or with words that change it")
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
    "small": dict(epochs=10, batch_size=128, lr=1e-4, final_lr=1e-6, workers=4),
    "base": dict(epochs=10, lr=3e-5, final_lr=1e-6, workers=8),
    "base retrieval": dict(epochs=30, lr=1e-5),
    "base tgir": dict(epochs=10, final_lr=1e-7, weight_decay=0.3),
}
# how pretraining contrasted, grouped batches and chose negatives; retrieval goes on with it
INHERITED = ("focal_gamma", "itc_weight", "sampler", "itm_negatives", "itm_share", "search_size", "margin", "queue",
             "products")  # fmt: skip
RECOGNITION = ("category", "subcategory")
TASK_FLAGS = {
    "retrieval": {"rerank", "sampler", "itm_negatives", "itm_share", "itm_warmup", "search_size", "margin", "queue",
                  "alpha", "ema_decay", "focal_gamma", "itc_weight"},
    "category": {"modality"},
    "subcategory": {"modality"},
    "search": {"query", "image", "rerank"},
}  # fmt: skip
FOUND = 10  # photos that search shows
USE_FLAGS = {"task", "checkpoint", "data", "root", "split", "out", "products", "device", "precision", "workers",
             "batch_size", "seed", "eval_only", "rerank"}  # fmt: skip
PHOTOS = ("synthetic", "fashiongen", "jsonl")
TASK_DATA = {"tgir": ("synthetic", "fashioniq"), "search": (*PHOTOS, "fashioniq")}


def parse_config(argv: list[str] | None = None) -> tuple[FinetuneConfig, set[str], dict]:
    """Command line -> config, names of the flags given, the checkpoint to start from.

    Precedence: defaults < checkpoint < preset and task < flags.
    """
    parser = OneLineParser("finetune.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    add_flags(parser, FinetuneConfig, SCHEDULES)
    given = vars(parser.parse_args(argv))
    if not given.get("task"):
        raise ConfigError("say with --task what to do: retrieval, tgir, category, subcategory or search")
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
        check_flags(config, given)
    return config, set(given), source


def layer_config(given: dict, saved: dict) -> FinetuneConfig:
    """defaults < the checkpoint's config, `saved` < preset and task < `given`."""
    task, preset, data = given["task"], saved["preset"], given.get("data", saved["data"])
    own = {"data": data, "preset": preset, "data_seed": saved.get("data_seed", saved["seed"])}
    own |= {"root": saved["root"]} if data == saved["data"] else {}
    model = replace(ModelConfig(**saved["model"]), alignment=False, detector=False)
    if task == "tgir":  # [CLS] alone, as in Fashion-FINE
        model = replace(model, local_image=0.0, local_text=0.0)
    own |= {"model": model, "classes": tuple(saved.get("classes", ()))}
    own |= {"prompts": saved.get("prompts", False)}  # checkpoints have not always had prompts and a weight of ITC
    own |= {name: saved[name] for name in (INHERITED if task == "retrieval" else ("products",)) if name in saved}
    own |= {"modality": saved["modality"]} if "modality" in saved else {}
    schedule = SCHEDULES[preset] | SCHEDULES.get(f"{preset} {task}", {})
    if "steps" in given or "epochs" in given:  # the one replaces the other
        schedule = {name: value for name, value in schedule.items() if name not in ("steps", "epochs")}
    config = FinetuneConfig(**own | schedule | given, start=saved.get("task"))
    ending = "-image" if task in RECOGNITION and config.modality == "image" else ""
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


def check_flags(config: FinetuneConfig, given: dict) -> None:
    """Raise ConfigError, in one line, for values out of range and for flags that contradict each other."""
    check_ranges(config)
    fitting = TASK_DATA.get(config.task, PHOTOS)
    if config.data not in fitting:
        raise ConfigError(f"--task {config.task} needs --data {' or '.join(fitting)}, not {config.data}")
    if config.data == "synthetic" and config.root:
        raise ConfigError("--root is for data from files; synthetic photos are drawn")
    if config.data != "synthetic" and "products" in given:
        raise ConfigError(f"--products is for synthetic photos, not for {config.data}")
    for flag in sorted(set(given) & set().union(*TASK_FLAGS.values()) - TASK_FLAGS.get(config.task, set())):
        tasks = " or ".join(task for task, flags in TASK_FLAGS.items() if flag in flags)
        raise ConfigError(f"--{flag.replace('_', '-')} is for --task {tasks}, not for {config.task}")
    if config.task == "search" or config.eval_only:
        for flag in sorted(set(given) - USE_FLAGS - {"query", "image"}):
            raise ConfigError(f"--{flag.replace('_', '-')} is for training, which is not done here")
    if config.eval_only and "products" in given:
        raise ConfigError("--products is of the training split, which is not used here")
    if config.task == "search":
        check_search(config)
    if config.split == "train" and config.task != "search":
        raise ConfigError("--split train: figures on what was trained on mean nothing; it is for --task search")
    if config.split == "test" and config.data != "fashioniq":
        raise ConfigError("--split test is for FashionIQ; the others have val")
    check_device(config.device)


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
    where = (config.data, config.root, split, config.model.image_size, config.data_seed, config.products)
    photos = build_triplets(*where).photos if config.data == "fashioniq" else build_dataset(*where)
    photos.lead = lead_of(config)
    return photos


def lead_of(config: FinetuneConfig) -> str:
    """What stands before each text, where pretraining has framed its texts."""
    return (DIFFERENCE if "tgir" in (config.task, config.start) else DESCRIPTION) if config.prompts else ""


def hold_out(
    groups: np.ndarray, share: float, most: int, seed: int, labels: list[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on, rows to choose the best step by: whole groups (N,), `share` of them but no more than `most`.

    No label (N,) leaves training altogether: its last group is kept. Raises DataError if nothing can be held out.
    """
    names = np.random.default_rng((5, seed)).permutation(np.unique(groups))
    wanted, chosen = min(most, max(2, round(share * len(names))), len(names) - 1), []
    kinds = numbers_of(labels or [""] * len(groups))
    left = np.bincount(kinds)
    for name in names:
        kind = kinds[groups == name] if labels else kinds[:0]
        if len(chosen) < wanted and (left - np.bincount(kind, minlength=len(left)) > 0)[kind].all():
            left -= np.bincount(kind, minlength=len(left))
            chosen.append(name)
        elif len(chosen) == wanted:
            break
    held = np.isin(groups, chosen)
    if held.all() or not held.any():
        raise DataError("too few products to hold any out of training; give more")
    return np.flatnonzero(~held), np.flatnonzero(held)


def numbers_of(labels: list[str]) -> np.ndarray:
    """Labels as numbers in alphabetical order. -> int64 (N,)."""
    return np.unique(labels, return_inverse=True)[1]


# ---------------------------------------------------------------------------------- encoding, many at once


def batches_of(run: Run, dataset: PhotoDataset, what: str) -> Iterator[dict]:
    """All of a data set in order, on the device, photos normalised and neither cropped nor flipped."""
    loader = DataLoader(
        dataset, run.config.batch_size, collate_fn=Collate(run.tokenizer), num_workers=run.config.workers
    )
    for batch in tqdm(loader, what, unit=" batches", leave=False, disable=None):
        for reason in set(batch["unreadable"]) - run.unreadable:
            tqdm.write(f"left out: {reason}")
        run.unreadable |= set(batch["unreadable"])
        if len(batch["rows"]):
            batch = to_device(batch, run.device)
            yield batch | {"images": normalise(batch["images"])}


@torch.no_grad()
def photo_features(run: Run, dataset: PhotoDataset) -> tuple[np.ndarray, Tensor]:
    """Rows that could be decoded (n,), and unit-length features of their photos (n, E)."""
    rows, feats = [np.arange(0)], []
    for batch in batches_of(run, dataset, "encoding photos"):
        with autocast(run):
            feats.append(run.model.image_feature(run.model.encode_image(batch["images"])))
        rows.append(batch["rows"].cpu().numpy())
    if not feats:
        raise DataError("no photo could be read")
    return np.concatenate(rows), torch.cat(feats)


@torch.no_grad()
def match_scores(run: Run, photos: PhotoDataset, texts: list[Text], pairs: Tensor) -> Tensor:
    """The ITM head's logit for "match" over "no match", of pairs (n, 2) of a row of `photos` and a text. -> (n,).

    Each photo and each text is encoded once.
    """
    encoded = to_device(tokenize(run.tokenizer, texts), run.device)
    ids, keep = encoded["token_ids"], encoded["attention_mask"]
    with autocast(run):
        text_embeds = torch.cat(
            [run.model.encode_text(i, k) for i, k in zip(ids.split(256), keep.split(256), strict=True)]
        )
    rows, place = pairs[:, 0].unique(return_inverse=True)
    order, scores = place.argsort(), torch.empty(len(pairs), device=run.device)
    place, done = place[order].to(run.device), 0
    asked, seen = pairs[order, 1].to(run.device), 0
    for batch in batches_of(run, photos.part(rows.numpy()), "matching"):
        with autocast(run):
            image_embeds = run.model.encode_image(batch["images"])
            until = int(torch.searchsorted(place, seen + len(image_embeds)))
            for at in torch.arange(done, until, device=run.device).split(4 * run.config.batch_size):
                if not len(at):
                    continue
                t, which = asked[at], place[at] - seen
                first, last = which[0], which[-1]  # photos are in order: of most batches a few are asked for
                shown = image_embeds[first : last + 1]
                paired, _ = run.model.fuse(text_embeds[t], keep[t], shown, photos=which - first, only_cls=len(t))
                logits = run.model.itm_logits(paired)
                scores[at] = (logits[:, 1] - logits[:, 0]).float()
        seen, done = seen + len(image_embeds), until
    if done < len(pairs):
        raise DataError("a photo that could be read before could not be read again")
    result = torch.empty_like(scores)
    result[order.to(run.device)] = scores
    return result


def matching(
    model, text_embeds: Tensor, keep: Tensor, image_embeds: Tensor, wrong_text: Tensor, wrong_image: Tensor
) -> tuple[Tensor, Tensor]:
    """ITM logits (3B, 2) and labels (3B,) of the pairs, of each photo with a wrong text, of each text with a wrong
    photo; −1 as a wrong one: there is none, ignored."""
    own = torch.arange(len(text_embeds), device=text_embeds.device)
    t, i = torch.cat([own, wrong_text.clamp(min=0), own]), torch.cat([own, own, wrong_image.clamp(min=0)])
    labels = torch.cat([torch.ones_like(own), torch.where(torch.cat([wrong_text, wrong_image]) < 0, -100, 0)])
    paired, _ = model.fuse(text_embeds[t], keep[t], image_embeds, photos=i, only_cls=len(t))
    return model.itm_logits(paired), labels


# ------------------------------------------------------------------------------------------ task: retrieval


class Task:
    """What the tasks share: where their photos come from, and which of them are held out."""

    def __init__(self, config: FinetuneConfig):
        self.config = config

    def open(self, split: str) -> PhotoDataset:
        """The photos of a split, with their descriptions."""
        return open_photos(self.config, split)

    def divide(self, dataset: PhotoDataset) -> tuple[PhotoDataset, PhotoDataset]:
        """To train on, to choose the best step by: no product is in both."""
        return self.parts(dataset, dataset.product_ids)

    def parts(self, dataset: PhotoDataset, groups: np.ndarray, labels: list[str] | None = None) -> tuple:
        """`hold_out` of a data set by the config."""
        config = self.config
        rows = hold_out(groups, config.held_out, config.val_products, config.data_seed, labels)
        return tuple(dataset.part(chosen) for chosen in rows)


class Retrieval(Task):
    """Cross-modal retrieval: ITC + ITM; full and sampled protocol."""

    select = "val_mean"
    panels = {
        "loss": ["itc", "itm"],
        "held-out recall": [f"val_{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)],
    }
    queries, negatives, draws = 1000, 100, 5  # of the sampled protocol

    def losses(self, run: Run, batch: dict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """ITC with momentum keys, and ITM, as in pretraining but without masks."""
        ids, keep = batch["token_ids"], batch["attention_mask"]
        image_embeds, text_embeds = run.model.encode_image(batch["images"]), run.model.encode_text(ids, keep)
        with torch.no_grad():
            image_feat_m = run.momentum.project_image(run.momentum.encode_image(batch["images"]))
            text_feat_m = run.momentum.project_text(run.momentum.encode_text(ids, keep))
        image_feat, text_feat = run.model.image_feature(image_embeds), run.model.text_feature(text_embeds, keep)
        itc, sim_i2t, sim_t2i = contrast(run, batch, image_feat, text_feat, image_feat_m, text_feat_m)
        forbidden = forbidden_negatives(batch["product_ids"], batch["caption_ids"])
        wrong_text, wrong_image = run.negatives(sim_i2t, forbidden), run.negatives(sim_t2i, forbidden)
        logits, labels = matching(run.model, text_embeds, keep, image_embeds, wrong_text, wrong_image)
        return {"itc": itc, "itm": itm_loss(logits, labels)}, {"itm_accuracy": accuracy(logits, labels)}

    def validate(self, run: Run, dataset: PhotoDataset) -> Metrics:
        """Full protocol on the held-out products."""
        _, image_feat, text_feat, owner, _ = self.encode(run, dataset)
        rankings = [*full_rankings(image_feat, text_feat, owner, 0)]
        recalls = recalls_of(rankings, [ranking.rank for ranking in rankings])
        return {key.replace("full", "val"): value for key, value in recalls.items()}

    def encode(self, run: Run, dataset: PhotoDataset) -> tuple[np.ndarray, Tensor, Tensor, Tensor, list[Text]]:
        """Rows (n,), image_feat (n, E), text_feat (m, E) of one text a product, the text of each photo (n,), texts; on
        the CPU."""
        rows, image_feat = photo_features(run, dataset)
        _, first, owner = np.unique(dataset.product_ids[rows], return_index=True, return_inverse=True)
        texts = [dataset.text(rows[i]) for i in first]
        return rows, image_feat.cpu(), text_features(run, texts).cpu(), torch.from_numpy(owner), texts

    def report(self, run: Run, dataset: PhotoDataset) -> dict:
        """Both protocols, by similarity and with `--rerank` also by the matching head."""
        rows, image_feat, text_feat, owner, texts = self.encode(run, dataset)
        if len(texts) < 2:
            raise DataError("one product is no gallery to search in; give more")
        top, kinds = self.config.rerank, numbers_of([dataset.subcategories[row] for row in rows])
        rankings, alike = [*full_rankings(image_feat, text_feat, owner, top)], {"i2t": [], "t2i": []}
        kind_of = {"i2t": kinds[np.unique(owner, return_index=True)[1]], "t2i": kinds}
        for draw in tqdm(range(self.draws), "drawing candidates", unit=" draws", leave=False, disable=None):
            rng = np.random.default_rng((6, self.config.seed, draw))
            for way, lists in sampled_candidates(owner.numpy(), kinds, self.queries, self.negatives, rng).items():
                rankings.append(Ranking.sampled(way, lists, image_feat, text_feat, owner, top))
                alike[way].append((kind_of[way][lists[:, 2:]] == kinds[lists[:, :1]]).mean())
        metrics = recalls_of(rankings, [ranking.rank for ranking in rankings])
        if top:
            pairs, place = torch.cat([r.pairs.flatten(0, 1) for r in rankings]).unique(dim=0, return_inverse=True)
            scores = match_scores(run, dataset.part(rows), texts, pairs).cpu()[place]
            parts = scores.split([r.right.numel() for r in rankings])
            ranks = [r.reranked(part.view(r.right.shape)) for r, part in zip(rankings, parts, strict=True)]
            metrics |= {f"rerank_{key}": value for key, value in recalls_of(rankings, ranks).items()}
        share = " and ".join(f"{100 * np.mean(shares):.0f} % ({way})" for way, shares in alike.items())
        share = f"{share} of the same sub-category" if any(dataset.subcategories) else "no sub-categories known"
        protocol = (
            f"full: {len(rows):,} photos, {len(texts):,} texts; sampled: {min(self.queries, len(rows)):,} queries,"
        )
        protocol += f" up to {self.negatives} negatives ({share}), {self.draws} draws; by similarity"
        protocol += f", the best {top} re-ranked by matching" if top else ""
        chance = {key: value for r in rankings[:4] for key, value in r.chance().items()}
        examples = []
        for text in np.linspace(0, len(texts) - 1, 6).astype(int):
            best = (image_feat @ text_feat[text]).topk(min(5, len(rows)))
            answers = [(int(rows[i]), f"{s:.2f}", bool(owner[i] == text)) for s, i in zip(*best, strict=True)]
            examples.append((texts[text][1], None, answers))
        draw_answers(dataset, examples, Path(self.config.out) / "examples.png")
        return {"protocol": protocol, "metrics": metrics, "chance": chance}


@dataclass
class Ranking:
    """Queries with how they were ranked by similarity. Letters: Q queries, C candidates, K best ones kept."""

    protocol: str  # full_i2t, sampled_t2i, …
    rank: Tensor  # (Q,): wrong candidates before the best right one
    pairs: Tensor  # (Q, K, 2): photo and text of the best K by similarity, to be re-ranked
    right: Tensor  # (Q, K)
    sizes: Tensor  # (Q, 2): candidates, and right ones among them

    @staticmethod
    def of(protocol: str, sim: Tensor, right: Tensor, photos: Tensor, texts: Tensor, top: int) -> "Ranking":
        """sim, right (Q, C); photos, texts (Q, C) or broadcast to it."""
        best = sim.topk(min(top, sim.shape[1]), dim=1).indices
        pairs = torch.stack([photos.expand_as(sim).gather(1, best), texts.expand_as(sim).gather(1, best)], dim=2)
        sizes = torch.stack([torch.full((len(sim),), sim.shape[1]), right.sum(dim=1)], dim=1)
        return Ranking(protocol, match_rank(sim, right), pairs, right.gather(1, best), sizes)

    @staticmethod
    def sampled(way: str, lists: Tensor, image_feat: Tensor, text_feat: Tensor, owner: Tensor, top: int) -> "Ranking":
        """Of candidate lists (Q, 1 + C): the query's photo, then for i2t the texts, for t2i the photos to choose from,
        the right one first."""
        query, choice = lists[:, :1], lists[:, 1:]
        photos, texts = (query, choice) if way == "i2t" else (choice, owner[query])
        sim = (image_feat[photos] * text_feat[texts]).sum(dim=2)
        right = torch.zeros_like(sim, dtype=torch.bool)
        right[:, 0] = True
        return Ranking.of(f"sampled_{way}", sim, right, photos, texts, top)

    def reranked(self, scores: Tensor) -> Tensor:
        """Ranks (Q,) when the best K are put in the order of `scores` (Q, K), before all others."""
        return torch.where(self.right.any(dim=1), match_rank(scores, self.right), self.rank)

    def chance(self) -> Metrics:
        """Recalls of a random order: 1 − C(n − right, k) / C(n, k)."""
        counts = Counter(map(tuple, self.sizes.tolist()))
        miss = lambda n, right, k: math.comb(n - right, k) / math.comb(n, k) if k <= n else 0.0
        share = lambda k: sum(times * (1 - miss(n, right, k)) for (n, right), times in counts.items()) / len(self.rank)
        return {f"{self.protocol}_r{k}": share(k) for k in (1, 5, 10)}


def full_rankings(image_feat: Tensor, text_feat: Tensor, owner: Tensor, top: int) -> Iterator[Ranking]:
    """Every photo (n, E) against the texts (m, E), every text against all photos; owner (n,): the text of a photo."""
    photos, texts = torch.arange(len(image_feat)), torch.arange(len(text_feat))
    i2t = [
        Ranking.of("full_i2t", image_feat[p] @ text_feat.T, owner[p, None] == texts, p[:, None], texts, top)
        for p in photos.split(1024)
    ]
    t2i = [
        Ranking.of("full_t2i", text_feat[t] @ image_feat.T, t[:, None] == owner, photos, t[:, None], top)
        for t in texts.split(1024)
    ]
    for parts in (i2t, t2i):
        joined = (torch.cat([getattr(part, key) for part in parts]) for key in ("rank", "pairs", "right", "sizes"))
        yield Ranking(parts[0].protocol, *joined)


def sampled_candidates(
    owner: np.ndarray, kinds: np.ndarray, queries: int, negatives: int, rng: np.random.Generator
) -> dict[str, Tensor]:
    """One draw of the sampled protocol: random query photos, and for each the right text (i2t), or itself as the right
    photo of its text (t2i), before `negatives` of other products of the same sub-category, topped up from others where
    there are too few. owner (n,): product of a photo; kinds (n,): its sub-category.
    -> {"i2t": (Q, 1 + C), "t2i": (Q, 1 + C)}: photo, right candidate, wrong ones."""
    chosen, lists = rng.permutation(len(owner))[:queries], {"i2t": [], "t2i": []}
    products, first = np.unique(owner, return_index=True)
    for photo in chosen:
        for way, owners, kinds_of, right in (
            ("i2t", products, kinds[first], owner[photo]), ("t2i", owner, kinds, photo)
        ):  # fmt: skip
            others = np.flatnonzero(owners != owner[photo])
            alike = kinds_of[others] == kinds[photo]
            pool = np.concatenate([rng.permutation(others[alike]), rng.permutation(others[~alike])])
            lists[way].append(np.concatenate([[photo, right], pool[:negatives]]))
    shortest = {way: min(map(len, rows)) for way, rows in lists.items()}
    return {way: torch.from_numpy(np.stack([row[: shortest[way]] for row in rows])) for way, rows in lists.items()}


def recalls_of(rankings: list[Ranking], ranks: list[Tensor]) -> Metrics:
    """R@1/5/10 of each protocol and direction, the mean over both and, of several draws, the mean over these."""
    shares = {}
    for ranking, rank in zip(rankings, ranks, strict=True):
        for k in (1, 5, 10):
            shares.setdefault(f"{ranking.protocol}_r{k}", []).append((rank < k).float().mean().item())
    figures = {key: float(np.mean(values)) for key, values in shares.items()}
    spread = {f"{key}_std": float(np.std(values)) for key, values in shares.items() if len(values) > 1}
    for name in dict.fromkeys(ranking.protocol.split("_")[0] for ranking in rankings):
        means = [value for key, value in figures.items() if key.startswith(f"{name}_")]
        spread[f"{name}_mean"] = float(np.mean(means))
    return figures | spread


# -------------------------------------------------------------------------- task: text-guided image retrieval


# subset, protocol, similarities (Q, C), triplets (Q,), the gallery's rows of `photos` (C,)
RankedTriplets = tuple[str, str, Tensor, np.ndarray, np.ndarray]


class TextGuided(Task):
    """Text-guided (composed) image retrieval: reference photo + what differs → target photo (FashionIQ).

    Query = the projected fused [CLS] of (reference photo, text), target = image feature, plain ITC (Fashion-FINE). A
    pretrained model knows no such queries; evaluated as it is, its query is the sum of both features (choice).
    """

    select = "val_mean"
    panels = {"loss": ["itc"], "held-out recall": ["val_r1", "val_r10", "val_r50"]}

    @property
    def fused(self) -> bool:
        """Are its queries the fused ones, or those of a model that has not been fine-tuned?"""
        return not self.config.eval_only or self.config.start == "tgir"

    def open(self, split: str) -> Triplets:
        """The triplets of a split."""
        config = self.config
        triplets = build_triplets(
            config.data, config.root, split, config.model.image_size, config.data_seed, config.products
        )
        triplets.lead = lead_of(config)
        return triplets

    def divide(self, dataset: Triplets) -> tuple[Triplets, Triplets]:
        """To train on, to choose the best step by: no reference photo (synthetic: no family) is in both."""
        return self.parts(dataset, dataset.families)

    def losses(self, run: Run, batch: dict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """ITC of queries with the targets of the batch, both ways; references and targets are encoded in one call."""
        both = run.model.encode_image(torch.cat([batch["images"], batch["target_images"]]))
        references, targets = both.chunk(2)
        query = compose(run, batch, references, fused=True)
        target_feat = run.model.image_feature(targets)
        with torch.autocast(run.device.type, enabled=False):
            sim = query @ target_feat.T / run.model.temp  # (B, B)
            hard = itc_targets(batch["product_ids"], batch["product_ids"], sim.detach(), alpha=0.0)
            loss = itc_loss(sim, sim.T, hard, hard)
        return {"itc": loss}, {"accuracy": accuracy(sim, torch.arange(len(sim), device=run.device))}

    def rank(self, run: Run, dataset: Triplets) -> Iterator[RankedTriplets]:
        """For each subset and gallery, how similar its photos are to the queries."""
        wanted = np.unique(np.concatenate([rows for g in dataset.galleries.values() for rows in g.values()]))
        read, feats = photo_features(run, dataset.photos.part(wanted))
        place = {row: i for i, row in enumerate(wanted[read].tolist())}
        queries, triplets = [], []
        for batch in batches_of(run, dataset.queries(), "encoding queries"):
            with autocast(run), torch.no_grad():
                queries.append(compose(run, batch, run.model.encode_image(batch["images"]), self.fused))
            triplets.append(batch["rows"].cpu())
        if not queries:
            raise DataError("no reference photo could be read")
        query, feats, triplets = torch.cat(queries).cpu(), feats.cpu(), torch.cat(triplets)
        for subset, galleries in dataset.galleries.items():
            asked = torch.tensor([dataset.subsets[t] == subset for t in triplets.tolist()])
            for protocol, rows in galleries.items():
                rows = np.array([row for row in rows.tolist() if row in place])
                if not len(rows) or not asked.any():
                    raise DataError(f"{subset}: the {protocol} gallery or its queries are empty")
                gallery = feats[[place[row] for row in rows.tolist()]]
                yield subset, protocol, query[asked] @ gallery.T, triplets[asked].numpy(), rows

    def validate(self, run: Run, dataset: Triplets) -> Metrics:
        """On held-out triplets, among the photos of their pairs."""
        figures, _ = triplet_recalls(dataset, self.rank(run, dataset))
        held_out = {f"val_r{k}": figures[f"mean_union_r{k}"] for k in (1, 10, 50)}
        return held_out | {"val_mean": (held_out["val_r10"] + held_out["val_r50"]) / 2}

    def report(self, run: Run, dataset: Triplets) -> dict:
        """Recall on both galleries; of a split without targets instead ranks.json."""
        ranked, out = list(self.rank(run, dataset)), Path(self.config.out)
        sizes = "; ".join(f"{subset} {protocol} {len(rows):,}" for subset, protocol, _, _, rows in ranked)
        protocol = f"{'fused query' if self.fused else 'sum of features'}; photos to search, by gallery: {sizes}"
        if (dataset.targets < 0).any():
            write_ranks(dataset, ranked, out / "ranks.json")
            return {"protocol": protocol + "; no targets are published, see ranks.json", "metrics": {}, "chance": {}}
        figures, chance = triplet_recalls(dataset, ranked)
        _, _, sim, triplets, rows = ranked[0]
        examples = []
        for q in np.linspace(0, len(triplets) - 1, 6).astype(int):
            triplet = int(triplets[q])
            best = zip(*(part.tolist() for part in sim[q].topk(min(5, len(rows)))), strict=True)
            answers = [(int(rows[i]), f"{s:.2f}", bool(rows[i] == dataset.targets[triplet])) for s, i in best]
            examples.append((dataset.captions[triplet], dataset.photo(triplet), answers))
        draw_answers(dataset.photos, examples, out / "examples.png")
        return {"protocol": protocol, "metrics": figures, "chance": chance}


def triplet_recalls(dataset: Triplets, ranked: Iterable[RankedTriplets]) -> tuple[Metrics, Metrics]:
    """R@1, R@10, R@50 by subset and gallery, and their mean over subsets; and what chance would give."""
    figures, chance = {}, {}
    for subset, protocol, sim, triplets, rows in ranked:
        rank = match_rank(sim, torch.from_numpy(dataset.targets[triplets][:, None] == rows))
        for k in (1, 10, 50):
            figures[f"{subset}_{protocol}_r{k}"] = (rank < k).float().mean().item()
            chance[f"{subset}_{protocol}_r{k}"] = min(1.0, k / len(rows))
    for values in (figures, chance):
        for end in dict.fromkeys(key.split("_", 1)[1] for key in list(values)):
            values[f"mean_{end}"] = float(np.mean([v for key, v in values.items() if key.endswith(end)]))
    return figures, chance


def write_ranks(dataset: Triplets, ranked: Iterable[RankedTriplets], path: Path) -> None:
    """For each query the names of its hundred best photos of the original gallery, the best first."""
    lines = []
    for subset, protocol, sim, triplets, rows in ranked:
        if protocol == "original":
            for triplet, best in zip(triplets.tolist(), sim.topk(min(100, len(rows))).indices.tolist(), strict=True):
                names = [dataset.photos.name_of(int(rows[i])) for i in best]
                query = {"subset": subset, "candidate": dataset.name_of(triplet), "text": dataset.captions[triplet]}
                lines.append(query | {"ranking": names})
    path.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    print(f"{len(lines):,} queries, their best photos in {path}")


def compose(run: Run, batch: dict, references: Tensor, fused: bool) -> Tensor:
    """Unit-length queries (B, E) of photos, encoded (B, N, D), and texts: after fine-tuning the projected fused [CLS],
    before it the sum of both features."""
    model, keep = run.model, batch["attention_mask"]
    text_embeds = model.encode_text(batch["token_ids"], keep)
    if fused:
        return model.project_text(model.fuse(text_embeds, keep, references, only_cls=len(keep))[0])
    return F.normalize(model.image_feature(references) + model.text_feature(text_embeds, keep), dim=-1)


# ------------------------------------------------------------------- tasks: category, sub-category recognition


class Recognition(Task):
    """Category or sub-category from the fused [CLS] of photo and text, or from the image CLS alone."""

    panels = {"loss": ["class"], "held-out": ["val_accuracy", "val_macro_f1"]}
    select = "val_accuracy"

    def labels_of(self, dataset: PhotoDataset) -> list[str]:
        """The label of each row."""
        return dataset.categories if self.config.task == "category" else dataset.subcategories

    def open(self, split: str) -> PhotoDataset:
        """The photos of a split that have a label."""
        dataset = open_photos(self.config, split)
        labelled = np.array([bool(label) for label in self.labels_of(dataset)])
        if not labelled.any():
            raise DataError(f"no photo of the {split} split has a {self.config.task}")
        if labelled.all():
            return dataset
        part = dataset.part(np.flatnonzero(labelled))
        part.problems = [*dataset.problems, f"{(~labelled).sum():,} photos without a {self.config.task}"]
        return part

    def divide(self, dataset: PhotoDataset) -> tuple[PhotoDataset, PhotoDataset]:
        """To train on, to choose the best step by; every class stays in training."""
        labels = self.labels_of(dataset)
        if len(set(labels)) < 2:
            raise DataError(
                f"all photos have the same {self.config.task}, {labels[0]!r}; there is nothing to tell apart"
            )
        products = {}
        for product, label in zip(dataset.product_ids.tolist(), labels, strict=True):
            products.setdefault(label, set()).add(product)
        if single := sorted(label for label, found in products.items() if len(found) == 1):
            few = ", ".join(single[:5]) + (", …" if len(single) > 5 else "")
            print(f"{len(single)} of {len(products)} classes have a single product, trained on and not held out: {few}")
        train_set, held_out = self.parts(dataset, dataset.product_ids, labels)
        classes = tuple(sorted(set(self.labels_of(train_set))))
        model = replace(self.config.model, classes=len(classes))
        self.config = replace(self.config, classes=classes, model=model)
        self.train_classes = self.class_ids(train_set)
        return train_set, held_out

    def class_ids(self, dataset: PhotoDataset) -> Tensor:
        """The class of each row; one more, the last, for labels that training has not seen. -> (N,)."""
        number = {label: i for i, label in enumerate(self.config.classes)}
        return torch.tensor([number.get(label, len(number)) for label in self.labels_of(dataset)])

    def logits(self, run: Run, batch: dict) -> Tensor:
        """(B, classes)."""
        image_embeds = run.model.encode_image(batch["images"])
        if self.config.modality == "image":
            return run.model.class_logits(image_embeds)
        keep = batch["attention_mask"]
        text_embeds = run.model.encode_text(batch["token_ids"], keep)
        return run.model.class_logits(run.model.fuse(text_embeds, keep, image_embeds, only_cls=len(keep))[0])

    def losses(self, run: Run, batch: dict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Cross-entropy."""
        logits, labels = self.logits(run, batch), self.train_classes[batch["rows"].cpu()].to(run.device)
        return {"class": cross_entropy(logits, labels)}, {"accuracy": accuracy(logits, labels)}

    @torch.no_grad()
    def predict(self, run: Run, dataset: PhotoDataset) -> tuple[Tensor, Tensor]:
        """Classes (n,) that are right and that were answered, of the photos that could be read."""
        answers, rows = [], []
        for batch in batches_of(run, dataset, "recognising"):
            with autocast(run):
                answers.append(self.logits(run, batch).argmax(dim=1).cpu())
            rows.append(batch["rows"].cpu())
        if not rows:
            raise DataError("no photo could be read")
        return self.class_ids(dataset)[torch.cat(rows)], torch.cat(answers)

    def validate(self, run: Run, dataset: PhotoDataset) -> Metrics:
        """Accuracy and macro-F1 on the held-out products."""
        right, answered = self.predict(run, dataset)
        return {f"val_{key}": value for key, value in recognition_scores(right, answered).items()}

    def report(self, run: Run, dataset: PhotoDataset) -> dict:
        """Accuracy and macro-F1, a line for each class in classes.tsv, and confusion.png."""
        right, answered = self.predict(run, dataset)
        figures, out = scores_by_class(right, answered), Path(self.config.out)
        names = [*self.config.classes, "(unseen in training)"]
        support = right.bincount(minlength=len(names))
        lines = ["class\tphotos\tprecision\trecall\tf1"] + [
            f"{names[c]}\t{support[c]}\t" + "\t".join(f"{value:.4f}" for value in values)
            for c, values in sorted(figures.items())
        ]
        (out / "classes.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        draw_confusion(right, answered, names, out / "confusion.png")
        most = int(support.argmax())
        chance = recognition_scores(right, torch.full_like(right, most))
        metrics = recognition_scores(right, answered)
        metrics["unseen_share"] = (right == len(self.config.classes)).float().mean().item()
        what = "photo and text" if self.config.modality == "both" else "photo alone"
        protocol = f"{what}; {len(right):,} photos, {len(self.config.classes)} classes; chance: always {names[most]}"
        return {"protocol": protocol, "metrics": metrics, "chance": chance}


def recognition_scores(right: Tensor, answered: Tensor) -> Metrics:
    """Accuracy, and macro-F1: the mean of F1 over the classes that occur among the right or the answered (n,)."""
    f1 = [f1 for _, _, f1 in scores_by_class(right, answered).values()]
    return {"accuracy": (right == answered).float().mean().item(), "macro_f1": float(np.mean(f1))}


def scores_by_class(right: Tensor, answered: Tensor) -> dict[int, tuple[float, float, float]]:
    """Precision, recall, F1 of every class that occurs among the right or the answered (n,).

    F1 = 2·hits / (right + answered); a ratio of nothing to nothing counts as 0.
    """
    classes = int(torch.cat([right, answered]).max()) + 1
    hits = right[right == answered].bincount(minlength=classes)
    there, said = right.bincount(minlength=classes), answered.bincount(minlength=classes)
    ratio = lambda a, b: (a / b).item() if b else 0.0
    return {
        c: (ratio(hits[c], said[c]), ratio(hits[c], there[c]), ratio(2 * hits[c], there[c] + said[c]))
        for c in range(classes)
        if there[c] + said[c]
    }


# --------------------------------------------------------------------------------------------------- pictures


def draw_confusion(right: Tensor, answered: Tensor, names: list[str], path: Path) -> None:
    """confusion.png: for each class that occurs, which classes its photos were given, in shares of the row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = torch.cat([right, answered]).unique()
    counts = torch.zeros(len(names), len(names)).index_put_((right, answered), torch.ones(len(right)), accumulate=True)
    counts = counts[shown][:, shown]
    side, labels = max(4.0, 0.22 * len(shown) + 2), [names[c] for c in shown.tolist()]
    figure, axis = plt.subplots(figsize=(side, side), layout="constrained")
    axis.imshow((counts / counts.sum(dim=1, keepdim=True).clamp(min=1)).numpy(), cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks(range(len(shown)), labels, rotation=90, fontsize=7)
    axis.set_yticks(range(len(shown)), labels, fontsize=7)
    axis.set(xlabel="answered", ylabel="right", title="photos; colour: share of the row")
    for i, j in counts.nonzero().tolist():
        share = counts[i, j] / counts[i].sum()
        axis.text(j, i, int(counts[i, j]), ha="center", va="center", fontsize=5, color="white" if share > 0.5 else "k")
    figure.savefig(path, dpi=130)
    plt.close(figure)


RIGHT = (30, 150, 70)  # the frame of a right answer
Answer = tuple[int, str, bool]  # row, note, is it a right one?


def draw_answers(
    dataset: PhotoDataset, queries: list[tuple[str, Image.Image | None, list[Answer]]], path: Path, side: int = 128
) -> None:
    """A sheet of queries, text with or without a photo, each with its best photos, five a line; right ones framed."""
    font, columns, gap = letters(12), 5, 26
    lines = [max(1, -(-len(answers) // columns)) for _, _, answers in queries]
    page = Image.new("RGB", ((columns + 2) * (side + 8) + 16, sum(lines) * (side + gap) + 8), PAPER)
    pen, top = ImageDraw.Draw(page), 8
    for (text, photo, answers), height in zip(queries, lines, strict=True):
        left = 8
        if photo is not None:
            page.paste(square(photo, dataset.image_size).resize((side, side), Image.Resampling.BICUBIC), (left, top))
        left += (side + 8) * (photo is not None)
        width = 18 if photo is not None else 38
        pen.multiline_text((left, top), "\n".join(textwrap.wrap(text, width)[:8]), INK, font)
        for number, (row, note, right) in enumerate(answers):
            x = 8 + (side + 8) * (2 + number % columns)
            y = top + (number // columns) * (side + gap)
            picture = square(dataset.photo(row), dataset.image_size).resize((side, side), Image.Resampling.BICUBIC)
            if right:
                pen.rectangle((x - 3, y - 3, x + side + 2, y + side + 2), RIGHT)
            page.paste(picture, (x, y))
            pen.text((x, y + side + 3), note, INK, font)
        top += height * (side + gap)
    page.save(path)


# ------------------------------------------------------------------------------------------ fine-tune, evaluate

TASKS = {"retrieval": Retrieval, "tgir": TextGuided, "category": Recognition, "subcategory": Recognition}


def finetune(config: FinetuneConfig, given: set[str], source: dict) -> dict | None:
    """Fine-tune, keep the step that does best on held-out products, and report it. -> results, None if stopped."""
    state, out = None, Path(config.out)
    if not config.eval_only:
        config, state = begin(config, given, check_flags)
    if not config.resume and (out / "results.json").exists():
        raise ConfigError(f"{out}/results.json is there already; choose another --out")
    task = TASKS[config.task](config)
    reported = task.open(config.split)
    print(f"{config.split}: {reported.report()}")
    if config.eval_only:
        run, best = build_run(config, reported, Tokenizer.from_str(source["tokenizer"])), source
        load_weights(run, best, config.checkpoint)
        out.mkdir(parents=True, exist_ok=True)
    else:
        run = train_task(config, task, source, state)
        if run is None:
            return None
        best = load_checkpoint(out / "best.pt")
        load_weights(run, best, f"{out}/best.pt")
    start, run.unreadable = time.perf_counter(), set()
    run.model.eval()
    report = task.report(run, reported)
    results = {
        "task": config.task,
        "data": config.data,
        "split": config.split,
        **report,
        "checkpoint": "random weights" if config.from_scratch else config.checkpoint,
        "steps": run.step,
        "best_step": best["step"],
        "left_out": len(reported.problems) + len(run.unreadable),
        "seed": config.seed,
        "seconds": run.seconds + time.perf_counter() - start,
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"{config.task} on {config.data} {config.split} ({report['protocol']}):")
    for key in (key for key in report["metrics"] if not key.endswith("_std")):
        chance = f"   chance {100 * report['chance'][key]:.1f} %" if key in report["chance"] else ""
        print(f"  {key:24} {100 * report['metrics'][key]:6.1f} %{chance}")
    print(f"see {out}/results.json")
    return results


def train_task(config: FinetuneConfig, task, source: dict, state: dict | None) -> Run | None:
    """Train as train.py does, over the task's own losses and validation. -> the run; None if it was stopped."""
    whole = task.open("train")
    train_set, held_out = task.divide(whole)
    print(f"train: {whole.report()}\nheld out of these, to choose the best step: {held_out.report()}")
    config = task.config  # recognition has counted its classes
    run = build_run(config, train_set, Tokenizer.from_str(source["tokenizer"]))
    if state is None and not config.from_scratch:
        load_weights(run, source, config.checkpoint)
    name = f"{config.task} from {'scratch' if config.from_scratch else config.checkpoint}"

    def validate(run: Run) -> tuple[Metrics, list[str]]:
        run.model.eval()
        return task.validate(run, held_out), []

    final = work(run, Job(name, task.losses, validate, task.panels, task.select, config.patience), train_set, state)
    return run if final else None


def load_weights(run: Run, source: dict, where: str) -> None:
    """A checkpoint's weights into both models; the recognition head may be new, unused parts are left out."""
    try:
        report = run.model.load_state_dict(source["model"], strict=False)
    except RuntimeError as error:
        raise ConfigError(f"{where}: does not fit its own config ({str(error).splitlines()[-1].strip()})") from None
    unused = ("class_head", "adapter", "phrases", "detector")
    wrong = [name for name in report.missing_keys if not name.startswith("class_head")]
    if wrong := wrong + [name for name in report.unexpected_keys if not name.startswith(unused)]:
        raise ConfigError(f"{where}: does not fit its own config, {wrong[0]} and {len(wrong) - 1} more names")
    run.momentum.update(run.model, decay=0)


# ------------------------------------------------------------------------------------------------------ search


def search(config: FinetuneConfig, source: dict) -> list[tuple[int, float]]:
    """The best photos for words, for a photo, or for a photo changed by words, on a sheet. -> rows and scores."""
    photo, tokenizer = None, Tokenizer.from_str(source["tokenizer"])
    if config.image:
        try:
            photo = square(open_photo(Path(config.image), config.model.image_size), config.model.image_size)
        except OSError as error:
            raise DataError(f"--image {config.image}: {error}") from None
    if config.query:
        check_words(tokenizer, lead_of(config), config.query)
    dataset = open_photos(config, config.split)
    print(f"{config.split}: {dataset.report()}")
    run = build_run(config, dataset, tokenizer)
    load_weights(run, source, config.checkpoint)
    run.model.eval()
    rows, feats = photo_index(run, dataset)
    query = query_feature(run, lead_of(config), config.query, photo, fused=config.start == "tgir")
    scores, best = (feats @ query).topk(min(len(rows), max(FOUND, config.rerank)))
    if config.rerank:
        pairs = torch.stack([best.cpu(), torch.zeros(len(best), dtype=torch.long)], dim=1)
        asked = [(lead_of(config), config.query)]
        matched, order = match_scores(run, dataset.part(rows), asked, pairs).sort(descending=True)
        scores, best = matched.sigmoid(), best[order]
    found = [(int(rows[i]), s) for i, s in zip(best.tolist(), scores.tolist(), strict=True)][:FOUND]
    for row, score in found:
        print(f"  {score:.3f}  {dataset.name_of(row)}  {dataset.captions[row]}")
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    words = "-".join(re.findall(r"\w+", f"found {config.query or ''} {Path(config.image or '').stem}".lower()))
    path = out / f"{words[:60]}.png"
    draw_answers(dataset, [(config.query or "", photo, [(row, f"{s:.2f}", False) for row, s in found])], path)
    print(f"see {path}")
    return found


def check_words(tokenizer: Tokenizer, lead: str, text: str) -> None:
    """Raise DataError for a query that the vocabulary has no word of; say what else of it is not read as it stands."""
    words, unknown = dict.fromkeys(re.findall(r"\w+", text)), dict.fromkeys(unknown_words(tokenizer, text))
    if len(unknown) == len(words):
        raise DataError(f"--query {text!r}: no word of it is in the model's vocabulary")
    if unknown:
        print(f"not in the vocabulary, spelt letter by letter: {', '.join(unknown)}")
    if encode(tokenizer, [(lead, text)])[0].overflowing:
        print(f"--query is longer than the model reads, and cut after {tokenizer.truncation['max_length']} tokens")


def unknown_words(tokenizer: Tokenizer, text: str) -> list[str]:
    """Words that the vocabulary can only spell letter by letter, or not at all."""
    unknown = []
    for word in re.findall(r"\w+", text):
        pieces = tokenizer.encode(word, add_special_tokens=False).tokens
        spelt = len(pieces) > 1 and all(len(piece.removeprefix("##")) == 1 for piece in pieces)
        if spelt or "[UNK]" in pieces:
            unknown.append(word)
    return unknown


@torch.no_grad()
def query_feature(run: Run, lead: str, text: str | None, photo: Image.Image | None, fused: bool) -> Tensor:
    """The unit-length feature (E,) of words, of a photo, or of both."""
    if photo is None:
        return text_features(run, [(lead, text)])[0]
    batch = to_device(tokenize(run.tokenizer, [(lead, text)]), run.device) if text else None
    with autocast(run):
        pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].to(run.device)
        embeds = run.model.encode_image(normalise(pixels))
        return compose(run, batch, embeds, fused)[0] if text else run.model.image_feature(embeds)[0]


def photo_index(run: Run, dataset: PhotoDataset) -> tuple[np.ndarray, Tensor]:
    """Rows (n,) and features (n, E) of all photos: encoded once, and kept beside the checkpoint until the weights, the
    data or a photo change."""
    config, key = run.config, hashlib.sha256()
    for name, tensor in run.model.state_dict().items():
        if name.startswith(("vision", "adapter")):
            key.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    key.update(json.dumps([config.precision, dataset.fingerprint(), *dataset.versions()]).encode())
    path = Path(config.checkpoint).with_suffix(f".{config.data}-{config.split}.index")
    if path.exists():
        try:
            saved = torch.load(path, map_location=run.device, weights_only=True)
            if saved["key"] == key.hexdigest():
                return saved["rows"].cpu().numpy(), saved["features"]
            print(f"{path}: model or photos have changed since, encoding them anew")
        except Exception:  # torch raises many kinds for a file that is not its own
            print(f"{path}: cannot be read, encoding the photos anew")
    rows, feats = photo_features(run, dataset)
    try:
        torch.save({"key": key.hexdigest(), "rows": torch.from_numpy(rows), "features": feats.cpu()}, path)
    except (OSError, RuntimeError) as error:
        print(f"{path}: the index cannot be kept ({error})")
    return rows, feats


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    try:
        if torch.distributed.is_torchelastic_launched():
            raise ConfigError("fine-tuning and search run in one process; start without torchrun")
        config, given, source = parse_config(argv)
        if config.task == "search":
            search(config, source)
        else:
            finetune(config, given, source)
    except (ConfigError, DataError, NonFiniteLoss, OSError) as error:
        sys.exit(f"finetune.py: {error}")
    except KeyboardInterrupt:
        sys.exit("finetune.py: stopped")


if __name__ == "__main__":
    main()
