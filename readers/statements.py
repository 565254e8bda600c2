"""Visual entailment: statements about images, true, false, or undecided by the image. Synthetic, or SNLI-VE."""

from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from readers.dataset import DataError, PairDataset, ReportedSplit, Split, clean_text
from readers.files import ImageFiles, image_key, list_images, read_json_lines
from readers.synthetic import Synthetic
from readers.triplets import attribute_clause
from readers.wardrobe import pick

LABELS = ("entailment", "neutral", "contradiction")


def snlive(folder: Path, split: ReportedSplit, image_size: int) -> PairDataset:
    """Open SNLI-VE (Xie et al. 2019) as distributed. A row is a statement; its category is its label.

    Files: `snli_ve_{train,dev,test}.jsonl`, of whose lines `Flickr30K_ID`, `sentence2` and `gold_label` are read, and
    `images/{Flickr30K_ID}.jpg`, or another image file that `list_images` finds.
    Statements without a gold label (`-`), without words or without their image are left out and counted.

    Raises OSError where the file cannot be read, DataError where it is malformed or has no usable statement.
    """
    statements = []
    labels = []
    image_index = []  # of each statement
    index_of = {}  # name of an image -> its index in `paths`
    paths = []
    missing = {}  # name of an image -> problem
    left_out = Counter()
    file_split = "dev" if split == "val" else split
    files = list_images(folder / "images")
    for location, record in read_json_lines(folder / f"snli_ve_{file_split}.jsonl"):
        try:
            image = image_key(record["Flickr30K_ID"])
            statement = clean_text(record["sentence2"])
            label = record["gold_label"]
        except (KeyError, TypeError):
            fields = "Flickr30K_ID, sentence2 and gold_label"
            raise DataError(f"{location}: expected {fields}; correct the line or delete it") from None
        if image not in index_of and image not in missing:
            if image in files:
                index_of[image] = len(paths)
                paths.append(files[image])
            else:
                missing[image] = f"image {image}.jpg is missing"
        if label not in LABELS:
            left_out["without a gold label"] += 1
        elif not statement:
            left_out["without words"] += 1
        elif image in missing:
            left_out["without their image"] += 1
        else:
            statements.append(statement)
            labels.append(label)
            image_index.append(index_of[image])
    if not statements:
        reason = "; ".join(list(missing.values())[:3]) or "the file has none with a gold label"
        raise DataError(f"{folder}: no usable statement of the {split} split; {reason}")
    dataset = PairDataset(
        statements,
        products=image_index,
        images=ImageFiles(paths, image_size),
        image_size=image_size,
        attributes={"category": labels},
        image_names=list(index_of),
        image_index=image_index,
    )
    dataset.row_noun = "statements"
    dataset.product_noun = "images"
    dataset.problems = list(missing.values())
    dataset.notes = [f"statements {reason}: {count:,}" for reason, count in left_out.items()]
    return dataset


class Statement(NamedTuple):
    """A statement about an image."""

    image: int  # row of the image
    caption: str
    label: str  # one of LABELS
    kind: str  # of the attribute that decides the label


class Claim(NamedTuple):
    """An attribute that an image shows, as a true clause and as one that the image contradicts."""

    kind: str  # of the attribute
    true_clause: str
    false_clause: str


def synthetic_statements(split: Split, products: int, image_size: int, seed: int = 0) -> PairDataset:
    """Draw statements about synthetic images: six for each product that has a suitable pair, see `draw_statements`.

    A row is a statement. Its category is its label, its sub-category the kind of attribute that decides the label.
    Raises DataError where no product has such a pair.
    """
    images = Synthetic(split, products, image_size, seed)
    rows_of = defaultdict(list)  # product -> rows
    for row, product in enumerate(images.product_ids.tolist()):
        rows_of[product].append(row)
    statements = []
    for product, rows in tqdm(rows_of.items(), "making statements", unit=" products", leave=False, disable=None):
        statements += draw_statements(images, rows, images.rng(5, product))
    if not statements:
        raise DataError(f"--num-products {products}: no two images of a product differ in what they show; give more")
    labels = [statement.label for statement in statements]
    kinds = [statement.kind for statement in statements]
    dataset = PairDataset(
        [statement.caption for statement in statements],
        products=[int(images.product_ids[statement.image]) for statement in statements],
        images=images.images,
        image_size=image_size,
        attributes={"category": labels, "subcategory": kinds},
        image_index=[statement.image for statement in statements],
    )
    dataset.row_noun = "statements"
    return dataset


