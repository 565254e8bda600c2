"""Downstream tasks of a pretrained model with their evaluation protocols, and search.

    python finetune.py --task retrieval                        image ↔ caption: ITC + ITM
    python finetune.py --task tgir                             reference image + "is red and has long sleeves" → image
    python finetune.py --task category | subcategory           recognition from image and caption, or --modality image
    python finetune.py --task entailment                       recognition of statements: true, false or undecided
    python finetune.py --task search --query "long sleeve dress in red" [--image photo.jpg]

A task starts from --checkpoint, which sets data, sizes and vocabulary. The default is the run of `python train.py` if
there is one, else the model in tutorial/pretrained.
`--eval-only` evaluates a checkpoint without training; `--from-scratch` trains from random weights, as a baseline.

A task is a function that trains and one that evaluates, see TASKS. Files in --out:

    config.json, metrics.jsonl, curves.png, last.pt            as of train.py
    best.pt                                                    the step that did best on held-out products
    results.json                                               the metrics of that step on --split
    examples.png, or confusion.png and classes.tsv             examples of retrieval, or scores of recognition by class
    ranks.json                                                 of FashionIQ's test split: the best images of a query

Letters: B batch, N image tokens, L text tokens, D width, E shared embedding, n images, m captions, Q queries,
C candidates of a query.
"""

import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.batches import (
    compose_queries,
    distinct_image_rows,
    evaluation_batches,
    image_features,
    retrieval_captions,
    score_pairs_with_itm,
    text_features,
)
from engine.checkpoints import begin, load_checkpoint, load_weights, read_tokenizer, restore
from engine.finetune_config import FinetuneConfig, check_flags, labels_of, open_data, parse_config
from engine.flags import ConfigError, in_one_line
from engine.log import write_text
from engine.run import Run, autocast, build_run, build_sampler
from evaluation.pictures import ExampleQuery, RetrievedImage, draw_confusion, draw_retrieved, picture_labels
from evaluation.scores import (
    Metrics,
    RankedTriplets,
    Ranking,
    full_rankings,
    recalls_of,
    recognition_scores,
    sampled_rankings,
    scores_by_class,
    triplet_recalls,
)
from evaluation.search import search
from losses import accuracy, cross_entropy, itc_loss, positive_pairs
from readers.dataset import DataError, PairDataset
from readers.prompts import Text
from readers.triplets import Triplets
from train import NonFiniteLoss, Values, compute_itc, compute_itm, encode_momentum, fit, sample_itm_negatives

EXAMPLE_QUERIES = 6  # queries of examples.png
EXAMPLE_IMAGES = 5  # images that are retrieved for each


class Evaluation(NamedTuple):
    """The result of evaluating a task."""

    metrics: Metrics
    chance: Metrics  # of a random order, or of always predicting the most frequent class; not for every key
    protocol: dict  # how they were measured


# --- retrieval: images by captions, captions by images ---


def train_retrieval(config: FinetuneConfig, source: dict, dataset: PairDataset, stop_at: int | None) -> Run | None:
    """Train by ITC + ITM; select the step by the recalls on held-out products, with all candidates (full protocol).

    Arguments, result and errors as in `train_and_select`.
    """
    train_set, held_out = hold_out(config, dataset, dataset.product_ids)

    def validate(run: Run) -> Metrics:
        run.model.eval()
        pairs = encode_pairs(run, held_out)
        rankings = full_rankings(pairs.image_feat, pairs.text_feat, pairs.image_products, pairs.caption_products)
        return {key.replace("full", "val"): value for key, value in recalls_of(rankings).items()}

    return train_and_select(config, source, train_set, retrieval_losses, validate, "val_mean", stop_at)


