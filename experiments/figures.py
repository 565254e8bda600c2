"""Pictures of a data set, of the masks of a trained model, and of the metrics of several runs.

python experiments/figures.py sheet --data synthetic               products with their images and caption
python experiments/figures.py masks --checkpoint runs/…/last.pt    random, synchronized and soft masks of a model
python experiments/figures.py curves --runs runs/A runs/B          held-out metrics of several runs over the steps
"""

import math
import sys
import textwrap
from pathlib import Path
from typing import get_args

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import DataName, build_dataset
from engine.checkpoints import config_from_dict, load_checkpoint, read_tokenizer
from engine.flags import ConfigError, OneLineParser, in_one_line
from engine.log import read_metrics
from engine.run import Run, build_run
from evaluation.pictures import draw_masks, first_images
from evaluation.validation import METRIC_TITLES, unit_of
from readers.dataset import DataError, PairDataset
from readers.prompts import CAPTION_PREFIX

COMPARED = ("image_gain_fine", "image_gain_coarse", "val_image_gain", "val_i2t_r1", "val_t2i_r1")


def draw_sheet(dataset: PairDataset, products: int, path: Path) -> None:
    """Draw a sheet of the first products, one a line: up to four images, then the caption."""
    products = min(products, int(dataset.product_ids.max()) + 1)
    figure = Figure(figsize=(9.4, 1.55 * products), layout="constrained")
    axes = figure.subplots(products, 5, squeeze=False, width_ratios=[1, 1, 1, 1, 2.3])
    for product, row_axes in enumerate(axes):
        rows = (dataset.product_ids == product).nonzero()[0][:4]
        for axis in row_axes:
            axis.axis("off")
        for axis, row in zip(row_axes, rows, strict=False):
            axis.imshow(dataset.image(row))
        caption = textwrap.fill(dataset.captions[rows[0]], 38)
        row_axes[-1].text(0, 0.5, caption, va="center", fontsize=8, transform=row_axes[-1].transAxes)
    figure.savefig(path, dpi=70)


def draw_comparison(runs: list[Path], path: Path) -> None:
    """Draw held-out metrics over the steps, a panel for each metric that all runs have, a line for each run.

    runs: folders of runs
    Raises ConfigError where a folder has no metrics of a validation.
    """
    lines = {}  # folder -> lines of its validations
    for run in runs:
        lines[run] = [line for line in read_metrics(run / "metrics.jsonl") if "val_i2t_r1" in line]
        if not lines[run]:
            raise ConfigError(f"{run}: no metrics.jsonl with a validation; --runs takes folders that train.py wrote")
    keys = [key for key in COMPARED if all(key in line for run in runs for line in lines[run])]
    grid_rows = math.ceil(len(keys) / 3)
    figure = Figure(figsize=(11, 3 * grid_rows), layout="constrained")
    axes = figure.subplots(grid_rows, 3, squeeze=False).flat
    for axis in axes[len(keys) :]:
        axis.axis("off")
    for axis, key in zip(axes, keys, strict=False):
        for run in runs:
            steps = [line["step"] for line in lines[run]]
            axis.plot(steps, [100 * line[key] for line in lines[run]], label=run.name, marker=".")
        axis.set_title(f"{METRIC_TITLES[key]}, {unit_of(key)}", fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=90)


def open_run(checkpoint: Path, root: str | None, device: str) -> tuple[Run, PairDataset]:
    """Open a trained run with its validation split.

    root: folder of the data set, if it is no longer where the run was trained
    Raises ConfigError for a checkpoint, and DataError for data, that cannot be used.
    """
    state = load_checkpoint(checkpoint)
    config = config_from_dict(state["config"] | {"device": device, "compile": False})
    dataset = build_dataset(config.data, root or config.root, "val", config.model.image_size, config.seed)
    dataset.caption_prefix = CAPTION_PREFIX if config.prompts else ""
    run = build_run(config, dataset, read_tokenizer(state))
    run.model.load_state_dict(state["model"])
    run.momentum.model.load_state_dict(state["momentum"])
    run.informative, run.step = tuple(state["informative"]), state["step"]
    return run, dataset


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Errors end the process with one line."""
    parser = OneLineParser("figures.py", description=__doc__.split("\n")[0])
    kinds = "products of a data set, masks of a model, or metrics of runs"
    parser.add_argument("figure", choices=["sheet", "masks", "curves"], help=kinds)
    parser.add_argument("--file", type=Path, help="picture to write (default: the name of the figure, .png)")
    parser.add_argument("--data", choices=get_args(DataName), default="synthetic", help="for sheet (default synthetic)")
    parser.add_argument("--root", help="folder of the data set (default data/<data>, or the checkpoint's)")
    parser.add_argument("--num-products", type=int, default=6, help="number of products to draw (default 6)")
    parser.add_argument("--checkpoint", type=Path, help="for masks: last.pt of a run")
    parser.add_argument("--runs", type=Path, nargs="+", help="for curves: folders of runs")
    args = parser.parse_args(argv)
    if args.figure == "masks" and not args.checkpoint:
        parser.error("masks needs a trained run; give --checkpoint runs/…/last.pt")
    if args.figure == "curves" and not args.runs:
        parser.error("curves needs trained runs; give --runs runs/… runs/…")
    file = args.file or Path(f"{args.figure}.png")
    try:
        if args.figure == "sheet":
            dataset = build_dataset(args.data, args.root, "train", image_size=128, products=args.num_products)
            draw_sheet(dataset, args.num_products, file)
        elif args.figure == "curves":
            draw_comparison(args.runs, file)
        else:
            run, dataset = open_run(args.checkpoint, args.root, "cpu")
            draw_masks(run, dataset, first_images(dataset, args.num_products), file)
    except (ConfigError, DataError, OSError) as error:
        sys.exit(f"figures.py: {in_one_line(error)}")
    print(file)


if __name__ == "__main__":
    main()
