"""Text-guided retrieval: a reference photo, a text that says what differs, the target photo. Drawn, or FashionIQ's."""

from pathlib import Path

import numpy as np
from numpy.random import Generator

from readers.dataset import DataError, PairDataset, ReportedSplit, Split, Unreadable, factorize
from readers.files import ImageFiles, read_json
from readers.synthetic import Synthetic
from readers.wardrobe import Detail, Product, draw_family, pick, pick_sibling


class Triplets(PairDataset):
    """Reference photo + text about what differs → target photo. A row is a triplet.

    photos: all photos there are · references, targets (T,): rows of these; targets −1 where they are not published
    captions: the texts · product_ids: the targets · families (T,): triplets that may share photos
    subsets: what metrics are averaged over, such as FashionIQ's dress, shirt, toptee
    galleries: by subset and protocol, rows of the photos to search among: `original`, all photos of the subset's split;
    `union`, those that occur in its pairs, where targets are known
    """

    row_noun = "triplets"

    def __init__(
        self,
        photos: PairDataset,
        references: list[int],
        targets: list[int],
        texts: list[str],
        subsets: list[str],
        families: list,
        originals: dict[str, list[int]] | None = None,
    ):
        source = [photos.source[row] for row in references]
        super().__init__(texts, targets, photos.images, photos.image_size, names=photos.names, source=source)
        self.caption_ids = np.arange(len(texts))  # the same text about other references is another query
        self.photos = photos
        self.subsets = subsets
        self.families = factorize(families)
        self.references = np.array(references, np.int64)
        self.targets = np.array(targets, np.int64)
        self.galleries: dict[str, dict[str, np.ndarray]] = {}
        for subset in dict.fromkeys(subsets):
            rows = np.array([name == subset for name in subsets])
            galleries = {}
            if (self.targets[rows] >= 0).all():  # otherwise the union would be of references alone
                galleries["union"] = np.unique([self.references[rows], self.targets[rows]])
            if originals:
                galleries["original"] = np.array(originals[subset], np.int64)
            self.galleries[subset] = galleries

    def subset(self, rows: np.ndarray) -> "Triplets":
        """Some of the triplets, over the same photos; their gallery is the union of their pairs."""
        part = Triplets(
            self.photos,
            self.references[rows].tolist(),
            self.targets[rows].tolist(),
            [self.captions[row] for row in rows],
            [self.subsets[row] for row in rows],
            self.families[rows].tolist(),
        )
        part.caption_prefix = self.caption_prefix
        return part

    def queries(self) -> PairDataset:
        """The reference photos with the texts, without the targets."""
        return super().subset(np.arange(len(self)))

    def __getitem__(self, row: int) -> dict | Unreadable:
        item = super().__getitem__(row)
        target = int(self.targets[row])
        if target < 0 or isinstance(item, Unreadable):
            return item
        shown = self.photos[target]
        if isinstance(shown, Unreadable):
            return shown
        return item | {"target_image": shown["image"]}

    def report(self) -> str:
        """One line for the user: triplets, sizes of the galleries, what was left out and why."""
        line = f"{len(self):,} triplets"
        for subset, galleries in self.galleries.items():
            sizes = ", ".join(f"{name} {len(rows):,}" for name, rows in galleries.items())
            line += f"; {subset}: {self.subsets.count(subset):,} (photos to search: {sizes})"
        return line + self.left_out()