def retrieval_losses(run: Run, batch: dict) -> tuple[Values, Values]:
    """Compute ITC + ITM, as in pretraining but without masks. -> losses, metrics"""
    model, ids, attention_mask = run.model, batch["token_ids"], batch["attention_mask"]
    _, image_feat_m, text_feat_m = encode_momentum(run, batch)

    # encode
    image_embeds = model.vision(batch["images"])  # (B, N, D)
    text_embeds = model.text(ids, attention_mask)  # (B, L, D)

    # ITC
    image_feat, text_feat = model.image_feature(image_embeds), model.text_feature(text_embeds, attention_mask)  # (B, E)
    itc, sim_i2t, sim_t2i = compute_itc(run, batch, image_feat, text_feat, image_feat_m, text_feat_m)

    # ITM: images with a wrong caption, captions with a wrong image, own pairs; the head reads [CLS] alone
    wrong_caption, wrong_image, itm_labels = sample_itm_negatives(run, batch, sim_i2t, sim_t2i)
    image_kv = model.fusion.project_image_kv(image_embeds)
    own = torch.arange(len(ids), device=run.device)
    pair_text_index = torch.cat([wrong_caption, own, own])
    pair_image_index = torch.cat([own, wrong_image, own])
    fused_cls = model.fusion(text_embeds, attention_mask, image_kv, pair_image_index, pair_text_index, cls_only=True)
    itm, itm_accuracy = compute_itm(run, fused_cls, itm_labels)  # fused_cls (3B, 1, D)
    return {"itc": run.config.itc_weight * itc, "itm": itm}, {"itm_batch_accuracy": itm_accuracy}


def evaluate_retrieval(run: Run, dataset: PairDataset) -> Evaluation:
    """Measure recalls among all candidates (full protocol). Where an image has one caption, measure them also among up
    to 101 candidates (sampled protocol).

    With --rerank, recalls are also measured after the ITM head has re-ranked the best candidates. Writes examples.png.
    """
    config = run.config
    pairs = encode_pairs(run, dataset)
    protocol = {"images": len(pairs.rows), "captions": len(pairs.captions), "reranked": config.rerank}
    rankings = full_rankings(
        pairs.image_feat, pairs.text_feat, pairs.image_products, pairs.caption_products, config.rerank
    )
    if not dataset.several_captions:
        subcategories = np.array(dataset.subcategories)[pairs.rows]
        sampled, same_subcategory = sampled_rankings(
            pairs.image_feat, pairs.text_feat, pairs.image_products, subcategories, config.seed, config.rerank
        )
        rankings += sampled
        if any(dataset.subcategories):
            protocol["negatives of the same sub-category"] = round(same_subcategory, 3)
    metrics, chance = recalls_of(rankings), {}
    for ranking in rankings[:4]:  # full, and the first draw of the sampled protocol; chance is the same for all draws
        chance |= ranking.chance()
    if config.rerank:
        metrics |= recalls_of(rerank(run, dataset.subset(pairs.rows), pairs.captions, rankings))

    examples = []
    for number in np.linspace(0, len(pairs.captions) - 1, EXAMPLE_QUERIES).astype(int):
        cosines = pairs.image_feat @ pairs.text_feat[number]
        is_positive = pairs.image_products == pairs.caption_products[number]
        retrieved = most_similar_images(cosines, pairs.rows, is_positive)
        own_words = pairs.captions[number][1]  # without the prefix
        examples.append(ExampleQuery(own_words, None, retrieved))
    draw_retrieved(dataset, examples, Path(config.out) / "examples.png")
    return Evaluation(metrics, chance, protocol)


def most_similar_images(cosines: Tensor, rows: np.ndarray, is_positive: Tensor) -> list[RetrievedImage]:
    """Select the images of a gallery that are most similar to a query, for examples.png.

    cosines (C,), rows (C,), is_positive (C,) bool: of the gallery
    """
    retrieved = []
    best = cosines.topk(min(EXAMPLE_IMAGES, len(cosines)))
    for cosine, position in zip(best.values, best.indices, strict=True):
        retrieved.append(RetrievedImage(int(rows[position]), f"{cosine:.2f}", bool(is_positive[position])))
    return retrieved


