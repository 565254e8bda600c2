"""Search by a detail: does "dark stripes at hem" find the photos that show dark stripes at the hem?

python study/detail_search.py --checkpoint runs/…/last.pt      of a run on synthetic photos

Every look and noun at every place is asked for among the held-out photos, by cosine similarity and by the matching
head. A photo counts if it shows the detail there, and not if another view of its product would. Average precision in
%, means over the queries that at least three photos answer; beside it that of a random order of all photos, and with
those first that show any detail at that place, which is what the place alone gives away.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
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
    """What is asked, one detail each: the place (q), the words (q), which of the n photos show it (n, q). Raises
    DataError."""
    shown = [
        {place: detail for place, detail in dataset.products[index].details.items() if place in regions}
        for (index, _), regions in zip(dataset.rows, dataset.regions, strict=True)
    ]
    details = [Detail(look, noun) for look in LOOKS for noun in NOUNS]
    places, texts, answers = [], [], []
    for place in sorted(set().union(*shown)):
        for detail in details:
            answer = [found.get(place) == detail for found in shown]
            if sum(answer) >= FEWEST:
                places.append(place)
                texts.append(f"{detail.look} {detail.noun} at {place}.")
                answers.append(answer)
    if not texts:
        raise DataError(f"no detail is shown by {FEWEST} of these {len(dataset)} photos")
    return places, texts, torch.tensor(answers).T


def average_precision(scores: Tensor, answers: Tensor) -> Tensor:
    """Of each query, scores (n, q) and answers (n, q) bool -> (q,): the mean precision at the rank of each answer. Ties
    count against the model."""
    wrong_first = answers.long().argsort(dim=0, stable=True)
    order = wrong_first.gather(0, (-scores).gather(0, wrong_first).argsort(dim=0, stable=True))
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
    """The place of each query (q), and its average precision (4, q): by similarity, by the matching head, by chance,
    and by chance among the photos that show something at that place."""
    places, texts, answers = questions(dataset)
    asked = [(dataset.lead, text) for text in texts]
    similar = photo_features(run, dataset)[1] @ text_features(run, asked).T  # (n, q)
    pairs = torch.cartesian_prod(torch.arange(len(dataset)), torch.arange(len(texts)))
    matched = match_scores(run, dataset, asked, pairs).view(similar.shape)
    judged = [average_precision(scores.float().cpu(), answers) for scores in (similar, matched)]
    there = [torch.tensor([place in regions for regions in dataset.regions]) for place in places]
    at_place = torch.cat([by_chance(answers[shown, i, None]) for i, shown in enumerate(there)])
    return places, torch.stack([*judged, by_chance(answers), at_place])


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
    print("| place | by similarity | by the matching head | by chance | by the place alone | queries |")
    print("|---" * 6 + "|")
    for place in [*dict.fromkeys(places), "all"]:
        of_place = torch.tensor([place in ("all", each) for each in places])
        cells = " | ".join(f"{100 * share:.1f}" for share in found[:, of_place].mean(dim=1).tolist())
        print(f"| {place} | {cells} | {int(of_place.sum())} |")


if __name__ == "__main__":
    main()
