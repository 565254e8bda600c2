"""What text-guided retrieval needs: a reference photo, a text that says what differs, the target photo."""

import numpy as np

from readers.dataset import PhotoDataset, Unreadable, numbered


class Triplets(PhotoDataset):
    """Reference photo + text about what differs → target photo, for text-guided retrieval. A row is a triplet.

    photos: all photos there are · references, targets (T,): rows of these; targets −1 where they are not published
    captions: the texts · product_ids: the targets · families (T,): triplets that may share photos
    subsets: what figures are averaged over, such as FashionIQ's dress, shirt, toptee
    galleries: by subset and protocol, rows of the photos to search among: `original`, all photos of the subset's split;
    `union`, those that occur in its pairs, where targets are known
    """

    what = "triplets"

    def __init__(
        self,
        photos: PhotoDataset,
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
        self.photos, self.subsets, self.families = photos, subsets, numbered(families)
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

    def part(self, rows: np.ndarray) -> "Triplets":
        """Some of the triplets, over the same photos; their gallery is the union of their pairs."""
        part = Triplets(
            self.photos,
            self.references[rows].tolist(),
            self.targets[rows].tolist(),
            [self.captions[row] for row in rows],
            [self.subsets[row] for row in rows],
            self.families[rows].tolist(),
        )
        part.lead = self.lead
        return part

    def queries(self) -> PhotoDataset:
        """The reference photos with the texts, without the targets."""
        return super().part(np.arange(len(self)))

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
