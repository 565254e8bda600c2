"""What your word score (exercise 9) and your masks (exercise 10) are worth.

python study/exercises/measure.py score --checkpoint runs/…/last.pt     on 100 held-out products, to try on
python study/exercises/measure.py score --checkpoint … --final          on the other 200, to report: once, at the end
python study/exercises/measure.py masks                                 trains `syncmask` with the masks of its own and
                                                                        with yours, three seeds each

Flags that `masks` does not know go to train.py. It may be stopped; the same command goes on with what is left.
"""

import argparse
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from torch import Tensor
from torch.utils.data import Subset

import train
from data import normalise
from harness.config import parse_config
from harness.flags import ConfigError, OneLineParser, flag_of
from harness.run import Run
from masking import hidden_words
from measures.truth import WordTruth, skill, word_truth
from photos.dataset import DataError
from photos.synthetic import Synthetic
from study.ablate import CEILING_COLUMNS, check_done, final_line, table
from study.exercises.catalogue import Mistake, file_of, written
from study.figures import open_run
from study.sources import prediction_skills

TO_TRY = 100  # held-out products; the others are for --final


@torch.no_grad()
def default_score(run: Run, batch: dict, generator: torch.Generator) -> Tensor:
    """What the default masks words by (`harness.wiring.synchronize`). -> (B, L)."""
    photos = run.momentum.look(run.momentum.encode_image(normalise(batch["images"])))
    return run.worth(batch["token_ids"], hidden_words(run.momentum, batch, photos, run.mask_id, generator, True)[1])


def told_apart(score: Tensor, known: WordTruth, product_ids: Tensor) -> Tensor:
    """One word, two photos of its product, of which one shows it: how often does that one score higher? What is known
    of kinds of words is no help here. score (B, L) -> hits (ties are halves), of how many pairs."""
    same = product_ids[:, None, None] == product_ids[None, :, None]  # (B, B, 1)
    pairs = same & (known.attribute & known.visible)[:, None] & ~known.visible[None]  # (B, B, L)
    ahead = (score[:, None] - score[None])[pairs].sign()
    return torch.stack([(ahead + 1).sum() / 2, pairs.sum()])


def score_table(run: Run, photos: Subset, mine) -> str:
    """Markdown: the default's scores and these."""
    # draws of its own, so that the default's row is the same whatever stands beside it
    pairs, draws = {}, torch.Generator().manual_seed(run.config.seed)

    def scores(run: Run, batch: dict, generator: torch.Generator) -> dict[str, Tensor]:
        untold = {key: value for key, value in batch.items() if key not in ("regions", "kinds")}
        found = {"default": default_score(run, batch, generator), "mine": mine(run, untold, draws)}
        known = word_truth(batch, run.config.model.grid)
        for name, score in found.items():
            pairs[name] = pairs.get(name, 0) + told_apart(score, known, batch["product_ids"])
        return found

    lines = ["| word score | attributes % | words | details | right photo % |", "|---|---|---|---|---|"]
    for name, figures in prediction_skills(run, photos, scores).items():
        words, details = (skill(figures, f"{what}_cooccurrence") for what in ("word", "detail"))
        hits, of = pairs[name].tolist()
        share = 100 * figures["attribute_share"]
        lines.append(f"| {name} | {share:.0f} | {words:.2f} | {details:.2f} | {100 * hits / max(1, of):.0f} |")
    return "\n".join([*lines, f"| random | {100 * figures['attribute_share_random']:.0f} | 0 | 0 | 50 |"])


def measure_score(args: argparse.Namespace) -> str:
    """The table of exercise 9."""
    mine = written(9)["word_score"]
    run, dataset = open_run(args.checkpoint, None, "cpu")
    if not isinstance(dataset, Synthetic):
        raise ConfigError(f"{args.checkpoint} was trained on {run.config.data}, whose truth is not known")
    run.model.eval()
    chosen = dataset.product_ids >= TO_TRY if args.final else dataset.product_ids < TO_TRY
    return score_table(run, Subset(dataset, chosen.nonzero()[0].tolist()), mine)


def trained(out: Path, flags: list[str], choose_masks) -> dict:
    """The final line of a run with these masks, trained, gone on with, or done already."""
    config, given = parse_config([*flags, "--out", str(out), *(["--resume"] if (out / "last.pt").exists() else [])])
    check_done(out, parse_config([*flags, "--out", str(out)])[0])
    if final := final_line(out):
        return final
    with mock.patch.object(train, "choose_masks", choose_masks):
        if not (final := train.train(config, given)):
            raise KeyboardInterrupt
    return final


def measure_masks(args: argparse.Namespace, flags: list[str]) -> str:
    """The table of exercise 10."""
    mine, source, results = written(10)["choose_masks"], file_of(10).read_text(), {}
    if taken := sorted(parse_config(flags)[1] & {"recipe", "resume", "seed"}):
        raise ConfigError(f"{flag_of(taken[0])} is set here; drop it")
    kept = args.out / "ex10.py"  # what the runs there were made with
    if kept.exists() and kept.read_text() != source:
        raise ConfigError(f"{args.out} holds runs of another mine/ex10.py; give another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    kept.write_text(source)
    for seed in range(args.seeds):
        for name, masks in (("syncmask", train.choose_masks), ("mine", mine)):
            final = trained(args.out / f"{name}-{seed}", [*flags, "--seed", str(seed)], masks)
            results.setdefault(name, []).append(final)
    return table(results, CEILING_COLUMNS)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = OneLineParser("measure.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["score", "masks"])
    parser.add_argument("--checkpoint", type=Path, help="score: last.pt of a run on synthetic photos")
    parser.add_argument("--final", action="store_true", help="score: on the products that were not tried on")
    parser.add_argument("--seeds", type=int, default=3, help="masks: runs of each")
    parser.add_argument("--out", type=Path, default=Path("runs/exercise10"), help="masks: folder of the runs")
    args, flags = parser.parse_known_args(argv)
    if args.what == "score" and (flags or not args.checkpoint):
        parser.error(f"score: unknown flag {flags[0]}" if flags else "score needs --checkpoint")
    try:
        print(measure_score(args) if args.what == "score" else measure_masks(args, flags))
    except (ConfigError, DataError, Mistake, OSError) as error:
        sys.exit(f"measure.py: {error}")
    except KeyboardInterrupt:
        sys.exit("measure.py: stopped; the same command goes on")


if __name__ == "__main__":
    main()
