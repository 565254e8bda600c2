"""Downstream tasks of a pretrained model with their evaluation protocols, and search.

    python finetune.py --task retrieval                        image ↔ caption: ITC + ITM, full and sampled protocol
    python finetune.py --task tgir                             reference image + "is red and has long sleeves" → image
    python finetune.py --task category | subcategory           recognition from image and caption, or --modality image
    python finetune.py --task entailment                       does the image show that a statement is true, or false?
    python finetune.py --task search --query "long sleeve dress in red" [--image photo.jpg]

All start from --checkpoint (default: the one that `python train.py` leaves); data, sizes and vocabulary are its own.
`--eval-only` evaluates a checkpoint as it is; `--from-scratch` takes only its sizes and vocabulary, to compare with.

A task is a function that trains and one that evaluates, see TASKS. It leaves in --out: config.json, metrics.jsonl,
curves.png and last.pt as train.py; best.pt, the step that did best on products held out of training; results.json, the
metrics of that step on --split; and examples.png, or of recognition confusion.png and classes.tsv.
"""

import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.batches import (
    batches_of,
    compose_queries,
    distinct_image_rows,
    image_features,
    itm_scores,
    text_features,
    texts_to_search,
)
from engine.checkpoints import begin, load_checkpoint, load_weights, read_tokenizer, restore
from engine.finetune_config import FinetuneConfig, check_flags, labels_of, open_data, parse_config
from engine.flags import ConfigError, in_one_line
from engine.run import Run, autocast, build_run, build_sampler
from evaluation.pictures import Answer, draw_answers, draw_confusion
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
from losses import accuracy, cross_entropy, itc_loss, itc_targets, positive_pairs
from readers.dataset import DataError, PairDataset
from readers.prompts import Text
from readers.triplets import Triplets
from train import NonFiniteLoss, Values, compute_itc, compute_itm, encode_momentum, fit, sample_itm_negatives

Evaluation = tuple[Metrics, Metrics, dict]  # metrics; what chance would give; how both were counted

# --- retrieval: images by captions, captions by images ---


def train_retrieval(config: FinetuneConfig, source: dict, dataset: PairDataset, stop_at: int | None) -> Run | None:
    """Train by ITC + ITM; select by the full protocol on the held-out products."""
    train_set, held_out = hold_out(config, dataset, dataset.product_ids)

    def validate(run: Run) -> Metrics:
        run.model.eval()
        _, _, features = encode_pairs(run, held_out)
        recalls = recalls_of(full_rankings(*features))
        return {key.replace("full", "val"): value for key, value in recalls.items()}

    return train_and_select(config, source, train_set, retrieval_losses, validate, "val_mean", stop_at)


def retrieval_losses(run: Run, batch: dict) -> tuple[Values, Values]:
    """ITC + ITM, as in pretraining but without masks. -> losses, metrics"""
    model, ids, attention_mask = run.model, batch["token_ids"], batch["attention_mask"]
    _, _, image_feat_m, text_feat_m = encode_momentum(run, batch)

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
    itm, itm_accuracy = compute_itm(run, fused_cls, itm_labels)
    return {"itc": run.config.itc_weight * itc, "itm": itm}, {"itm_accuracy": itm_accuracy}


def evaluate_retrieval(run: Run, dataset: PairDataset) -> Evaluation:
    """Full protocol and, where an image has one caption, the sampled one; with --rerank also by the ITM head."""
    config = run.config
    rows, captions, features = encode_pairs(run, dataset)
    image_feat, text_feat, image_products, text_products = features
    protocol = {"images": len(rows), "captions": len(captions), "reranked": config.rerank}
    rankings = full_rankings(*features, config.rerank)
    if not dataset.several_captions:
        kinds = np.array(dataset.subcategories)[rows]
        sampled, same_kind = sampled_rankings(image_feat, text_feat, image_products, kinds, config.seed, config.rerank)
        rankings += sampled
        if any(dataset.subcategories):
            protocol["negatives of the same sub-category"] = round(same_kind, 3)
    metrics, chance = recalls_of(rankings), {}
    for ranking in rankings[:4]:  # all draws of the sampled protocol have the same
        chance |= ranking.chance()
    if config.rerank:
        metrics |= recalls_of(rerank(run, dataset.subset(rows), captions, rankings))

    examples = []
    for number in np.linspace(0, len(captions) - 1, 6).astype(int):
        cosines = image_feat @ text_feat[number]
        answers = best_answers(cosines, rows, image_products == text_products[number])
        examples.append((captions[number][1], None, answers))
    draw_answers(dataset, examples, Path(config.out) / "examples.png")
    return metrics, chance, protocol