class EncodedPairs(NamedTuple):
    """The images and captions of a data set as features, on the CPU."""

    rows: np.ndarray  # (n,): rows of the images
    captions: list[Text]  # m
    image_feat: Tensor  # (n, E)
    text_feat: Tensor  # (m, E)
    image_products: Tensor  # (n,): number of the product of an image
    caption_products: Tensor  # (m,): number of the product of a caption


def encode_pairs(run: Run, dataset: PairDataset) -> EncodedPairs:
    """Encode each image that can be read once, and the captions by which the images are retrieved.

    Raises DataError where no image can be read.
    """
    rows = distinct_image_rows(dataset)
    readable, image_feat = image_features(run, dataset.subset(rows))
    rows = rows[readable]
    captions, image_products, caption_products = retrieval_captions(dataset, rows)
    text_feat = text_features(run, captions)
    return EncodedPairs(rows, captions, image_feat.cpu(), text_feat.cpu(), image_products, caption_products)


def rerank(run: Run, images: PairDataset, captions: list[Text], rankings: list[Ranking]) -> list[Ranking]:
    """Re-rank the most similar candidates of each query by the ITM head, which scores each pair once.

    images, captions: numbered as in the rankings
    Raises DataError where an image cannot be read.
    """
    pairs = torch.cat([ranking.top_pairs.flatten(0, 1) for ranking in rankings])
    distinct_pairs, pair_number = pairs.unique(dim=0, return_inverse=True)
    scores = score_pairs_with_itm(run, images, captions, distinct_pairs).cpu()[pair_number]
    scores_by_ranking = scores.split([ranking.top_positives.numel() for ranking in rankings])
    reranked = []
    for ranking, ranking_scores in zip(rankings, scores_by_ranking, strict=True):
        reranked.append(ranking.reranked(ranking_scores.view_as(ranking.top_positives)))
    return reranked


# --- text-guided image retrieval (FashionIQ): reference image + difference in words → target image ---


def train_tgir(config: FinetuneConfig, source: dict, dataset: Triplets, stop_at: int | None) -> Run | None:
    """Train by ITC of queries with targets; select the step by R@10 and R@50 on held-out triplets.

    The gallery holds the images of the held-out triplets. Training and held-out triplets share no reference image, and
    no family of synthetic products: a product, its siblings and an unrelated product.
    Arguments, result and errors as in `train_and_select`.
    """
    train_set, held_out = hold_out(config, dataset, dataset.families)

    def validate(run: Run) -> Metrics:
        run.model.eval()
        recalls, _ = triplet_recalls(held_out, rank_galleries(run, held_out, fused=True))
        metrics = {f"val_r{k}": recalls[f"mean_union_r{k}"] for k in (1, 10, 50)}
        metrics["val_mean"] = (metrics["val_r10"] + metrics["val_r50"]) / 2
        return metrics

    return train_and_select(config, source, train_set, tgir_losses, validate, "val_mean", stop_at)


def tgir_losses(run: Run, batch: dict) -> tuple[Values, Values]:
    """Compute plain ITC, both ways, of the fused query with the feature of the target image. -> losses, metrics

    The query is the projected fused [CLS] of reference image and text (Fashion-FINE).
    """
    images = torch.cat([batch["images"], batch["target_images"]])
    references, targets = run.model.vision(images).chunk(2)  # (B, N, D) each
    query_feat = compose_queries(run, batch, references, fused=True)  # (B, E)
    target_feat = run.model.image_feature(targets)
    with torch.autocast(run.device.type, enabled=False):
        sim = query_feat @ target_feat.T / run.model.temp  # (B, B)
        positives = positive_pairs(batch["product_ids"], batch["caption_ids"])
        itc_labels = positives / positives.sum(dim=1, keepdim=True)  # uniform over the positives of a row
        itc = itc_loss(sim, sim.T, itc_labels, itc_labels)
    return {"itc": itc}, {"accuracy": accuracy(sim, torch.arange(len(sim), device=run.device))}


