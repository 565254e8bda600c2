"""What do fused tokens know that the matching head does not tell? A linear probe for what a photo shows.

python study/fused.py --checkpoint runs/…/last.pt      of a run on synthetic photos

A photo with its own text, and with one that differs in one thing that the photo shows (`measures/choice.py`): which is
its own? Asked are the matching head as it is, and for each kind of thing a ridge regression of how the two fused texts
differ in [CLS], or in the words in which they differ (their mean). It is fitted on products of the training split and
tested on those of the validation split. Chance is 50 %; with `--wrong-photo`, of another product, the rest of the text
alone gives something away. A probe is a lower bound: it finds what is linearly there, and less where trials are few.
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
PENALTY = 50.0  # choice: that of probe.py


def differences(
    run: Run, dataset: Synthetic, products: int, wrong_photo: bool = False
) -> tuple[list[str], list[Tensor]]:
    """Of the first products: the kind of each of n trials, and for each of JUDGES what the own text has more than the
    other: match logit (n, 1), fused [CLS] and fused words (n, D)."""
    part = dataset.part((dataset.product_ids < products).nonzero()[0])
    kinds, rows, others = trials(dataset, part.source)
    if not rows:
        raise DataError(f"no photo of these {products} products shows anything to tell apart")
    own, other = [part.text(row) for row in rows], [(dataset.lead, text) for text in others]
    if wrong_photo:
        rows = np.random.default_rng(0).permutation(len(part))[rows].tolist()
    sides = [fused_states(run, part, *texts, rows) for texts in ((own, other), (other, own))]
    return kinds, [of_own - of_other for of_own, of_other in zip(*sides, strict=True)]


@torch.no_grad()
def fused_states(
    run: Run, photos: PhotoDataset, texts: list[Text], rivals: list[Text], rows: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of n texts, each fused with its photo: match logit (n, 1), [CLS] and the mean of the words that its rival has
    not (n, D)."""
    token_ids, keep, differing = (x.to(run.device) for x in differing_words(run, texts, rivals))
    weights = differing.float() / differing.sum(dim=1, keepdim=True).clamp(min=1)  # (n, L)
    logit = torch.zeros(len(texts), 1, device=run.device)
    cls, words = torch.zeros(2, len(texts), run.config.model.width, device=run.device)
    for at, fused in fused_with(run, photos, token_ids, keep, rows):
        logit[at] = run.model.itm_logits(fused).diff(dim=1)
        cls[at] = fused[:, 0].float()
        words[at] = (weights[at, None] @ fused.float())[:, 0]
    return logit, cls, words


def share_right(fit: Tensor, test: Tensor) -> float:
    """The share of the rows x of `test` (m, D) with w·x > 0, w = (XᵀX + λ)⁻¹ Xᵀ1 of the rows X of `fit` (n, D); each
    column is divided by its root mean square in X."""
    scale = fit.square().mean(dim=0).sqrt() + 1e-6
    x = fit / scale
    weights = torch.linalg.solve(x.T @ x + PENALTY * torch.eye(x.shape[1], device=x.device), x.sum(dim=0))
    return ((test / scale) @ weights > 0).float().mean().item()


def shares(fit: tuple[list[str], list[Tensor]], test: tuple[list[str], list[Tensor]]) -> dict[str, tuple]:
    """By kind the share of the trials that each of JUDGES gets right, and after these how many were tested."""
    found = {}
    for kind in KINDS:
        known, asked = (torch.tensor([each == kind for each in kinds]) for kinds, _ in (fit, test))
        if known.any() and asked.any():
            head, *probed = test[1]
            right = [share_right(x[known], y[asked]) for x, y in zip(fit[1][1:], probed, strict=True)]
            found[kind] = (head[asked] > 0).float().mean().item(), *right, int(asked.sum())
    return found


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        "fused.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="last.pt of a run on synthetic photos")
    parser.add_argument("--products", type=int, default=1000, help="of each split, at most (default 1000)")
    parser.add_argument("--wrong-photo", action="store_true", help="a control: photos of other products")
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
        asked = args.products, args.wrong_photo
        found = shares(*(differences(run, dataset, *asked) for dataset in (training, held_out)))
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
