"""What do image features know? A linear probe for category and sub-category, and for what is drawn on synthetic photos.

python study/probe.py --checkpoint runs/…/last.pt      of a pretraining or a fine-tuning; --root where files have moved

Ridge regression from the frozen CLS to one-hot labels, fitted on photos of the training split (synthetic: fronts and
backs), accuracy on those of the validation split, which pretraining has not seen; beside it a model with random
weights, and the answer that is most often right. Photos without a label are left out.
"""

import argparse
import sys
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import DataName, build_dataset, normalise
from harness.flags import ConfigError
from harness.trust import check_like, load_checkpoint
from model import ModelConfig, VisionLanguageModel
from photos.dataset import DataError, PhotoDataset
from photos.synthetic import Synthetic

PRODUCTS = 1500
ATTRIBUTES = {
    "colour": lambda product: product.colour,
    "pattern": lambda product: product.pattern or "plain",
    "sleeve": lambda product: product.sleeve or "none",
    "neck": lambda product: product.neck or "none",
}


def open_probe(
    checkpoint: str | Path, root: str | None, products: int, progress: bool
) -> tuple[VisionLanguageModel, list[tuple[PhotoDataset, list[int]]]]:
    """A trained model; the photos to fit on and those to test on, each with the rows to look at. Raises ConfigError or
    DataError."""
    state = load_checkpoint(checkpoint)
    config, seed = state["config"], state["config"].get("data_seed", state["config"]["seed"])
    if config["data"] not in get_args(DataName):
        raise ConfigError(f"trained on {config['data']}, whose photos have no categories")
    model = VisionLanguageModel(ModelConfig(**config["model"]))
    check_like(state["model"], model.state_dict(), "model")
    model.load_state_dict(state["model"])
    parts = []
    for split in ("train", "val"):
        where = config["data"], root or config["root"], split, config["model"]["image_size"]
        dataset = build_dataset(*where, seed, products, progress)
        rows = np.flatnonzero(dataset.product_ids < products).tolist()
        if isinstance(dataset, Synthetic):
            rows = [row for row in rows if dataset.rows[row][1] in ("front", "back")]
        parts.append((dataset, rows))
    return model, parts


@torch.no_grad()
def cls_features(
    models: list[VisionLanguageModel], dataset: PhotoDataset, rows: list[int], progress: bool
) -> tuple[list[int], list[Tensor]]:
    """Those of the rows that can be decoded, and their image CLS tokens by each of the models, (n, D)."""
    decoded, parts = [], [[] for _ in models]
    starts, quiet = range(0, len(rows), 128), None if progress else True  # None: quiet unless in a terminal
    for start in tqdm(starts, "encoding photos", unit=" batches", leave=False, disable=quiet):
        items = [dataset[row] for row in rows[start : start + 128]]
        images = [item["image"] for item in items if isinstance(item, dict)]
        decoded += [item["row"] for item in items if isinstance(item, dict)]
        for model, part in zip(models, parts, strict=True):
            if images:
                part.append(model.eval().encode_image(normalise(torch.stack(images)))[:, 0])
    if not decoded:
        raise DataError("none of the photos can be decoded")
    return decoded, [torch.cat(part) for part in parts]


def labels_of(dataset: PhotoDataset, rows: list[int]) -> dict[str, list[str]]:
    """What each of the rows shows, "" where unknown."""
    named = {"category": dataset.categories, "sub-category": dataset.subcategories}
    labels = {name: [values[row] for row in rows] for name, values in named.items()}
    if isinstance(dataset, Synthetic):
        products = [dataset.products[dataset.rows[row][0]] for row in rows]
        labels |= {name: [of(product) for product in products] for name, of in ATTRIBUTES.items()}
    return labels


def probe(features: Tensor, labels: Tensor, fit: Tensor, penalty: float = 50.0) -> float:
    """Accuracy on the rows that are not in `fit` (n,) of W = (XᵀX + λ)⁻¹ Xᵀ Y over the standardised features (n, D)."""
    x = (features - features[fit].mean(dim=0)) / (features[fit].std(dim=0) + 1e-6)
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    y = torch.nn.functional.one_hot(labels).float()
    weights = torch.linalg.solve(x[fit].T @ x[fit] + penalty * torch.eye(x.shape[1]), x[fit].T @ y[fit])
    return ((x @ weights).argmax(dim=1) == labels)[~fit].float().mean().item()


def look(
    models: list[VisionLanguageModel], parts: list[tuple[PhotoDataset, list[int]]], progress: bool
) -> tuple[dict[str, list[str]], list[Tensor], Tensor]:
    """Of the photos to fit on, then those to test on: labels (n) by kind; features (n, D) by each of the models; which
    are to fit on (n,)."""
    looked = [cls_features(models, *part, progress) for part in parts]
    features = [torch.cat(both) for both in zip(*(feats for _, feats in looked), strict=True)]
    first, second = (labels_of(dataset, rows) for (dataset, _), (rows, _) in zip(parts, looked, strict=True))
    labels = {name: values + second[name] for name, values in first.items()}
    return labels, features, torch.arange(len(features[0])) < len(looked[0][0])


def accuracies(labels: dict[str, list[str]], features: list[Tensor], fit: Tensor) -> dict[str, list[float]]:
    """For each kind of label that there is: accuracy from each of some features (n, D), fitted where `fit` (n,) says
    and tested elsewhere, and of the commonest answer."""
    found = {}
    for name, values in labels.items():
        known = torch.tensor([value != "" for value in values])
        if known[fit].any() and known[~fit].any():
            numbers = torch.from_numpy(np.unique([value for value in values if value], return_inverse=True)[1])
            part = fit[known]
            most = numbers[~part].bincount().max() / (~part).sum()
            found[name] = [*(probe(x[known], numbers, part) for x in features), most.item()]
    return found


def category_accuracy(checkpoint: str | Path, root: str | None = None) -> float | None:
    """Accuracy of the linear probe for the category, None where the photos have none."""
    model, parts = open_probe(checkpoint, root, PRODUCTS, progress=False)
    return accuracies(*look([model], parts, progress=False)).get("category", [None])[0]


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("probe.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--root", help="folder of the data set (default: where it was in training)")
    parser.add_argument(
        "--products",
        type=int,
        default=PRODUCTS,
        help=f"products of each split to look at, at most (default {PRODUCTS})",
    )
    args = parser.parse_args(argv)
    if args.products < 30:
        parser.error(f"--products {args.products}: at least 30")
    try:
        torch.manual_seed(0)
        trained, parts = open_probe(args.checkpoint, args.root, args.products, progress=True)
        labels, features, fit = look([trained, VisionLanguageModel(trained.config)], parts, progress=True)
    except (ConfigError, DataError, TypeError, ValueError, KeyError, RuntimeError) as error:
        sys.exit(f"probe.py: {args.checkpoint}: {str(error).splitlines()[0]}")
    print(f"fitted on {fit.sum():,} photos, accuracy in % on {(~fit).sum():,} of products held out of pretraining")
    print("| | this model | random weights | most frequent |\n|---|---|---|---|")
    for name, row in accuracies(labels, features, fit).items():
        print(f"| {name} | " + " | ".join(f"{100 * share:.1f}" for share in row) + " |")


if __name__ == "__main__":
    main()