def evaluate_tgir(run: Run, dataset: Triplets) -> Evaluation:
    """Measure recalls in the galleries of each subset. Writes examples.png, or ranks.json where there are no targets.

    Our choice: before fine-tuning for fused queries, a query is the sum of both features.
    """
    is_fused = not run.config.eval_only or run.config.checkpoint_task == "tgir"
    ranked = rank_galleries(run, dataset, is_fused)
    protocol = {"query": "fused" if is_fused else "sum of features"}
    for triplets in ranked:
        protocol[f"{triplets.subset} {triplets.gallery}"] = len(triplets.rows)
    out = Path(run.config.out)
    if (dataset.targets < 0).any():  # FashionIQ's test split, whose targets are not published
        write_ranks(dataset, ranked, out / "ranks.json")
        return Evaluation({}, {}, protocol)
    metrics, chance = triplet_recalls(dataset, ranked)

    examples = []
    first = ranked[0]
    for query in np.linspace(0, len(first.triplets) - 1, EXAMPLE_QUERIES).astype(int):
        triplet = int(first.triplets[query])
        is_target = torch.from_numpy(first.rows == dataset.targets[triplet])
        retrieved = most_similar_images(first.sim[query], first.rows, is_target)
        examples.append(ExampleQuery(dataset.captions[triplet], dataset.image(triplet), retrieved))
    draw_retrieved(dataset.image_set, examples, out / "examples.png")
    return Evaluation(metrics, chance, protocol)


def write_ranks(dataset: Triplets, ranked: list[RankedTriplets], path: Path) -> None:
    """Write the names of the hundred most similar images of the original gallery for each query, the best first."""
    lines = []
    for subset, gallery, sim, triplets, rows in ranked:
        if gallery != "original":
            continue
        best = sim.topk(min(100, len(rows))).indices
        for triplet, positions in zip(triplets.tolist(), best, strict=True):
            names = [dataset.image_set.name_of(int(rows[position])) for position in positions]
            lines.append(
                {
                    "subset": subset,
                    "candidate": dataset.name_of(triplet),
                    "text": dataset.captions[triplet],
                    "ranking": names,
                }
            )
    write_text(path, json.dumps(lines, indent=1) + "\n")
    print(f"the targets are not published; the best images of {len(lines):,} queries are in {path}")


def rank_galleries(run: Run, dataset: Triplets, fused: bool) -> list[RankedTriplets]:
    """Compare the queries of each subset with the images of each of its galleries. Each image is encoded once.

    fused: the form of a query, see `compose_queries`
    Raises DataError where no image can be read.
    """
    gallery_rows = []
    for galleries in dataset.galleries.values():
        gallery_rows += galleries.values()
    image_rows = np.unique(np.concatenate(gallery_rows))
    readable, image_feat = image_features(run, dataset.image_set.subset(image_rows))
    image_feat = image_feat.cpu()
    feat_number = np.full(len(dataset.image_set), -1)  # row of image_set -> row of image_feat, −1: unreadable
    feat_number[image_rows[readable]] = np.arange(len(readable))

    query_feats, query_rows = [], []
    for batch in evaluation_batches(run, dataset.queries(), "encoding queries"):
        with autocast(run), torch.no_grad():
            query_feats.append(compose_queries(run, batch, run.model.vision(batch["images"]), fused))
        query_rows.append(batch["rows"].cpu())
    query_feat, triplets = torch.cat(query_feats).cpu(), torch.cat(query_rows).numpy()

    ranked = []
    subset_of_query = np.array(dataset.subsets)[triplets]
    for subset, galleries in dataset.galleries.items():
        in_subset = subset_of_query == subset
        for gallery, rows in galleries.items():
            rows = rows[feat_number[rows] >= 0]
            sim = query_feat[in_subset] @ image_feat[feat_number[rows]].T  # (Q, C)
            ranked.append(RankedTriplets(subset, gallery, sim, triplets[in_subset], rows))
    return ranked


