"""Which reading of the momentum model's attention finds what photo and text have in common?

python study/sources.py --checkpoint runs/…/last.pt        every source, layer, word and patch score of masks, as skill

A run on synthetic photos is needed, for their truth. Skill = (share right − share of random masks) / (1 − the latter):
0 is as good as random masks, 1 is perfect, below 0 is worse than random.
"""

import argparse
import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tqdm import tqdm

from data import DataError, Synthetic
from masking import PatchScore, WordScore
from study.figures import open_run
from train import ConfigError, MaskSource, mask_truth, skill


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "sources.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="last.pt of a run on synthetic photos")
    parser.add_argument("--products", type=int, default=100, help="held-out products to measure on")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    if args.products < 2:
        parser.error("--products: at least 2")
    try:
        run, dataset = open_run(args.checkpoint, None, args.device)
    except (ConfigError, DataError, OSError) as error:
        sys.exit(f"sources.py: {error}")
    if not isinstance(dataset, Synthetic):
        sys.exit(f"sources.py: {args.checkpoint} was trained on {run.config.data}, whose truth is not known")
    run.model.eval()
    config = replace(run.config, val_products=args.products)
    layers = [*range(1, config.model.fusion_layers + 1), 0]
    conditions = [
        (source, layer, *scores)
        for source, layer in itertools.product(get_args(MaskSource), layers)
        for scores in itertools.product(get_args(WordScore), get_args(PatchScore))
        if (source, layer) != ("gradcam", config.model.fusion_layers)  # empty there: only [CLS] reaches the match logit
    ]
    titles = "source | layer | word score | patches of | word skill | details alone | patch skill | pointing × chance"
    lines = [f"| {titles} |", "|" + "---|" * 8]
    for source, layer, word_score, patch_score in tqdm(conditions, "readings", leave=False):
        run.config = replace(
            config, mask_source=source, mask_layer=layer, word_score=word_score, patch_score=patch_score
        )
        found = mask_truth(run, dataset)
        whose = {"all": "all words", "masked": "masked words"}[patch_score]
        lines.append(
            f"| {source} | {layer or 'mean'} | {word_score} | {whose} | {skill(found, 'word_cooccurrence'):.2f} | "
            f"{skill(found, 'detail_cooccurrence'):.2f} | {skill(found, 'patch_cooccurrence'):.2f} | "
            f"{found['pointing'] / found['pointing_random']:.1f} |"
        )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