def best_answers(cosines: Tensor, rows: np.ndarray, is_right: Tensor) -> list[Answer]:
    """The five images that are most similar to a query, of some rows with cosines (C,), for a picture."""
    answers = []
    for cosine, place in zip(*cosines.topk(min(5, len(cosines))), strict=True):
        answers.append((int(rows[place]), f"{cosine:.2f}", bool(is_right[place])))
    return answers


def encode_pairs(run: Run, dataset: PairDataset) -> tuple[np.ndarray, list[Text], tuple[Tensor, ...]]:
    """Encode each image once, and the captions to tell the images by. -> rows of the images (n,); captions (m); on the
    CPU image_feat (n, E), text_feat (m, E), the product of each image (n,) and of each caption (m,)"""
    rows = distinct_image_rows(dataset)
    readable, image_feat = image_features(run, dataset.subset(rows))
    rows = rows[readable]
    captions, image_products, text_products = texts_to_search(dataset, rows)
    text_feat = text_features(run, captions)
    return rows, captions, (image_feat.cpu(), text_feat.cpu(), image_products, text_products)


def rerank(run: Run, images: PairDataset, captions: list[Text], rankings: list[Ranking]) -> list[Ranking]:
    """Put the best candidates of each query in the order of the ITM head, which scores each pair once."""
    pairs = torch.cat([ranking.pairs.flatten(0, 1) for ranking in rankings])
    pairs, place = pairs.unique(dim=0, return_inverse=True)
    scores = itm_scores(run, images, captions, pairs).cpu()[place]
    parts = scores.split([ranking.positives.numel() for ranking in rankings])
    reranked = []
    for ranking, part in zip(rankings, parts, strict=True):
        reranked.append(ranking.reranked(part.view_as(ranking.positives)))
    return reranked


# --- text-guided image retrieval (FashionIQ): reference image + what differs → target image ---


def train_tgir(config: FinetuneConfig, source: dict, dataset: Triplets, stop_at: int | None) -> Run | None:
    """Train by ITC of queries with targets; select by R@10 and R@50 on held-out triplets, among the images of these.
    No reference image (synthetic: no family) is in both parts."""
    train_set, held_out = hold_out(config, dataset, dataset.families)

    def validate(run: Run) -> Metrics:
        run.model.eval()
        recalls, _ = triplet_recalls(held_out, rank_galleries(run, held_out, fused=True))
        metrics = {f"val_r{k}": recalls[f"mean_union_r{k}"] for k in (1, 10, 50)}
        metrics["val_mean"] = (metrics["val_r10"] + metrics["val_r50"]) / 2
        return metrics

    return train_and_select(config, source, train_set, tgir_losses, validate, "val_mean", stop_at)


def tgir_losses(run: Run, batch: dict) -> tuple[Values, Values]:
    """Plain ITC of the projected fused [CLS] of reference image and text with the target image's feature, both ways
    (Fashion-FINE). -> losses, metrics"""
    images = torch.cat([batch["images"], batch["target_images"]])
    references, targets = run.model.vision(images).chunk(2)  # (B, N, D) each
    query_feat = compose_queries(run, batch, references, fused=True)  # (B, E)
    target_feat = run.model.image_feature(targets)
    with torch.autocast(run.device.type, enabled=False):
        sim = query_feat @ target_feat.T / run.model.temp  # (B, B)
        positives = positive_pairs(batch["product_ids"], batch["caption_ids"])
        itc_labels = itc_targets(positives, sim.detach(), alpha=0.0)
        itc = itc_loss(sim, sim.T, itc_labels, itc_labels)
    return {"itc": itc}, {"accuracy": accuracy(sim, torch.arange(len(sim), device=run.device))}


def evaluate_tgir(run: Run, dataset: Triplets) -> Evaluation:
    """Recalls on the galleries of each subset. Our choice: as long as the model was not fine-tuned for fused queries, a
    query is the sum of both features."""
    fused = not run.config.eval_only or run.config.start == "tgir"
    ranked = rank_galleries(run, dataset, fused)
    protocol = {"query": "fused" if fused else "sum of features"}
    for subset, gallery, _, _, rows in ranked:
        protocol[f"{subset} {gallery}"] = len(rows)
    out = Path(run.config.out)
    if (dataset.targets < 0).any():  # FashionIQ's test split, whose targets are not published
        write_ranks(dataset, ranked, out / "ranks.json")
        return {}, {}, protocol
    metrics, chance = triplet_recalls(dataset, ranked)

    examples = []
    _, _, sim, triplets, rows = ranked[0]
    for query in np.linspace(0, len(triplets) - 1, 6).astype(int):
        triplet = int(triplets[query])
        answers = best_answers(sim[query], rows, torch.from_numpy(rows == dataset.targets[triplet]))
        examples.append((dataset.captions[triplet], dataset.image(triplet), answers))
    draw_answers(dataset.photos, examples, out / "examples.png")
    return metrics, chance, protocol