# --- recognition: category, sub-category, and visual entailment, whose classes are true, false and undecided ---


def train_recognition(config: FinetuneConfig, source: dict, dataset: PairDataset, stop_at: int | None) -> Run | None:
    """Train by cross-entropy; select the step by accuracy on held-out products. Every class stays in training.

    Arguments and result as in `train_and_select`.
    Raises DataError where all labels are equal or no products can be held out, and otherwise as `train_and_select`.
    """
    labels = labels_of(config, dataset)
    train_set, held_out = hold_out(config, dataset, dataset.product_ids, labels)
    classes = tuple(sorted(set(labels)))
    if len(classes) < 2:
        raise DataError(f"all images have the same {config.task}, {classes[0]!r}; recognition needs at least two")
    most_frequent = classes.index(Counter(labels).most_common(1)[0][0])
    model = replace(config.model, classes=len(classes))
    config = replace(config, classes=classes, most_frequent=most_frequent, model=model)
    train_labels = class_ids(config, train_set).to(config.device)

    def compute_losses(run: Run, batch: dict) -> tuple[Values, Values]:
        if config.freeze:
            run.model.eval()
        logits, labels = classify(run, batch), train_labels[batch["rows"]]
        return {"class": cross_entropy(logits, labels)}, {"accuracy": accuracy(logits, labels)}

    def validate(run: Run) -> Metrics:
        run.model.eval()
        _, labels, preds = predict(run, held_out)
        return {f"val_{key}": value for key, value in recognition_scores(labels, preds).items()}

    return train_and_select(config, source, train_set, compute_losses, validate, "val_accuracy", stop_at)


def classify(run: Run, batch: dict) -> Tensor:
    """Compute the logits of the classes by one linear layer (ALBEF's for entailment is an MLP). -> (B, classes)

    It reads the fused [CLS] of image and caption or, by --modality, the [CLS] of one of them.
    """
    model, attention_mask, modality = run.model, batch["attention_mask"], run.config.modality
    if modality == "image":
        return model.class_head(model.vision(batch["images"])[:, 0])
    if modality == "text":
        return model.class_head(model.text(batch["token_ids"], attention_mask)[:, 0])
    image_kv = model.fusion.project_image_kv(model.vision(batch["images"]))
    text_embeds = model.text(batch["token_ids"], attention_mask)
    fused_cls = model.fusion(text_embeds, attention_mask, image_kv, cls_only=True)
    return model.class_head(fused_cls[:, 0])


def class_ids(config: FinetuneConfig, dataset: PairDataset) -> Tensor:
    """Return the class of each row (rows,); labels that do not occur in training are one more class, the last."""
    id_of = {label: number for number, label in enumerate(config.classes)}
    unseen = len(id_of)
    return torch.tensor([id_of.get(label, unseen) for label in labels_of(config, dataset)])


@torch.no_grad()
def predict(run: Run, dataset: PairDataset) -> tuple[Tensor, Tensor, Tensor]:
    """Predict the class of each image that can be read. -> rows (n,), labels (n,), preds (n,)

    Raises DataError where no image can be read.
    """
    rows, preds = [], []
    for batch in evaluation_batches(run, dataset, "classifying"):
        with autocast(run):
            preds.append(classify(run, batch).argmax(dim=1).cpu())
        rows.append(batch["rows"].cpu())
    rows = torch.cat(rows)
    return rows, class_ids(run.config, dataset)[rows], torch.cat(preds)


