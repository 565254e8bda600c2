"""What do fused tokens know that the matching head does not tell? A linear probe for what a photo shows.

python study/fused.py --checkpoint runs/…/last.pt      of a run on synthetic photos

A photo with its own text, and with one that differs in one thing that the photo shows (`measures/choice.py`): which is
its own? Asked are the matching head as it is, and for each kind of thing a ridge regression of how the two fused texts
differ in [CLS], or in the words in which they differ (their mean). It is fitted on products of the training split and
tested on those of the validation split. Chance is 50 %.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from torch import Tensor

from data import build_dataset
from harness.flags import ConfigError
from harness.run import Run
from measures.choice import differing_words, fused_with, trials
from photos.dataset import DataError, PhotoDataset
from photos.prompts import Text
from photos.synthetic import Synthetic
from photos.wardrobe import KINDS, WHOLE
from study.figures import open_run

JUDGES = "matching head", "[CLS], probed", "words, probed"
PENALTY = 50.0


@torch.no_grad()
def differences(run: Run, dataset: Synthetic, products: int) -> tuple[list[str], list[Tensor]]:
    """Of the first products: the kind of each of n trials, and for each of JUDGES what the own text has more than the
    other: match logit (n, 1), fused [CLS] and fused words (n, D)."""
    part = dataset.part((dataset.product_ids < products).nonzero()[0])
    kinds, rows, others = trials(dataset, part.source)
    if not rows:
        raise DataError(f"no photo of these {products} products shows anything to tell apart")
    own, other = [part.text(row) for row in rows], [(dataset.lead, text) for text in others]
    sides = [fused_states(run, part, *texts, rows) for texts in ((own, other), (other, own))]
    return kinds, [mine - others for mine, others in zip(*sides, strict=True)]


def fused_states(
    run: Run, photos: PhotoDataset, texts: list[Text], rivals: list[Text], rows: list[int]
) -> list[Tensor]:
    """Of n texts, each fused with its photo: match logit (n, 1), [CLS] and the mean of the words that its rival has
    not (n, D)."""
    token_ids, keep, differing = (x.to(run.device) for x in differing_words(run, texts, rivals))
    weights = differing.float() / differing.sum(dim=1, keepdim=True).clamp(min=1)  # (n, L)
    states = [torch.zeros(len(texts), width, device=run.device) for width in (1, *[run.config.model.width] * 2)]
    for at, fused in fused_with(run, photos, token_ids, keep, rows):
        states[0][at] = run.model.itm_logits(fused).diff(dim=1)
        states[1][at] = fused[:, 0].float()
        states[2][at] = (weights[at, None] @ fused.float())[:, 0]
    return states


def share_right(fit: Tensor, test: Tensor) -> float:
    """The share of the rows x of `test` (m, D) with w·x > 0, w = (XᵀX + λ)⁻¹ Xᵀ1 of the rows X of `fit` (n, D), all in
    units of the mean square of the latter."""
    scale = fit.square().mean(dim=0).sqrt() + 1e-6
    x = fit / scale
    weights = torch.linalg.solve(x.T @ x + PENALTY * torch.eye(x.shape[1], device=x.device), x.sum(dim=0))
    return ((test / scale) @ weights > 0).float().mean().item()


def shares(fit: tuple[list[str], list[Tensor]], test: tuple[list[str], list[Tensor]]) -> dict[str, list[float]]:
    """By kind the share of the trials that each of JUDGES gets right, and after these how many were tested."""
    found = {}
    for kind in KINDS:
        known, asked = (torch.tensor([each == kind for each in kinds]) for kinds, _ in (fit, test))
        if known.any() and asked.any():
            head, *probed = test[1]
            right = [(head[asked] > 0).float().mean().item()]
            right += [share_right(x[known], y[asked]) for x, y in zip(fit[1][1:], probed, strict=True)]
            found[kind] = [*right, int(asked.sum())]
    return found


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        "fused.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="last.pt of a run on synthetic photos")
    parser.add_argument("--products", type=int, default=1000, help="of each split, at most (default 1000)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    if args.products < 10:
        parser.error(f"--products {args.products}: at least 10")
    try:
        run, held_out = open_run(args.checkpoint, None, args.device)
        if not isinstance(held_out, Synthetic):
            raise ConfigError(f"{args.checkpoint} was trained on {run.config.data}, whose truth is not known")
        where = run.config.data, None, "train", run.config.model.image_size, run.config.seed, args.products
        training = build_dataset(*where)
        training.lead = held_out.lead
        run.model.eval()
        found = shares(*(differences(run, dataset, args.products) for dataset in (training, held_out)))
    except (ConfigError, DataError, OSError) as error:
        sys.exit(f"fused.py: {error}")
    print(f"| own text told, % | {' | '.join(JUDGES)} | asked |\n" + "|---" * (len(JUDGES) + 2) + "|")
    details = [right for kind, right in found.items() if kind not in WHOLE]
    if details:
        found["details (mean)"] = [*np.mean(details, axis=0)[:-1], sum(right[-1] for right in details)]
    for kind, (*right, asked) in found.items():
        print(f"| {kind} | " + " | ".join(f"{100 * share:.1f}" for share in right) + f" | {asked:,} |")


if __name__ == "__main__":
    main()