def write_ranks(dataset: Triplets, ranked: list[RankedTriplets], path: Path) -> None:
    """Write the names of the hundred best images of the original gallery for each query, the best first."""
    lines = []
    for subset, gallery, sim, triplets, rows in ranked:
        if gallery != "original":
            continue
        best = sim.topk(min(100, len(rows))).indices
        for triplet, places in zip(triplets.tolist(), best, strict=True):
            names = [dataset.photos.name_of(int(rows[place])) for place in places]
            query = {"subset": subset, "candidate": dataset.name_of(triplet), "text": dataset.captions[triplet]}
            lines.append(query | {"ranking": names})
    path.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    print(f"no targets are published; {len(lines):,} queries and their best images in {path}")


def rank_galleries(run: Run, dataset: Triplets, fused: bool) -> list[RankedTriplets]:
    """Compare the queries of each subset with the images of each of its galleries. Each image is encoded once."""
    gallery_rows = []
    for galleries in dataset.galleries.values():
        gallery_rows += galleries.values()
    shown = np.unique(np.concatenate(gallery_rows))
    readable, image_feat = image_features(run, dataset.photos.subset(shown))
    image_feat = image_feat.cpu()
    place = np.full(len(dataset.photos), -1)  # of an image in image_feat; −1 where it cannot be read
    place[shown[readable]] = np.arange(len(readable))

    query_feats, triplets = [], []
    for batch in batches_of(run, dataset.queries(), "encoding queries"):
        with autocast(run), torch.no_grad():
            query_feats.append(compose_queries(run, batch, run.model.vision(batch["images"]), fused))
        triplets.append(batch["rows"].cpu())
    query_feat, triplets = torch.cat(query_feats).cpu(), torch.cat(triplets).numpy()

    ranked = []
    for subset, galleries in dataset.galleries.items():
        of_subset = np.array(dataset.subsets)[triplets] == subset
        for gallery, rows in galleries.items():
            rows = rows[place[rows] >= 0]
            sim = query_feat[of_subset] @ image_feat[place[rows]].T  # (Q, C)
            ranked.append((subset, gallery, sim, triplets[of_subset], rows))
    return ranked


# --- recognition: category, sub-category, and visual entailment, where the classes are true, false and undecided ---


def train_recognition(config: FinetuneConfig, source: dict, dataset: PairDataset, stop_at: int | None) -> Run | None:
    """Train by cross-entropy; select by accuracy on held-out products. Every class stays in training."""
    labels = labels_of(config, dataset)
    train_set, held_out = hold_out(config, dataset, dataset.product_ids, labels)
    classes = tuple(sorted(set(labels)))
    if len(classes) < 2:
        raise DataError(f"all images have the same {config.task}, {classes[0]!r}; there is nothing to tell apart")
    config = replace(config, classes=classes, model=replace(config.model, classes=len(classes)))
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
    """Logits of the classes from the fused [CLS] of image and text, or, as --modality says, from the [CLS] of one of
    them; one linear layer (ALBEF's for entailment is an MLP). -> (B, classes)"""
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
    """The class of each row; one more, the last, for labels that training has not seen. -> (N,)"""
    number = {label: i for i, label in enumerate(config.classes)}
    return torch.tensor([number.get(label, len(number)) for label in labels_of(config, dataset)])


@torch.no_grad()
def predict(run: Run, dataset: PairDataset) -> tuple[Tensor, Tensor, Tensor]:
    """Predict the class of each image that can be read. -> rows, labels, preds (n,)"""
    rows, preds = [], []
    for batch in batches_of(run, dataset, "recognising"):
        with autocast(run):
            preds.append(classify(run, batch).argmax(dim=1).cpu())
        rows.append(batch["rows"].cpu())
    rows = torch.cat(rows)
    return rows, class_ids(run.config, dataset)[rows], torch.cat(preds)


