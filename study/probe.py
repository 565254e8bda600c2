"""What do image features know? A linear probe for each attribute of the synthetic garments.

python study/probe.py --checkpoint runs/…/last.pt      of a pretraining or a fine-tuning

Ridge regression from the frozen CLS to one-hot labels, fitted on the front and back photos of two thirds of some
training products, accuracy on those of the other third; beside it a model with random weights, and the answer that is
most often right.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import DataError, Synthetic, normalise
from model import ModelConfig, VisionLanguageModel
from train import ConfigError, load_checkpoint

ATTRIBUTES = {
    "garment": lambda product: product.garment,
    "colour": lambda product: product.colour,
    "pattern": lambda product: product.pattern[0] if product.pattern else "plain",
    "sleeve": lambda product: product.sleeve or "none",
    "neck": lambda product: product.neck or "none",
}


@torch.no_grad()
def cls_features(model: VisionLanguageModel, dataset: Synthetic, rows: list[int]) -> Tensor:
    """The image CLS tokens of some photos, (n, D)."""
    parts = []
    for start in tqdm(range(0, len(rows), 128), "encoding photos", unit=" batches", leave=False):
        images = torch.stack([dataset[row]["image"] for row in rows[start : start + 128]])
        parts.append(model.eval().encode_image(normalise(images))[:, 0])
    return torch.cat(parts)


def probe(features: Tensor, labels: Tensor, fit: Tensor, penalty: float = 50.0) -> float:
    """Accuracy on the rows that are not in `fit` (n,) of W = (XᵀX + λ)⁻¹ Xᵀ Y over the standardised features (n, D)."""
    x = (features - features[fit].mean(dim=0)) / (features[fit].std(dim=0) + 1e-6)
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    y = torch.nn.functional.one_hot(labels).float()
    weights = torch.linalg.solve(x[fit].T @ x[fit] + penalty * torch.eye(x.shape[1]), x[fit].T @ y[fit])
    return ((x @ weights).argmax(dim=1) == labels)[~fit].float().mean().item()


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("probe.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--products", type=int, default=900, help="training products to look at (default 900)")
    args = parser.parse_args(argv)
    if args.products < 30:
        parser.error(f"--products {args.products}: at least 30")
    try:
        state = load_checkpoint(args.checkpoint)
        config = ModelConfig(**state["config"]["model"])
        torch.manual_seed(0)
        trained, untrained = VisionLanguageModel(config), VisionLanguageModel(config)
        trained.load_state_dict(state["model"])
        dataset = Synthetic(
            "train", args.products, config.image_size, state["config"].get("data_seed", state["config"]["seed"])
        )
    except (ConfigError, DataError, TypeError, RuntimeError) as error:
        sys.exit(f"probe.py: {args.checkpoint}: {str(error).splitlines()[0]}")
    rows = [row for row, (_, view) in enumerate(dataset.rows) if view in ("front", "back")]
    owners = torch.tensor([dataset.rows[row][0] for row in rows])
    fit = owners < 2 * args.products // 3
    features = [cls_features(model, dataset, rows) for model in (trained, untrained)]
    print(f"{len(rows):,} synthetic photos of {args.products:,} products; accuracy in %")
    print("| | this model | random weights | most frequent |\n|---|---|---|---|")
    for name, of in ATTRIBUTES.items():
        values = [of(dataset.products[owner]) for owner in owners.tolist()]
        labels = torch.from_numpy(np.unique(values, return_inverse=True)[1])
        most = labels[~fit].bincount().max() / (~fit).sum()
        cells = [f"{100 * value:.1f}" for value in (*(probe(x, labels, fit) for x in features), most.item())]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
