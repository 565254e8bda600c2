"""What a pretrained model is for: downstream tasks with their evaluation protocols, and search.

    python finetune.py --task retrieval                        photo ↔ text: ITC + ITM, full and sampled protocol
    python finetune.py --task tgir                             reference photo + "is red and has long sleeves" → photo
    python finetune.py --task category | subcategory           recognition from photo and text, or --modality image
    python finetune.py --task entailment                       does the photo show that a statement is true, or false?
    python finetune.py --task search --query "long sleeve dress in red" [--image photo.jpg]

All start from --checkpoint (default: the one that `python train.py` leaves); data, sizes and vocabulary are its own.
`--eval-only` evaluates a checkpoint as it is; `--from-scratch` takes only its sizes and vocabulary, to compare with.

What a task leaves in --out: config.json, metrics.jsonl, curves.png, last.pt as train.py; best.pt, the step that did
best on products held out from the training split; results.json, that step on the split that is reported; and a
picture: examples.png, or confusion.png with classes.tsv.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.batches import (
    batches_of,
    compose,
    different_photos,
    match_scores,
    photo_features,
    text_features,
    texts_to_search,
)
from engine.checkpoints import begin, load_checkpoint, load_weights, read_tokenizer, restore
from engine.finetune_config import (
    FinetuneConfig,
    check_flags,
    open_photos,
    open_statements,
    open_triplets,
    parse_config,
)
from engine.flags import ConfigError, in_one_line
from engine.run import Run, autocast, build_run, build_sampler
from evaluation.pictures import draw_answers, draw_confusion
from evaluation.scores import (
    DRAWS,
    NEGATIVES,
    QUERIES,
    Figures,
    RankedTriplets,
    full_rankings,
    recalls_of,
    recognition_scores,
    sampled_rankings,
    scores_by_class,
    triplet_recalls,
)
from evaluation.search import search
from losses import accuracy, cross_entropy, itc_loss, itc_targets, same_pairs
from readers.dataset import DataError, PhotoDataset
from readers.prompts import Text
from readers.triplets import Triplets
from train import (
    NonFiniteLoss,
    Values,
    compute_itc,
    compute_itm,
    encode_momentum,
    fit,
    sample_itm_negatives,
)


class Task:
    """What the tasks share: where their photos come from, and which of them are held out."""

    picture: Callable[[], None] | None = None  # draws what the last report is about

    def __init__(self, config: FinetuneConfig):
        self.config = config

    def open(self, split: str) -> PhotoDataset:
        """The photos of a split, with their descriptions."""
        return open_photos(self.config, split)

    def divide(self, dataset: PhotoDataset) -> tuple[PhotoDataset, PhotoDataset]:
        """To train on, to choose the best step by: no product is in both."""
        return self.parts(dataset, dataset.product_ids)

    def settled(self, _train_set: PhotoDataset) -> "Task":
        """The task that knows what there is to learn, where that is counted."""
        return self

    def parts(self, dataset: PhotoDataset, groups: np.ndarray, labels: list[str] | None = None) -> tuple:
        """`hold_out` of a data set by the config."""
        config = self.config
        rows = hold_out(groups, config.held_out, config.val_products, config.data_seed, labels)
        return tuple(dataset.part(chosen) for chosen in rows)


class Retrieval(Task):
    """Cross-modal retrieval: ITC + ITM; full protocol and, where a photo has one caption, the sampled one."""

    select = "val_mean"

    def losses(self, run: Run, batch: dict) -> tuple[Values, Values]:
        """ITC with momentum keys, and ITM, as in pretraining but without masks."""
        model, ids, attention_mask = run.model, batch["token_ids"], batch["attention_mask"]
        _, _, image_feat_m, text_feat_m = encode_momentum(run, batch)
        image_embeds, text_embeds = model.vision(batch["images"]), model.text(ids, attention_mask)
        image_feat, text_feat = model.image_feature(image_embeds), model.text_feature(text_embeds, attention_mask)
        itc, sim_i2t, sim_t2i = compute_itc(run, batch, image_feat, text_feat, image_feat_m, text_feat_m)

        # ITM: images with a wrong caption, captions with a wrong image, own pairs
        wrong_caption, wrong_image, itm_labels = sample_itm_negatives(run, batch, sim_i2t, sim_t2i)
        own = torch.arange(len(ids), device=run.device)
        pair_embeds = torch.cat([text_embeds.index_select(0, wrong_caption), text_embeds, text_embeds])
        pair_masks = torch.cat([attention_mask[wrong_caption], attention_mask, attention_mask])
        pair_images = torch.cat([own, wrong_image, own])
        image_kv = model.fusion.project_image_kv(image_embeds)
        fused_cls = model.fusion(pair_embeds, pair_masks, image_kv, pair_images, cls_only=True)
        itm, itm_accuracy = compute_itm(run, fused_cls, itm_labels)
        return {"itc": run.config.itc_weight * itc, "itm": itm}, {"itm_accuracy": itm_accuracy}

    def validate(self, run: Run, dataset: PhotoDataset) -> Figures:
        """Full protocol on the held-out products."""
        recalls = recalls_of(full_rankings(*self.encode(run, dataset)[2]))
        return {key.replace("full", "val"): value for key, value in recalls.items()}

    def encode(self, run: Run, dataset: PhotoDataset) -> tuple[np.ndarray, list[Text], tuple[Tensor, ...]]:
        """-> rows (n,) that have each photo once; texts to tell them by (m); on the CPU image_feat (n, E), text_feat
        (m, E), and of which product each photo (n,) and each text (m,) is."""
        shown = different_photos(dataset)
        read, image_feat = photo_features(run, dataset.part(shown))
        texts, *owners = texts_to_search(dataset, shown[read])
        return shown[read], texts, (image_feat.cpu(), text_features(run, texts).cpu(), *owners)

    def report(self, run: Run, dataset: PhotoDataset) -> dict:
        """All protocols, by similarity and with `--rerank` also by the matching head."""
        rows, texts, gallery = self.encode(run, dataset)
        image_feat, text_feat, of_photo, of_text = gallery
        if of_photo.max() < 1:
            raise DataError("one product is no gallery to search in; give more")
        top, protocol = self.config.rerank, f"full: {len(rows):,} photos, {len(texts):,} texts, "
        if dataset.several:
            more = []
            protocol += "all captions of each"
        else:
            kinds = numbers_of([dataset.subcategories[row] for row in rows])
            more, share = sampled_rankings(*gallery[:3], kinds, self.config.seed, top)
            share = f"{100 * share:.0f} % of the same sub-category"
            if not any(dataset.subcategories):
                share = "no sub-categories known"
            protocol += f"one a product; sampled: {min(QUERIES, len(rows)):,} queries, up to {NEGATIVES}"
            protocol += f" negatives ({share}), {DRAWS} draws"
        rankings, protocol = [*full_rankings(*gallery, top), *more], f"{protocol}; by similarity"
        metrics = recalls_of(rankings)
        if top:
            pairs, place = torch.cat([r.pairs.flatten(0, 1) for r in rankings]).unique(dim=0, return_inverse=True)
            scores = match_scores(run, dataset.part(rows), texts, pairs).cpu()[place]
            parts = scores.split([r.positives.numel() for r in rankings])
            reranked = [r.reranked(part.view(r.positives.shape)) for r, part in zip(rankings, parts, strict=True)]
            metrics |= recalls_of(reranked)
        protocol += f", the best {top} re-ranked by matching" if top else ""
        chance = {key: value for r in rankings[:4] for key, value in r.chance().items()}
        examples = []
        for text in np.linspace(0, len(texts) - 1, 6).astype(int):
            best = (image_feat @ text_feat[text]).topk(min(5, len(rows)))
            right = of_photo[best.indices] == of_text[text]
            answers = [(int(rows[i]), f"{s:.2f}", bool(hit)) for s, i, hit in zip(*best, right, strict=True)]
            examples.append((texts[text][1], None, answers))
        self.picture = partial(draw_answers, dataset, examples, Path(self.config.out) / "examples.png")
        return {"protocol": protocol, "metrics": metrics, "chance": chance}


class TextGuided(Task):
    """Text-guided (composed) image retrieval: reference photo + what differs → target photo (FashionIQ).

    Query = the projected fused [CLS] of (reference photo, text), target = image feature, plain ITC (Fashion-FINE). A
    pretrained model knows no such queries; evaluated as it is, its query is the sum of both features (choice).
    """

    select = "val_mean"

    @property
    def fused(self) -> bool:
        """Are its queries the fused ones, or those of a model that has not been fine-tuned?"""
        return not self.config.eval_only or self.config.start == "tgir"

    def open(self, split: str) -> Triplets:
        """The triplets of a split."""
        return open_triplets(self.config, split)

    def divide(self, dataset: Triplets) -> tuple[Triplets, Triplets]:
        """To train on, to choose the best step by: no reference photo (synthetic: no family) is in both."""
        return self.parts(dataset, dataset.families)

    def losses(self, run: Run, batch: dict) -> tuple[Values, Values]:
        """ITC of queries with the targets of the batch, both ways; references and targets are encoded in one call."""
        both = run.model.vision(torch.cat([batch["images"], batch["target_images"]]))
        references, targets = both.chunk(2)
        query = compose(run, batch, references, fused=True)
        target_feat = run.model.image_feature(targets)
        with torch.autocast(run.device.type, enabled=False):
            sim = query @ target_feat.T / run.model.temp  # (B, B)
            right = same_pairs(batch["product_ids"], batch["caption_ids"])
            hard = itc_targets(right, sim.detach(), alpha=0.0)
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
                queries.append(compose(run, batch, run.model.vision(batch["images"]), self.fused))
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

    def validate(self, run: Run, dataset: Triplets) -> Figures:
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
        self.picture = partial(draw_answers, dataset.photos, examples, out / "examples.png")
        return {"protocol": protocol, "metrics": figures, "chance": chance}


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


class Recognition(Task):
    """Category or sub-category from the fused [CLS] of photo and text, or from the [CLS] of one of them alone."""

    select = "val_accuracy"

    def labels_of(self, dataset: PhotoDataset) -> list[str]:
        """The label of each row."""
        return dataset.subcategories if self.config.task == "subcategory" else dataset.categories

    def open(self, split: str) -> PhotoDataset:
        """The photos of a split that have a label."""
        dataset = super().open(split)
        labelled = np.array([bool(label) for label in self.labels_of(dataset)])
        if not labelled.any():
            raise DataError(f"no photo of the {split} split has a {self.config.task}")
        if labelled.all():
            return dataset
        part = dataset.part(np.flatnonzero(labelled))
        part.problems = dataset.problems
        part.dropped = [*dataset.dropped, f"{(~labelled).sum():,} photos without a {self.config.task}"]
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
        return self.parts(dataset, dataset.product_ids, labels)

    def settled(self, train_set: PhotoDataset) -> "Recognition":
        """The task that knows the classes of its training photos."""
        classes = tuple(sorted(set(self.labels_of(train_set))))
        model = replace(self.config.model, classes=len(classes))
        task = type(self)(replace(self.config, classes=classes, model=model))
        task.train_classes = task.class_ids(train_set).to(task.config.device)
        return task

    def class_ids(self, dataset: PhotoDataset) -> Tensor:
        """The class of each row; one more, the last, for labels that training has not seen. -> (N,)."""
        number = {label: i for i, label in enumerate(self.config.classes)}
        return torch.tensor([number.get(label, len(number)) for label in self.labels_of(dataset)])

    def logits(self, run: Run, batch: dict) -> Tensor:
        """(B, classes)."""
        sees, keep = self.config.modality, batch["attention_mask"]
        if sees != "text":
            image_embeds = run.model.vision(batch["images"])
        if sees == "image":
            return run.model.class_head(image_embeds[:, 0])
        text_embeds = run.model.text(batch["token_ids"], keep)
        if sees == "text":
            return run.model.class_head(text_embeds[:, 0])
        image_kv = run.model.fusion.project_image_kv(image_embeds)
        return run.model.class_head(run.model.fusion(text_embeds, keep, image_kv, cls_only=True)[:, 0])

    def losses(self, run: Run, batch: dict) -> tuple[Values, Values]:
        """Cross-entropy; of the head alone, on encoders in evaluation mode, with --freeze."""
        if self.config.freeze:
            run.model.eval()
        logits, labels = self.logits(run, batch), self.train_classes[batch["rows"]]
        return {"class": cross_entropy(logits, labels)}, {"accuracy": accuracy(logits, labels)}

    @torch.no_grad()
    def predict(self, run: Run, dataset: PhotoDataset) -> tuple[Tensor, Tensor, Tensor]:
        """Of the photos that could be read the rows (n,), and the classes that are right and that were answered."""
        answers, rows = [], []
        for batch in batches_of(run, dataset, "recognising"):
            with autocast(run):
                answers.append(self.logits(run, batch).argmax(dim=1).cpu())
            rows.append(batch["rows"].cpu())
        if not rows:
            raise DataError("no photo could be read")
        rows = torch.cat(rows)
        return rows, self.class_ids(dataset)[rows], torch.cat(answers)

    def validate(self, run: Run, dataset: PhotoDataset) -> Figures:
        """Accuracy and macro-F1 on the held-out products."""
        _, right, answered = self.predict(run, dataset)
        return {f"val_{key}": value for key, value in recognition_scores(right, answered).items()}

    def report(self, run: Run, dataset: PhotoDataset) -> dict:
        """Accuracy and macro-F1, a line for each class in classes.tsv; the picture is confusion.png."""
        rows, right, answered = self.predict(run, dataset)
        figures, out = scores_by_class(right, answered), Path(self.config.out)
        names = [*self.config.classes, "(unseen in training)"]
        support = right.bincount(minlength=len(names))
        lines = [f"class\t{dataset.what}\tprecision\trecall\tf1"] + [
            f"{names[c]}\t{support[c]}\t" + "\t".join(f"{value:.4f}" for value in values)
            for c, values in sorted(figures.items())
        ]
        (out / "classes.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.picture = partial(draw_confusion, right, answered, names, out / "confusion.png")
        most = int(support.argmax())
        chance = recognition_scores(right, torch.full_like(right, most))
        metrics = recognition_scores(right, answered)
        metrics["unseen_share"] = (right == len(self.config.classes)).float().mean().item()
        metrics |= self.by_kind(dataset, rows, right == answered)
        what = {"both": "photo and text", "image": "photo alone", "text": "text alone"}[self.config.modality]
        protocol = (
            f"{what}; {len(right):,} {dataset.what}, {len(self.config.classes)} classes; chance: always {names[most]}"
        )
        return {"protocol": protocol, "metrics": metrics, "chance": chance}

    def by_kind(self, _dataset: PhotoDataset, _rows: Tensor, _hits: Tensor) -> Figures:
        """Further accuracies, of the rows (n,) of some kinds alone."""
        return {}


class Entailment(Recognition):
    """Visual entailment: does a photo show that a statement is true, that it is false, or neither? A class of photo and
    statement, as recognition (ALBEF's head is an MLP, ours one linear layer)."""

    def open(self, split: str) -> PhotoDataset:
        """The statements of a split."""
        return open_statements(self.config, split)

    def by_kind(self, dataset: PhotoDataset, rows: Tensor, hits: Tensor) -> Figures:
        """Accuracy by the kind of attribute that a statement's block turns on, where that is known."""
        kinds = np.array(dataset.subcategories)[rows.numpy()]
        return {f"accuracy_{kind}": hits[kinds == kind].float().mean().item() for kind in sorted({*kinds} - {""})}


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


TASKS = {"retrieval": Retrieval, "tgir": TextGuided, "category": Recognition, "subcategory": Recognition,
         "entailment": Entailment}  # fmt: skip


def finetune(config: FinetuneConfig, given: set[str], source: dict, stop_at: int | None = None) -> dict | None:
    """Fine-tune, keep the step that does best on held-out products, and report it. -> results, None if stopped.

    stop_at: save and stop after this step."""
    state, out = None, Path(config.out)
    if not config.eval_only:
        config, state = begin(config, given, check_flags)
    if not config.resume and (out / "results.json").exists():
        raise ConfigError(f"{out}/results.json is there already; choose another --out")
    task = TASKS[config.task](config)
    reported = task.open(config.split)
    print(f"{config.split}: {reported.report()}")
    if config.eval_only:
        run, best = build_run(config, reported, read_tokenizer(source, config.checkpoint)), source
        load_weights(run, best, config.checkpoint)
    else:
        whole = task.open("train")
        train_set, held_out = task.divide(whole)
        print(f"train: {whole.report()}\nheld out of these, to choose the best step: {held_out.report()}")
        task = task.settled(train_set)
        run = train_task(task, train_set, held_out, source, state, stop_at)
        if run is None:
            return None
        best = load_checkpoint(out / "best.pt")
        load_weights(run, best, f"{out}/best.pt")
    return evaluate(run, task, reported, best["step"])


def train_task(
    task: Task,
    train_set: PhotoDataset,
    held_out: PhotoDataset,
    source: dict,
    state: dict | None,
    stop_at: int | None = None,
) -> Run | None:
    """Train as train.py does, over the task's own losses and validation. -> the run; None if it was stopped."""
    config, run = task.config, build_run(task.config, train_set, read_tokenizer(source, task.config.checkpoint))
    if state is None and not config.from_scratch:
        load_weights(run, source, config.checkpoint)
    if config.freeze:
        run.model.requires_grad_(False)
        run.model.class_head.requires_grad_(True)
    name = f"{config.task} from {'scratch' if config.from_scratch else config.checkpoint}"

    def validate(run: Run) -> Figures:
        run.model.eval()
        return task.validate(run, held_out)

    run.sampler = build_sampler(run, train_set)
    if state:
        restore(run, state)
    print(name)
    final = fit(run, train_set, task.losses, validate, task.select, config.patience, stop_at)
    return run if final else None


def evaluate(run: Run, task: Task, reported: PhotoDataset, best_step: int) -> dict:
    """The task's report on the split that is reported, written to results.json and printed. -> results."""
    config, start = task.config, time.perf_counter()
    Path(config.out).mkdir(parents=True, exist_ok=True)
    run.unreadable = set()  # of the photos reported on, not of those trained on
    run.model.eval()
    report = task.report(run, reported)
    results = {
        "task": config.task,
        "data": config.data,
        "split": config.split,
        **report,
        "checkpoint": "random weights" if config.from_scratch else config.checkpoint,
        "steps": run.step,
        "best_step": best_step,
        "left_out": len(reported.problems) + len(run.unreadable),
        "seed": config.seed,
        "precision": run.config.precision,
        "seconds": run.seconds + time.perf_counter() - start,
    }
    (Path(config.out) / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"{config.task} on {config.data} {config.split} ({report['protocol']}):")
    for key in (key for key in report["metrics"] if not key.endswith("_std")):
        chance = f"   chance {100 * report['chance'][key]:.1f} %" if key in report["chance"] else ""
        print(f"  {key:24} {100 * report['metrics'][key]:6.1f} %{chance}")
    print(f"see {config.out}/results.json")
    try:
        if task.picture:
            task.picture()
    except Exception as error:  # the figures are safe, and a picture is no reason for a traceback
        print(f"no picture: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
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
