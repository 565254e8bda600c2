"""Pictures for looking rather than reading.

python study/figures.py sheet --data synthetic --file sheet.png      products with their photos and description
"""

import argparse
import sys
import textwrap
from pathlib import Path
from typing import get_args

import matplotlib

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
matplotlib.use("Agg")
import matplotlib.pyplot as plt

from data import DataError, DataName, PhotoDataset, build_dataset


def draw_sheet(dataset: PhotoDataset, products: int, path: Path, photos: int = 4) -> None:
    """A page of the first `products` products, one a row: up to `photos` photos, then the description."""
    products = min(products, int(dataset.product_ids.max()) + 1)
    figure, axes = plt.subplots(products, photos + 1, figsize=(1.5 * photos + 3.4, 1.55 * products), squeeze=False,
                                width_ratios=[1] * photos + [2.3], layout="constrained")  # fmt: skip
    for product, row_axes in enumerate(axes):
        rows = (dataset.product_ids == product).nonzero()[0]
        for axis in row_axes:
            axis.axis("off")
        for axis, row in zip(row_axes, rows[:photos].tolist(), strict=False):
            item = dataset[row]
            if isinstance(item, dict):
                axis.imshow(item["image"].permute(1, 2, 0))
        text = textwrap.fill(dataset.captions[rows[0]], 38)
        row_axes[-1].text(0, 0.5, text, va="center", fontsize=8, transform=row_axes[-1].transAxes)
    figure.savefig(path, dpi=70)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("figures.py", description=__doc__.split("\n")[0])
    parser.add_argument("figure", choices=["sheet"])
    parser.add_argument("--data", choices=get_args(DataName), default="synthetic")
    parser.add_argument("--root", help="folder of the data set")
    parser.add_argument("--split", choices=["train", "val"], default="train")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--products", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", type=Path, default=Path("sheet.png"))
    args = parser.parse_args(argv)
    if args.products < 1:
        parser.error("--products: at least 1")
    try:
        dataset = build_dataset(args.data, args.root, args.split, args.image_size, args.seed, args.products)
        draw_sheet(dataset, args.products, args.file)
    except (DataError, OSError) as error:
        sys.exit(f"figures.py: {error}")
    print(args.file)


if __name__ == "__main__":
    main()
