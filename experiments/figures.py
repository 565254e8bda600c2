"""Pictures for looking rather than reading.

python experiments/figures.py sheet --data synthetic --file sheet.png      products with their photos and description
python experiments/figures.py masks --checkpoint runs/…/last.pt        what a trained model would mask, random beside
                                                                     synchronized; --rows chooses the photos
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

from data import DataName, build_dataset
from engine.checkpoints import config_from_dict, fill, load_checkpoint, read_tokenizer
from engine.flags import ConfigError, check_device
from engine.run import Run, build_run
from evaluation.pictures import draw_masks, first_photos
from readers.dataset import DataError, PhotoDataset
from readers.prompts import DESCRIPTION


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
                axis.imshow(item["image"].permute(1, 2, 0).numpy())
        text = textwrap.fill(dataset.captions[rows[0]], 38)
        row_axes[-1].text(0, 0.5, text, va="center", fontsize=8, transform=row_axes[-1].transAxes)
    figure.savefig(path, dpi=70)
    plt.close(figure)


def open_run(checkpoint: Path, root: str | None, device: str) -> tuple[Run, PhotoDataset]:
    """A trained run with its validation photos; `root` only where the files have moved. Raises ConfigError."""
    check_device(device)
    state = load_checkpoint(checkpoint)
    config = config_from_dict(state["config"] | {"device": device, "compile": False, "resume": True})
    dataset = build_dataset(config.data, root or config.root, "val", config.model.image_size, config.seed)
    dataset.lead = DESCRIPTION if config.prompts else ""
    run = build_run(config, dataset, read_tokenizer(state, checkpoint))
    fill(run, state, checkpoint)
    run.telling, run.step = tuple(state["telling"]), state["step"]
    return run, dataset


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        "figures.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figure", choices=["sheet", "masks"])
    parser.add_argument("--root", help="folder of the data set")
    parser.add_argument("--file", type=Path, help="picture to write (default the figure's name, .png)")
    sheet = parser.add_argument_group("sheet")
    sheet.add_argument("--data", choices=get_args(DataName), default="synthetic")
    sheet.add_argument("--split", choices=["train", "val"], default="train")
    sheet.add_argument("--image-size", type=int, default=128)
    sheet.add_argument("--products", type=int, default=6)
    sheet.add_argument("--seed", type=int, default=0)
    trained = parser.add_argument_group("masks")
    trained.add_argument("--checkpoint", type=Path, help="last.pt of a run")
    trained.add_argument("--rows", type=int, nargs="+", help="validation photos (default: of the first six products)")
    trained.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    args.file = args.file or Path(f"{args.figure}.png")
    if args.products < 1 or args.image_size < 1:
        parser.error("--products and --image-size: at least 1")
    if args.figure != "sheet" and not args.checkpoint:
        parser.error(f"{args.figure} needs --checkpoint")
    try:
        if args.figure == "sheet":
            dataset = build_dataset(args.data, args.root, args.split, args.image_size, args.seed, args.products)
            draw_sheet(dataset, args.products, args.file)
        else:
            run, dataset = open_run(args.checkpoint, args.root, args.device)
            rows = args.rows or first_photos(dataset, 6)
            if not 0 <= min(rows) <= max(rows) < len(dataset):
                raise ConfigError(f"--rows: the validation split has photos 0 to {len(dataset) - 1}")
            draw_masks(run, dataset, rows, args.file)
    except (ConfigError, DataError, OSError) as error:
        sys.exit(f"figures.py: {error}")
    print(args.file)


if __name__ == "__main__":
    main()