def evaluate_recognition(run: Run, dataset: PairDataset) -> Evaluation:
    """Measure accuracy and macro-F1; for statements also the accuracy by the kind of attribute that decides them.

    Chance is the value of always predicting the most frequent class of training. Writes confusion.png and classes.tsv.
    Raises DataError where no image can be read.
    """
    config = run.config
    rows, labels, preds = predict(run, dataset)
    names = [*config.classes, "(unseen in training)"]
    metrics = recognition_scores(labels, preds)
    metrics["unseen_share"] = (labels == len(config.classes)).float().mean().item()
    if config.task == "entailment":
        kinds = np.array(dataset.subcategories)[rows.numpy()]  # kind of the attribute that decides a statement
        for kind in sorted(set(kinds) - {""}):
            metrics[f"accuracy_{kind}"] = (labels == preds)[kinds == kind].float().mean().item()
    chance = recognition_scores(labels, torch.full_like(labels, config.most_frequent))

    out = Path(config.out)
    draw_confusion(labels, preds, names, out / "confusion.png")
    picture_names = picture_labels(names)
    counts = labels.bincount(minlength=len(names))
    table = f"class\t{dataset.row_noun}\tprecision\trecall\tf1\tlabel in confusion.png\n"
    for number, scores in sorted(scores_by_class(labels, preds).items()):
        numbers = f"{counts[number]}\t{scores.precision:.4f}\t{scores.recall:.4f}\t{scores.f1:.4f}"
        table += f"{names[number]}\t{numbers}\t{picture_names[number]}\n"
    write_text(out / "classes.tsv", table)
    protocol = {
        "modality": config.modality,
        dataset.row_noun: len(labels),
        "classes": len(config.classes),
        "most frequent": names[config.most_frequent],
    }
    return Evaluation(metrics, chance, protocol)


TASKS: dict[str, tuple[Callable, Callable]] = {  # task -> the function that trains, the function that evaluates
    "retrieval": (train_retrieval, evaluate_retrieval),
    "tgir": (train_tgir, evaluate_tgir),
    "category": (train_recognition, evaluate_recognition),
    "subcategory": (train_recognition, evaluate_recognition),
    "entailment": (train_recognition, evaluate_recognition),
}

# --- shared by the tasks: held-out products, training, results, the command line ---


def hold_out(
    config: FinetuneConfig,
    dataset: PairDataset,
    groups: np.ndarray,
    labels: list[str] | None = None,
) -> tuple[PairDataset, PairDataset]:
    """Hold some groups of rows out of training, to select the best step by.

    Their number is set by --held-out and --val-products.
    groups (rows,): the group of each row, its product for example, which stays together
    labels (rows,): every label keeps a row in training
    -> training set, held-out set
    Raises DataError where no group can be held out.
    """
    labels = labels or [""] * len(groups)
    label_counts = defaultdict(Counter)  # group -> label -> rows
    for group, label in zip(groups.tolist(), labels, strict=True):
        label_counts[group][label] += 1
    order = np.random.default_rng((5, config.data_seed)).permutation(np.unique(groups)).tolist()
    most_groups = min(config.val_products, max(2, round(config.held_out * len(order))), len(order) - 1)
    training_counts = Counter(labels)  # label -> rows that are left in training
    held_groups = []
    for group in order:
        counts = label_counts[group]
        if len(held_groups) < most_groups and all(training_counts[label] > count for label, count in counts.items()):
            training_counts -= counts
            held_groups.append(group)
    if not held_groups:
        raise DataError("too few products to hold some out of training for selection; add products")
    is_held_out = np.isin(groups, held_groups)
    train_set = dataset.subset(np.flatnonzero(~is_held_out))
    held_out = dataset.subset(np.flatnonzero(is_held_out))
    print(f"train: {dataset.report()}\nof these held out, to select the best step: {held_out.report()}")
    return train_set, held_out