def draw_statements(images: Synthetic, rows: list[int], rng: np.random.Generator) -> list[Statement]:
    """Draw six statements about two images of a product, each of which shows an attribute that the other does not.

    Each image gets one statement of each label; the neutral one is about the attribute that only the other shows.
    So each image has every label equally often, and so has each attribute. Neither the image alone nor the statement
    alone predicts the label.

    rows: the images of the product -> no statements where no two images suit
    """
    pairs = list(combinations(rows, 2))
    for first, second in rng.permutation(pairs).tolist():
        first_claim = _draw_claim(images, first, second, rng)
        second_claim = _draw_claim(images, second, first, rng)
        if first_claim and second_claim:
            shared = _draw_shared_claim(images, first, second, rng)
            shared_decides = shared is not None and rng.random() < 0.5
            return [
                *_statements_of_image(first, first_claim, second_claim, shared, shared_decides, rng),
                *_statements_of_image(second, second_claim, first_claim, shared, shared_decides, rng),
            ]
    return []


def _statements_of_image(
    image: int,
    own: Claim,
    other: Claim,
    shared: Claim | None,
    shared_decides: bool,
    rng: np.random.Generator,
) -> list[Statement]:
    """Make a statement of each label about an image.

    own, other: claims about what this image shows, and about what only the other one shows
    shared: a claim about what both images show, in front of every statement
    shared_decides: the contradiction has its false value in the shared claim, otherwise in the own claim
    """
    prefix = f"{shared.true_clause} and " if shared else ""
    entailed = prefix + own.true_clause
    contradicted = prefix + own.false_clause
    neutral = prefix + pick(rng, (other.true_clause, other.false_clause))
    own_kind = own.kind
    other_kind = other.kind
    if shared_decides:
        contradicted = f"{shared.false_clause} and {own.true_clause}"
        own_kind = shared.kind
        other_kind = shared.kind
    return [
        Statement(image, entailed, "entailment", own_kind),
        Statement(image, contradicted, "contradiction", own_kind),
        Statement(image, neutral, "neutral", other_kind),
    ]


def _draw_claim(images: Synthetic, image: int, other_image: int, rng: np.random.Generator) -> Claim | None:
    """Draw a claim about an attribute that one image of a product shows and another does not, if there is one."""
    product = images.product(image)
    siblings_by_kind = defaultdict(list)
    for sibling in product.siblings():
        if sibling.kind in ("garment", "colour", "pattern"):  # not specific to one image
            continue
        if sibling.key in images.regions[image] and sibling.key not in images.regions[other_image]:
            siblings_by_kind[sibling.kind].append(sibling)
    for kind in rng.permutation(sorted(siblings_by_kind)).tolist():
        siblings = siblings_by_kind[kind]
        for number in rng.permutation(len(siblings)).tolist():
            sibling = siblings[number]
            new_places = sibling.product.details.keys() - product.details.keys()
            false_key = next(iter(new_places), sibling.key)  # a detail that has moved has another key
            # The false value must be visible where the true one is, in this image alone. Otherwise the clauses of true
            # and false claims would differ in what they are about.
            in_image = false_key in images.visible_attributes(sibling.product, image)
            in_other_image = false_key in images.visible_attributes(sibling.product, other_image)
            if in_image and not in_other_image:
                true_clause = attribute_clause(product, sibling.key)
                return Claim(kind, true_clause, attribute_clause(sibling.product, false_key))
    return None


def _draw_shared_claim(images: Synthetic, first: int, second: int, rng: np.random.Generator) -> Claim | None:
    """Draw, for half of the products, a claim about colour or pattern, where both images show it."""
    product = images.product(first)
    siblings_by_kind = defaultdict(list)
    for sibling in product.siblings():
        if sibling.kind not in ("colour", "pattern"):
            continue
        if sibling.key in images.regions[first] and sibling.key in images.regions[second]:
            siblings_by_kind[sibling.kind].append(sibling)
    if not siblings_by_kind or rng.random() < 0.5:
        return None
    kind = pick(rng, siblings_by_kind)
    sibling = pick(rng, siblings_by_kind[kind])
    return Claim(kind, attribute_clause(product, kind), attribute_clause(sibling.product, kind))