def evaluate_recognition(run: Run, dataset: PairDataset) -> Evaluation:
    """Accuracy and macro-F1; of statements also the accuracy by the kind of attribute that they turn on. Chance is to
    predict the most frequent class always."""
    config = run.config
    rows, labels, preds = predict(run, dataset)
    names = [*config.classes, "(unseen in training)"]
    most_frequent = int(labels.bincount().argmax())
    metrics = recognition_scores(labels, preds)
    metrics["unseen_share"] = (labels == len(config.classes)).float().mean().item()
    if config.task == "entailment":
        kinds = np.array(dataset.subcategories)[rows.numpy()]
        for kind in sorted(set(kinds) - {""}):
            metrics[f"accuracy_{kind}"] = (labels == preds)[kinds == kind].float().mean().item()
    chance = recognition_scores(labels, torch.full_like(labels, most_frequent))
    out = Path(config.out)
    draw_confusion(labels, preds, names, out / "confusion.png")
    counts = labels.bincount(minlength=len(names))
    with open(out / "classes.tsv", "w", encoding="utf-8") as file:
        file.write(f"class\t{dataset.row_noun}\tprecision\trecall\tf1\n")
        for number, (precision, recall, f1) in sorted(scores_by_class(labels, preds).items()):
            file.write(f"{names[number]}\t{counts[number]}\t{precision:.4f}\t{recall:.4f}\t{f1:.4f}\n")
    protocol = {"modality": config.modality, dataset.row_noun: len(labels), "classes": len(config.classes)}
    return metrics, chance, protocol | {"most frequent": names[most_frequent]}


TASKS: dict[str, tuple[Callable, Callable]] = {
    "retrieval": (train_retrieval, evaluate_retrieval),
    "tgir": (train_tgir, evaluate_tgir),
    "category": (train_recognition, evaluate_recognition),
    "subcategory": (train_recognition, evaluate_recognition),
    "entailment": (train_recognition, evaluate_recognition),
}

# --- what tasks share: held-out products, training, results, the command line ---


def hold_out(
    config: FinetuneConfig, dataset: PairDataset, groups: np.ndarray, labels: list[str] | None = None
) -> tuple[PairDataset, PairDataset]:
    """Hold rows out of training to choose the best step by: whole groups (N,), as many as --held-out and --val-products
    say. Each label (N,) keeps a row in training. -> training set, held-out set. Raises DataError for too few groups."""
    labels = labels or [""] * len(groups)
    label_counts = defaultdict(Counter)  # of each group
    for group, label in zip(groups.tolist(), labels, strict=True):
        label_counts[group][label] += 1
    order = np.random.default_rng((5, config.data_seed)).permutation(np.unique(groups)).tolist()
    wanted = min(config.val_products, max(2, round(config.held_out * len(order))), len(order) - 1)
    rows_left = Counter(labels)  # in training
    held = []
    for group in order:
        counts = label_counts[group]
        if len(held) < wanted and all(rows_left[label] > count for label, count in counts.items()):
            rows_left -= counts
            held.append(group)
    if not held:
        raise DataError("too few products to hold any out of training; give more")
    is_held = np.isin(groups, held)
    train_set, held_out = dataset.subset(np.flatnonzero(~is_held)), dataset.subset(np.flatnonzero(is_held))
    print(f"train: {dataset.report()}\nheld out of these, to choose the best step: {held_out.report()}")
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
    """Train by train.fit from the checkpoint `source`, or go on with it; then load the step whose metric `select` is
    best. -> the run, None when stopped early"""
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
    where = f"{config.out}/best.pt"
    best = load_checkpoint(where)
    load_weights(run, best, where)
    run.best_step = best["step"]
    return run


def finetune(config: FinetuneConfig, given: set[str], source: dict, stop_at: int | None = None) -> dict | None:
    """Fine-tune, keep the step that does best on held-out products, and evaluate it. -> results, None when stopped.

    source: parts of the checkpoint to start from · stop_at: save and stop after this step"""
    out = Path(config.out)
    if not config.eval_only:
        config, state = begin(config, given, check_flags)
        source = state or source
    if not config.resume and (out / "results.json").exists():
        raise ConfigError(f"{out}/results.json is there already; choose another --out")
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
    run.unreadable = set()  # of the images evaluated, not of those trained on
    run.model.eval()
    metrics, chance, protocol = evaluate(run, dataset)
    results = {
        "task": config.task,
        "data": config.data,
        "split": config.split,
        "protocol": protocol,
        "metrics": metrics,
        "chance": chance,
        "checkpoint": "random weights" if config.from_scratch else config.checkpoint,
        "steps": run.step,
        "best_step": run.best_step,
        "left_out": len(dataset.problems) + len(run.unreadable),
        "seed": config.seed,
        "precision": run.config.precision,
        "seconds": run.seconds + time.perf_counter() - start,
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"{config.task} on {config.data} {config.split}; " + ", ".join(f"{k}: {v}" for k, v in protocol.items()))
    for key, value in metrics.items():
        if not key.endswith("_std"):
            by_chance = f"   chance {100 * chance[key]:.1f} %" if key in chance else ""
            print(f"  {key:24} {100 * value:6.1f} %{by_chance}")
    print(f"see {out}/results.json")
    return results


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
        sys.exit(f"finetune.py: {in_one_line(error)}")
    except KeyboardInterrupt:
        sys.exit("finetune.py: stopped")


if __name__ == "__main__":
    main()