def fashioniq(folder: Path, split: ReportedSplit, image_size: int) -> Triplets:
    """FashionIQ (Wu et al. 2021) as distributed: `captions/cap.{dress,shirt,toptee}.{split}.json`,
    `image_splits/split.….json`, `images/{id}.jpg` or `.png`.

    Both captions of a pair are joined by "and" (choice: in their order). Photos that are not there are reported, with
    the queries that need them. The test split has no targets.
    """
    pairs, listed = [], {}
    for subset in ("dress", "shirt", "toptee"):
        path = folder / "captions" / f"cap.{subset}.{split}.json"
        try:
            for pair in read_json(path):
                texts = [text.strip() for text in pair["captions"]]
                target = None if split == "test" else pair["target"]
                pairs.append((subset, pair["candidate"], target, " and ".join(text for text in texts if text)))
        except (AttributeError, KeyError, TypeError):
            raise DataError(f"{path}: expected a list of pairs with candidate, target and captions") from None
        listed[subset] = read_json(folder / "image_splits" / f"split.{subset}.{split}.json")

    files = {path.stem: path for path in (folder / "images").glob("*") if path.suffix in (".jpg", ".png")}
    wanted = list(dict.fromkeys(name for names in listed.values() for name in names))
    found = [name for name in wanted if name in files]
    images = ImageFiles([files[name] for name in found], image_size)
    photos = PairDataset([""] * len(found), found, images, image_size, names=found)

    row_of = {name: row for row, name in enumerate(found)}
    row_of[None] = -1  # of a target that is not published
    kept = [pair for pair in pairs if pair[1] in row_of and pair[2] in row_of]
    if not kept:
        raise DataError(f"{folder}/images: no photos of any {split} pair; expected {wanted[0]}.jpg or .png, …")
    references = [row_of[candidate] for _, candidate, _, _ in kept]
    triplets = Triplets(
        photos,
        references,
        targets=[row_of[target] for _, _, target, _ in kept],
        texts=[text for _, _, _, text in kept],
        subsets=[subset for subset, _, _, _ in kept],
        families=references,
        originals={subset: [row_of[name] for name in names if name in row_of] for subset, names in listed.items()},
    )
    triplets.problems = [f"no photo {name}" for name in wanted if name not in files]
    if len(kept) < len(pairs):
        triplets.dropped = [f"{len(pairs) - len(kept):,} pairs of photos that are not there"]
    return triplets


FAMILY = 5  # a product, three that differ from it in one or two attributes, and one that is unrelated


def synthetic_triplets(split: Split, products: int, image_size: int, seed: int = 0) -> Triplets:
    """From the first product of each family to its variants and back."""
    photos = SyntheticFamilies(split, products, image_size, seed)
    references, targets, texts = [], [], []
    for first in range(0, products - FAMILY + 1, FAMILY):
        for sibling in range(first + 1, first + FAMILY - 1):
            references += [first, sibling]
            targets += [sibling, first]
    if not references:
        raise DataError(f"--num-products {products}: no whole family of {FAMILY} products; give more")
    for number, (a, b) in enumerate(zip(references, targets)):
        texts.append(difference(photos.products[a], photos.products[b], photos._rng(4, number)))
    subsets = ["synthetic"] * len(texts)
    families = [photo // FAMILY for photo in references]
    return Triplets(photos, references, targets, texts, subsets, families, {"synthetic": list(range(products))})


class SyntheticFamilies(Synthetic):
    """Fronts alone, of products that come in families of FAMILY; a family belongs to one split."""

    def _family(self, first: int) -> list[Product]:
        rng = self._rng(3, first)
        stranger = draw_family(rng, self._owns)[0]
        family = draw_family(rng, self._owns)[:1]
        while len(family) < FAMILY - 1:
            product = family[0]
            for _ in range(rng.integers(1, 3)):  # in how many things that the front shows it differs
                siblings = list(product.siblings())
                shown = [(kind, other) for kind, key, other in siblings if kind != "garment" and key != "back"]
                product = pick_sibling(rng, shown)
            known = [member.attributes() for member in family]
            if self._owns(product) and product.attributes() not in known:
                family.append(product)
        return [*family, stranger]

    def _views(self, index: int) -> list[str]:
        return ["front"]


def clause(product: Product, key: str) -> str:
    """What one attribute of a product is: "is red", "has long sleeves", "has dark stripes at chest"."""
    value = product.attributes()[key]
    if isinstance(value, Detail):
        return f"has {value.look} {value.noun} at {key}"
    if key == "colour" or value == "sleeveless":
        return f"is {value}"
    nouns = {"pattern": "pattern", "sleeve": "sleeves", "neck": "neckline", "closure": "front"}
    return f"has {value} {nouns[key]}"


def difference(product: Product, other: Product, rng: Generator) -> str:
    """What to say to get from one product of a family to another: "is red instead of grey and has long sleeves"."""
    before = product.attributes()
    after = other.attributes()
    clauses = []
    if other.colour != product.colour:
        new = clause(other, "colour")
        clauses.append(pick(rng, (f"{new} instead of {product.colour}", new)))
    for key in ("pattern", "sleeve", "neck", "closure", *sorted(product.details.keys() | other.details.keys())):
        if before.get(key) == after.get(key):
            continue
        if key in after:
            clauses.append(clause(other, key))
        else:  # a detail that has moved
            clauses.append(clause(product, key).replace("has", "has no", 1))
    return " and ".join(rng.permutation(clauses).tolist())
