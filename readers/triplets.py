"""What text-guided retrieval needs: a reference photo, a text that says what differs, the target photo."""

import numpy as np
from PIL import Image

from readers.dataset import PhotoDataset, Unreadable, numbered

Galleries = dict[str, dict[str, np.ndarray]]  # subset -> protocol -> rows of the photos to search among


class Triplets(PhotoDataset):
    """Reference photo + text about what differs → target photo, for text-guided retrieval. A row is a triplet.

    photos: all photos there are · references, targets (T,): rows of these; targets −1 where they are not published
    captions: the texts · product_ids: the targets · families (T,): triplets that may share photos
    subsets: what figures are averaged over, such as FashionIQ's dress, shirt, toptee
    galleries: for each subset the candidates, by protocol: `original`, all photos of its split; `union`, those that
    occur in its pairs, where targets are known
    """

    def __init__(
        self, photos: PhotoDataset, references: list[int], targets: list[int], texts: list[str], subsets: list[str],
        families: list, originals: dict[str, list[int]] | None = None, lead: str = "",
    ):  # fmt: skip
        super().__init__(texts, list(targets), subsets, subsets, photos.image_size)
        self.photos, self.subsets, self.families, self.lead = photos, subsets, numbered(families), lead
        self.references, self.targets = np.array(references, np.int64), np.array(targets, np.int64)
        self.caption_ids = np.arange(len(texts))  # the same text about other references is another query
        self.galleries: Galleries = {}
        for subset in dict.fromkeys(subsets):
            rows = np.array([named == subset for named in subsets])
            self.galleries[subset] = {}
            if (self.targets[rows] >= 0).all():  # otherwise the union would be of references alone
                self.galleries[subset]["union"] = np.unique([self.references[rows], self.targets[rows]])
            if originals:
                self.galleries[subset]["original"] = np.array(originals[subset], np.int64)

    def part(self, rows: np.ndarray) -> "Triplets":
        """Some of the triplets, over the same photos; their gallery is the union of their pairs."""
        texts, subsets = [self.captions[row] for row in rows], [self.subsets[row] for row in rows]
        references, targets, families = self.references[rows], self.targets[rows], self.families[rows].tolist()
        return Triplets(self.photos, references, targets, texts, subsets, families, lead=self.lead)

    def queries(self) -> PhotoDataset:
        """The reference photos with the texts, without the targets."""
        queries = self.photos.part(self.references)
        queries.captions, queries.lead = self.captions, self.lead
        return queries

    def photo(self, row: int) -> Image.Image:
        """The reference photo of a triplet."""
        return self.photos.photo(self.references[row])

    def __getitem__(self, row: int) -> dict | Unreadable:
        item, target = super().__getitem__(row), int(self.targets[row])
        if target < 0 or isinstance(item, Unreadable):
            return item
        shown = self.photos[target]
        return shown if isinstance(shown, Unreadable) else item | {"target_image": shown["image"]}

    def name_of(self, row: int) -> str:
        return self.photos.name_of(int(self.references[row]))

    def report(self) -> str:
        """One line for the user: triplets, sizes of the galleries, what was left out and why."""
        line = f"{len(self):,} triplets"
        for subset, galleries in self.galleries.items():
            sizes = ", ".join(f"{name} {len(rows):,}" for name, rows in galleries.items())
            line += f"; {subset}: {self.subsets.count(subset):,} (photos to search: {sizes})"
        return line + self._left_out()
