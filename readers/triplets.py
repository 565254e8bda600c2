"""Text-guided retrieval: a reference image, a text about the difference, a target image. Synthetic, or FashionIQ's."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from readers.dataset import DataError, PairDataset, ReportedSplit, Split, Unreadable, clean_text, factorize
from readers.files import ImageFiles, image_key, list_images, read_json
from readers.synthetic import Synthetic
from readers.wardrobe import Detail, Product, draw_family, pick, pick_sibling


class Triplets(PairDataset):
    """Triplets of a reference image, a text about the difference, and a target image. A row is a triplet.

    Letters: T triplets.
    image_set: a data set whose rows are all images, references and targets alike
    references, targets: int64 (T,), rows of `image_set`; a target that is not published is −1
    captions: the texts · product_ids: equal where the targets are
    families: int64 (T,), held out together: equal references (FashionIQ), or equal families of synthetic products
    subsets: the subset of each triplet, such as FashionIQ's dress, shirt and toptee; metrics are averaged over subsets
    galleries: subset -> protocol -> rows of the images to search: "original", all images of the split; "union", the
    images that occur in the subset's triplets, where targets are published
    """

    row_noun = "triplets"

    def __init__(
        self,
        image_set: PairDataset,
        references: list[int],
        targets: list[int],
        texts: list[str],
        subsets: list[str],
        families: list,
        original_galleries: dict[str, list[int]] | None = None,
    ):
        super().__init__(
            texts,
            products=targets,
            images=image_set.images,
            image_size=image_set.image_size,
            image_names=image_set.image_names,
            image_index=[image_set.image_index[row] for row in references],
        )
        self.caption_ids = np.arange(len(texts))  # with another reference an equal text is another query
        self.image_set = image_set
        self.subsets = subsets
        self.families = factorize(families)
        self.references = np.array(references, np.int64)
        self.targets = np.array(targets, np.int64)
        self.galleries: dict[str, dict[str, np.ndarray]] = {}
        for subset in dict.fromkeys(subsets):
            in_subset = np.array([name == subset for name in subsets])
            galleries = {}
            if (self.targets[in_subset] >= 0).all():
                galleries["union"] = np.unique([self.references[in_subset], self.targets[in_subset]])
            if original_galleries:
                galleries["original"] = np.array(original_galleries[subset], np.int64)
            self.galleries[subset] = galleries

    def subset(self, rows: np.ndarray) -> "Triplets":
        """Return some triplets (n,) over the same images. Their gallery is the union of their images."""
        subset = Triplets(
            self.image_set,
            self.references[rows].tolist(),
            self.targets[rows].tolist(),
            [self.captions[row] for row in rows],
            [self.subsets[row] for row in rows],
            self.families[rows].tolist(),
        )
        subset.caption_prefix = self.caption_prefix
        return subset

    def queries(self) -> PairDataset:
        """Return the reference images with the texts, without the targets."""
        return super().subset(np.arange(len(self)))

    def __getitem__(self, row: int) -> dict | Unreadable:
        """Return the item of a row as `PairDataset` does, with target_image uint8 (3, S, S) where it is published."""
        item = super().__getitem__(row)
        target = int(self.targets[row])
        if target < 0 or isinstance(item, Unreadable):
            return item
        target_item = self.image_set[target]
        if isinstance(target_item, Unreadable):
            return target_item
        return item | {"target_image": target_item["image"]}

    def report(self) -> str:
        """Return one line for the user: numbers of triplets, sizes of the galleries, what was left out."""
        line = f"{len(self):,} triplets"
        for subset, galleries in self.galleries.items():
            sizes = ", ".join(f"{name} {len(rows):,}" for name, rows in galleries.items())
            line += f"; {subset}: {self.subsets.count(subset):,} (images to search: {sizes})"
        return line + self.left_out_note()


class _Query(NamedTuple):
    """A pair of images of FashionIQ, by their names, with the text about their difference."""

    subset: str
    reference: str
    target: str | None  # None: not published
    text: str


def fashioniq(folder: Path, split: ReportedSplit, image_size: int) -> Triplets:
    """Open FashionIQ (Wu et al. 2021) as distributed. The test split has no targets.

    Files: `captions/cap.{dress,shirt,toptee}.{split}.json`, `image_splits/split.{dress,shirt,toptee}.{split}.json`,
    `images/{id}.jpg`, or another image file that `list_images` finds. Our choice: both captions of a pair are joined by
    "and", in their order.

    Images that are missing are left out and reported, pairs without their images or without a caption are counted.
    Raises OSError where a file cannot be read, DataError where it is malformed, no pair has its images, or all
    captions are empty.
    """
    queries: list[_Query] = []
    split_names = {}  # subset -> names of all images of the split
    for subset in ("dress", "shirt", "toptee"):
        queries += _read_queries(folder / "captions" / f"cap.{subset}.{split}.json", subset, split)
        split_names[subset] = _read_names(folder / "image_splits" / f"split.{subset}.{split}.json")

    files = list_images(folder / "images")
    all_names = list(dict.fromkeys(name for names in split_names.values() for name in names))
    present_names = [name for name in all_names if name in files]
    image_set = PairDataset(
        [""] * len(present_names),
        products=present_names,
        images=ImageFiles([files[name] for name in present_names], image_size),
        image_size=image_size,
        image_names=present_names,
    )

    row_of = {name: row for row, name in enumerate(present_names)}
    row_of[None] = -1  # a target that is not published
    with_images = [query for query in queries if query.reference in row_of and query.target in row_of]
    usable = [query for query in with_images if query.text]
    if not usable:
        if with_images:
            raise DataError(f"{folder}/captions: all {split} captions are empty; give the files as distributed")
        files_needed = f"{all_names[0] if all_names else 'ID'}.jpg or .png and the others"
        raise DataError(f"{folder}/images: no {split} pair has both of its images; put {files_needed} there")
    original_galleries = {}
    for subset, names in split_names.items():
        original_galleries[subset] = [row_of[name] for name in names if name in row_of]
    references = [row_of[query.reference] for query in usable]
    triplets = Triplets(
        image_set,
        references,
        targets=[row_of[query.target] for query in usable],
        texts=[query.text for query in usable],
        subsets=[query.subset for query in usable],
        families=references,
        original_galleries=original_galleries,
    )
    triplets.problems = [f"image {name} is missing" for name in all_names if name not in files]
    if len(with_images) < len(queries):
        triplets.notes.append(f"pairs without their images: {len(queries) - len(with_images):,}")
    if len(usable) < len(with_images):
        triplets.notes.append(f"pairs without a caption: {len(with_images) - len(usable):,}")
    return triplets


def _read_names(path: Path) -> list[str]:
    """Read the names of the images of a split. Raises as `fashioniq`."""
    try:
        return [image_key(name) for name in read_json(path)]
    except TypeError:
        raise DataError(f"{path}: expected a list of names of images; give the file as distributed") from None


def _read_queries(path: Path, subset: str, split: ReportedSplit) -> list[_Query]:
    queries = []
    try:
        for pair in read_json(path):
            captions = pair["captions"]
            texts = [clean_text(caption) for caption in ([captions] if isinstance(captions, str) else captions)]
            text = " and ".join(text for text in texts if text)
            target = None if split == "test" else image_key(pair["target"])
            queries.append(_Query(subset, image_key(pair["candidate"]), target, text))
    except (KeyError, TypeError):
        fields = "candidate, target and captions"
        raise DataError(f"{path}: expected a list of pairs with {fields}; give the file as distributed") from None
    return queries


FAMILY_SIZE = 5  # a product, three siblings that differ from it in one or two attributes, and an unrelated product


def synthetic_triplets(split: Split, products: int, image_size: int, seed: int = 0) -> Triplets:
    """Draw triplets from the first product of each family to its siblings, and back.

    products: number of products; a product has one image, its front
    Raises DataError where they are too few for a family.
    """
    image_set = SyntheticFamilies(split, products, image_size, seed)
    references = []
    targets = []
    for first in range(0, products - FAMILY_SIZE + 1, FAMILY_SIZE):
        for sibling in range(first + 1, first + FAMILY_SIZE - 1):
            references += [first, sibling]
            targets += [sibling, first]
    if not references:
        raise DataError(f"--num-products {products}: a family of triplets has {FAMILY_SIZE} products; give more")
    texts = []
    for number, (reference, target) in enumerate(zip(references, targets)):
        rng = image_set.rng(4, number)
        texts.append(describe_difference(image_set.products[reference], image_set.products[target], rng))
    return Triplets(
        image_set,
        references,
        targets,
        texts,
        subsets=["synthetic"] * len(texts),
        families=[reference // FAMILY_SIZE for reference in references],
        original_galleries={"synthetic": list(range(products))},
    )


class SyntheticFamilies(Synthetic):
    """Synthetic products that are seen from the front alone, in families of FAMILY_SIZE; a family is in one split."""

    def _draw_family(self, first: int) -> list[Product]:
        rng = self.rng(3, first)
        unrelated = draw_family(rng, self._in_split)[0]
        family = draw_family(rng, self._in_split)[:1]
        while len(family) < FAMILY_SIZE - 1:
            product = family[0]
            for _ in range(rng.integers(1, 3)):  # attributes to change
                siblings = []
                for sibling in product.siblings():
                    if sibling.kind != "garment" and sibling.key != "back":  # the front does not show the back
                        siblings.append(sibling)
                product = pick_sibling(rng, siblings)
            is_new = product.attributes() not in [member.attributes() for member in family]
            if is_new and self._in_split(product):
                family.append(product)
        return [*family, unrelated]

    def _draw_views(self, index: int) -> list[str]:
        return ["front"]


def attribute_clause(product: Product, key: str) -> str:
    """Compose a clause about one attribute: "is red", "has long sleeves", "has dark stripes at chest"."""
    value = product.attributes()[key]
    if isinstance(value, Detail):
        return f"has {value.look} {value.noun} at {key}"
    if key == "colour" or value == "sleeveless":
        return f"is {value}"
    nouns = {"pattern": "pattern", "sleeve": "sleeves", "neck": "neckline", "closure": "front"}
    return f"has {value} {nouns[key]}"


def describe_difference(reference: Product, target: Product, rng: Generator) -> str:
    """Compose a text about the difference of a target: "is red instead of grey and has long sleeves"."""
    before = reference.attributes()
    after = target.attributes()
    clauses = []
    if target.colour != reference.colour:
        new_colour = attribute_clause(target, "colour")
        clauses.append(pick(rng, (f"{new_colour} instead of {reference.colour}", new_colour)))
    places = sorted(reference.details.keys() | target.details.keys())
    for key in ("pattern", "sleeve", "neck", "closure", *places):
        if before.get(key) == after.get(key):
            continue
        if key in after:
            clauses.append(attribute_clause(target, key))
        else:  # a detail that has moved
            clauses.append(attribute_clause(reference, key).replace("has", "has no", 1))
    return " and ".join(rng.permutation(clauses).tolist())