def train_and_select(
    config: FinetuneConfig,
    source: dict,
    train_set: PairDataset,
    compute_losses: Callable[[Run, dict], tuple[Values, Values]],
    validate: Callable[[Run], Metrics],
    select: str,
    stop_at: int | None,
) -> Run | None:
    """Train from a checkpoint by train.fit, or resume; then load the step with the highest value of a metric.

    source: the checkpoint to start from; with --resume, last.pt of the run
    compute_losses: losses and metrics of a batch
    validate: metrics on the held-out set
    select: the metric
    stop_at: save and stop after this step
    -> the run, None when stopped early
    Raises ConfigError for weights or data that do not fit, and DataError for data that cannot be read.
    Raises NonFiniteLoss for a loss that is not finite, and OSError where a checkpoint cannot be written.
    """
    run = build_run(config, train_set, read_tokenizer(source))
    run.sampler = build_sampler(run, train_set)
    if config.freeze:
        run.model.requires_grad_(False)
        run.model.class_head.requires_grad_(True)
    if config.resume:
        restore(run, source)
    elif not config.from_scratch:
        load_weights(run, source, config.checkpoint)
    if fit(run, train_set, compute_losses, validate, select, config.patience, stop_at) is None:
        return None
    best_path = f"{config.out}/best.pt"
    best = load_checkpoint(best_path)
    load_weights(run, best, best_path)
    run.best_step = best["step"]
    return run


def finetune(config: FinetuneConfig, given: set[str], source: dict, stop_at: int | None = None) -> dict | None:
    """Fine-tune, select the step that does best on held-out products, evaluate it, and write results.json.

    given: names of the fields whose flags were given
    source: parts of the checkpoint to start from
    stop_at: save and stop after this step
    -> the results, None when stopped early
    Raises ConfigError for a folder or checkpoint that does not fit, and the errors of `open_data` and
    `train_and_select`.
    """
    out = Path(config.out)
    if not config.eval_only:
        config, state = begin(config, given, check_flags)
        source = state or source
    if not config.resume and (out / "results.json").exists():
        raise ConfigError(f"{out}/results.json exists already; choose another --out")
    train, evaluate = TASKS[config.task]
    dataset = open_data(config, config.split)
    print(f"{config.split}: {dataset.report()}")
    if config.eval_only:
        run = build_run(config, dataset, read_tokenizer(source))
        load_weights(run, source, config.checkpoint)
        run.best_step = source["step"]
    else:
        run = train(config, source, open_data(config, "train"), stop_at)
        if run is None:
            return None

    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    run.unreadable = set()  # of the evaluated images, without those of training
    run.model.eval()
    evaluation = evaluate(run, dataset)
    results = {
        "task": config.task,
        "data": config.data,
        "split": config.split,
        "protocol": evaluation.protocol,
        "metrics": evaluation.metrics,
        "chance": evaluation.chance,
        "checkpoint": "random weights" if config.from_scratch else config.checkpoint,
        "steps": run.step,
        "best_step": run.best_step,
        "left_out": len(dataset.problems) + len(run.unreadable),
        "seed": config.seed,
        "precision": run.config.precision,
        "seconds": run.seconds + time.perf_counter() - start,
    }
    write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    print("\n".join(results_table(results)))
    print(f"see {out}/results.json")
    return results


def results_table(results: dict) -> list[str]:
    """Format the results: a line on how they were measured, then a line for each metric with its chance, in percent."""
    protocol = ", ".join(f"{name}: {value}" for name, value in results["protocol"].items())
    lines = [f"{results['task']} on {results['data']} {results['split']}; {protocol}"]
    for key, value in results["metrics"].items():
        if key.endswith("_std"):
            continue
        line = f"  {key:24} {100 * value:6.1f} %"
        if key in results["chance"]:
            line += f"   chance {100 * results['chance'][key]:.1f} %"
        lines.append(line)
    return lines


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Errors end the process with one line."""
    try:
        if torch.distributed.is_torchelastic_launched():
            raise ConfigError("fine-tuning and search run in one process; start finetune.py without torchrun")
        config, given, source = parse_config(argv)
        if config.task == "search":
            search(config, source)
        else:
            finetune(config, given, source)
    except (ConfigError, DataError, NonFiniteLoss, OSError) as error:
        sys.exit(f"finetune.py: {in_one_line(error)}")
    except KeyboardInterrupt:
        sys.exit("finetune.py: stopped")


if __name__ == "__main__":
    main()
