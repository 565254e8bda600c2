"""Search by a detail: does "dark stripes at hem" find the photos that show dark stripes at the hem?

python study/detail_search.py --checkpoint runs/…/last.pt      of a run on synthetic photos

Every look and noun at every place is asked for among the held-out photos, by cosine similarity and by the matching
head. A photo counts if it shows the detail there, and not if another view of its product would. Average precision, and
what a random order would have; in %, means of the queries that a few photos answer.
"""

import argparse
import sys
from itertools import product as every
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from torch import Tensor

from harness.batches import match_scores, photo_features, text_features
from harness.flags import ConfigError
from harness.run import Run
from photos.dataset import DataError
from photos.synthetic import Synthetic
from photos.wardrobe import LOOKS, NOUNS, Detail
from study.figures import open_run

FEWEST = 3  # choice: photos that answer a query


def questions(dataset: Synthetic) -> tuple[list[str], list[str], Tensor]:
    """What is asked, one detail each: the place (q), the words (q), which of the n photos show it (n, q)."""
    shown = [
        {place: product.details[place] for place in product.details.keys() & regions.keys()}
        for product, regions in zip(
            (dataset.products[index] for index, _ in dataset.rows), dataset.regions, strict=True
        )
    ]
    places, texts, answers = [], [], []
    for place in sorted(set().union(*shown)):
        for look, noun in every(LOOKS, NOUNS):
            answer = [found.get(place) == Detail(look, noun) for found in shown]
            if sum(answer) >= FEWEST:
                places.append(place)
                texts.append(f"{look} {noun} at {place}.")
                answers.append(answer)
    if not texts:
        raise DataError(f"no detail is shown by {FEWEST} of these {len(dataset)} photos")
    return places, texts, torch.tensor(answers).T


def average_precision(scores: Tensor, answers: Tensor) -> Tensor:
    """Of each query, scores (n, q) and answers (n, q) bool -> (q,): the mean, over the photos that answer it, of the
    share of answers among the photos down to that one; ties count against the model."""
    order = torch.stack([torch.from_numpy(np.lexsort((right, -score))) for score, right in
                         zip(scores.T.numpy(), answers.T.numpy(), strict=True)], dim=1)  # fmt: skip
    right = answers.gather(0, order).double()
    precision = right.cumsum(dim=0) / torch.arange(1, len(right) + 1)[:, None]
    return (precision * right).sum(dim=0) / right.sum(dim=0)


def by_chance(answers: Tensor) -> Tensor:
    """The average precision that a random order has on average, (n, q) -> (q,): with k answers among n photos

    1/n Σ_r (1 + (r − 1)(k − 1)/(n − 1)) / r,   since an answer at rank r has (r − 1)(k − 1)/(n − 1) others before it
    """
    rank, k = torch.arange(1, len(answers) + 1).double()[:, None], answers.sum(dim=0)
    return ((1 + (rank - 1) * (k - 1) / (len(answers) - 1)) / rank).mean(dim=0)


@torch.no_grad()
def precisions(run: Run, dataset: Synthetic) -> tuple[list[str], Tensor]:
    """The place of each query (q), and its average precision (3, q): by similarity, by the matching head, by chance."""
    places, texts, answers = questions(dataset)
    asked = [(dataset.lead, text) for text in texts]
    similar = photo_features(run, dataset)[1] @ text_features(run, asked).T  # (n, q)
    pairs = torch.cartesian_prod(torch.arange(len(dataset)), torch.arange(len(texts)))
    matched = match_scores(run, dataset, asked, pairs).view(similar.shape)
    judged = [average_precision(scores.float().cpu(), answers) for scores in (similar, matched)]
    return places, torch.stack([*judged, by_chance(answers)])


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        "detail_search.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="last.pt of a run on synthetic photos")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    try:
        run, held_out = open_run(args.checkpoint, None, args.device)
        if not isinstance(held_out, Synthetic):
            raise ConfigError(f"{args.checkpoint} was trained on {run.config.data}, whose truth is not known")
        run.model.eval()
        places, found = precisions(run, held_out)
    except (ConfigError, DataError, OSError) as error:
        sys.exit(f"detail_search.py: {error}")
    print(f"{len(held_out):,} photos, average precision in %\n")
    print("| place | by similarity | by the matching head | by chance | queries |\n|---|---|---|---|---|")
    for place in [*dict.fromkeys(places), "all"]:
        of_place = torch.tensor([place in ("all", each) for each in places])
        cells = " | ".join(f"{100 * share:.1f}" for share in found[:, of_place].mean(dim=1).tolist())
        print(f"| {place} | {cells} | {int(of_place.sum())} |")


if __name__ == "__main__":
    main()
