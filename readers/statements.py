"""Visual entailment: statements about photos, each shown to be true, to be false, or neither. Drawn, or SNLI-VE's."""

from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from readers.dataset import DataError, PairDataset, ReportedSplit, Split
from readers.files import ImageFiles, read_json_lines
from readers.synthetic import Synthetic
from readers.triplets import clause
from readers.wardrobe import Product, pick

LABELS = ("entailment", "neutral", "contradiction")


def snlive(folder: Path, split: ReportedSplit, image_size: int) -> PairDataset:
    """SNLI-VE (Xie et al. 2019) as distributed: `snli_ve_{train,dev,test}.jsonl`, of whose lines `Flickr30K_ID`,
    `sentence2` and `gold_label` are read; photos `images/{Flickr30K_ID}.jpg`. The category of a row is its label.

    Statements without a gold label (`-`), and those of photos that are not there, are counted and left out.
    """
    statements, labels, source, left_out = [], [], [], Counter()
    row_of, paths, missing = {}, [], {}  # by the name of a photo
    for where, record in read_json_lines(folder / f"snli_ve_{'dev' if split == 'val' else split}.jsonl"):
        try:
            photo, statement, label = record["Flickr30K_ID"], record["sentence2"].strip(), record["gold_label"]
        except (AttributeError, KeyError):
            raise DataError(f"{where}: expected Flickr30K_ID, sentence2 and gold_label") from None
        path = folder / "images" / f"{photo}.jpg"
        if photo not in row_of and photo not in missing:
            if path.is_file():
                row_of[photo] = len(paths)
                paths.append(path)
            else:
                missing[photo] = f"no photo {photo}.jpg"
        if label not in LABELS:
            left_out["without a gold label"] += 1
        elif photo in missing:
            left_out["of photos that are not there"] += 1
        else:
            statements.append(statement)
            labels.append(label)
            source.append(row_of[photo])
    if not statements:
        raise DataError(f"{folder}: no usable statement of the {split} split; {'; '.join([*missing.values()][:3])}")
    images = ImageFiles(paths, image_size)
    dataset = PairDataset(statements, source, images, image_size, {"category": labels}, list(row_of), source)
    dataset.row_noun = "statements"
    dataset.product_noun = "photos"
    dataset.problems = list(missing.values())
    dataset.dropped = [f"{count:,} {why}" for why, count in left_out.items()]
    return dataset


class Statement(NamedTuple):
    """A statement about a photo."""

    photo: int
    text: str
    label: str  # one of LABELS
    kind: str  # of the attribute that it turns on


class Claim(NamedTuple):
    """Something that one photo shows and the other of a pair cannot tell."""

    kind: str
    truth: str
    lie: str  # contradicted by the one; the other would show nothing of it either


def synthetic_statements(split: Split, products: int, image_size: int, seed: int = 0) -> PairDataset:
    """Six statements about two photos of each product that has two which differ in what they show: see `block`. The
    category of a row is its label, its sub-category the kind of attribute that it turns on."""
    photos = Synthetic(split, products, image_size, seed)
    rows_of = defaultdict(list)
    for row, (product, _) in enumerate(photos.rows):
        rows_of[product].append(row)
    found = []
    for product, rows in tqdm(rows_of.items(), "making statements", unit=" products", leave=False, disable=None):
        found += block(photos, rows, photos._rng(5, product))
    if not found:
        raise DataError(f"--num-products {products}: no two photos of a product differ in what they show; give more")
    source, texts, labels, kinds = map(list, zip(*found))
    shown = [photos.rows[photo][0] for photo in source]
    known = {"category": labels, "subcategory": kinds}
    dataset = PairDataset(texts, shown, photos.images, image_size, known, source=source)
    dataset.row_noun = "statements"
    return dataset


def block(photos: Synthetic, rows: list[int], rng: np.random.Generator) -> list[Statement]:
    """Of two photos, each of which shows something that the other does not: one statement each that it shows, one that
    it contradicts, and one that it cannot tell, which is what the other shows or contradicts.

    So no photo has more statements of one label than of another, and a true claim and its lie are each undecided half
    the time: neither photo nor statement alone tells the label.
    """
    product = photos.product(rows[0])
    for one, other in rng.permutation(list(combinations(rows, 2))).tolist():
        one_claim = _claim(photos, product, one, other, rng)
        other_claim = _claim(photos, product, other, one, rng)
        if one_claim and other_claim:
            extra = _extra(photos, product, one, other, rng)
            return _six(product, {one: one_claim, other: other_claim}, extra, rng)
    return []


def _six(
    product: Product, claims: dict[int, Claim], extra: tuple[str, Product] | None, rng: np.random.Generator
) -> list[Statement]:
    """The statements of a block; with something extra half of the blocks turn on that, in that it is wrong."""
    start = wrong_start = extra_kind = ""
    if extra:
        kind, sibling = extra
        start = f"{clause(product, kind)} and "
        wrong_start = f"{clause(sibling, kind)} and "
        if rng.random() < 0.5:
            extra_kind = kind
    statements = []
    for photo, elsewhere in zip(claims, reversed(claims)):
        mine, others = claims[photo], claims[elsewhere]
        wrong = wrong_start + mine.truth if extra_kind else start + mine.lie
        undecided = start + pick(rng, (others.truth, others.lie))
        statements.append(Statement(photo, start + mine.truth, "entailment", extra_kind or mine.kind))
        statements.append(Statement(photo, wrong, "contradiction", extra_kind or mine.kind))
        statements.append(Statement(photo, undecided, "neutral", extra_kind or others.kind))
    return statements


def _claim(photos: Synthetic, product: Product, photo: int, elsewhere: int, rng: np.random.Generator) -> Claim | None:
    """Something that a photo shows and the one elsewhere cannot tell, if there is such a thing."""
    shown, shown_elsewhere = photos.regions[photo], photos.regions[elsewhere]
    kinds = defaultdict(list)
    for kind, key, sibling in product.siblings():
        if kind not in ("garment", "colour", "pattern") and key in shown and key not in shown_elsewhere:
            kinds[kind].append((key, sibling))
    for kind in rng.permutation(sorted(kinds)).tolist():
        for number in rng.permutation(len(kinds[kind])).tolist():
            key, sibling = kinds[kind][number]
            added = sibling.details.keys() - product.details.keys()
            where = next(iter(added), key)  # other than key if the detail has moved
            # shown here as the truth is, or truths and lies would be of different kinds
            if where in photos.would_show(sibling, photo) and where not in photos.would_show(sibling, elsewhere):
                return Claim(kind, clause(product, key), clause(sibling, where))
    return None


def _extra(
    photos: Synthetic, product: Product, one: int, other: int, rng: np.random.Generator
) -> tuple[str, Product] | None:
    """For half of the products colour or pattern, which both photos show: the kind, and the product with another."""
    kinds = defaultdict(list)
    for kind, key, sibling in product.siblings():
        if kind in ("colour", "pattern") and key in photos.regions[one] and key in photos.regions[other]:
            kinds[kind].append(sibling)
    if not kinds or rng.random() < 0.5:
        return None
    kind = pick(rng, tuple(kinds))
    return kind, pick(rng, tuple(kinds[kind]))
