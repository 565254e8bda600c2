"""Which reading of the momentum model finds what photo and text have in common?

python study/sources.py --checkpoint runs/…/last.pt

First every source, layer, head reduction, word and patch score that `train.py` offers; then word scores that need no
attention: how well the momentum model predicts a hidden word from the photo, and how much better than from another.

A run on synthetic photos is needed, for their truth. Skill = (share right − share of random masks) / (1 − the latter):
0 is as good as random masks, 1 is perfect, below 0 is worse than random. Words that name no attribute do not count; the
column "attributes %" says how many of the masked words name one.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from data import normalise, to_device
from harness.batches import first_products
from harness.flags import ConfigError
from harness.run import Run
from losses import pick_negatives, same_pairs
from masking import (
    HeadReduction,
    MaskSource,
    PatchScore,
    WordScore,
    cooccurrence,
    mask_words,
    random_word_mask,
)
from measures.truth import mask_truth, skill, word_truth
from photos.dataset import DataError
from photos.synthetic import Synthetic
from study.figures import open_run

Scores = Callable[[Run, dict, torch.Generator], dict[str, Tensor]]  # of a batch -> name: scores of its words (B, L)


@torch.no_grad()
def predictions(run: Run, batch: dict, generator: torch.Generator) -> dict[str, Tensor]:
    """Scores (B, L) of the words by the momentum model's log-probability of each while it is hidden with half of the
    others: from its own photo, and over those from the photo of another product, the average photo, and no photo."""
    momentum, words, keep = run.momentum, batch["words"], batch["attention_mask"]
    image_embeds = momentum.encode_image(normalise(batch["images"]))
    half, rest = random_word_mask(words, 0.5, generator), words > 0
    found = {}
    forbidden = same_pairs(batch["product_ids"], batch["caption_ids"])
    other = pick_negatives(torch.zeros_like(forbidden, dtype=torch.float), forbidden, None, "random", generator)
    average = image_embeds.mean(dim=0, keepdim=True).expand_as(image_embeds)
    contexts = {"own": image_embeds, "another": image_embeds[other], "the average": average,
                "no": torch.zeros_like(image_embeds)}  # fmt: skip
    for name, context in contexts.items():
        photos = momentum.look(context)
        found[name] = torch.zeros(words.shape, device=words.device)
        for hidden in (half, rest & ~half):
            text_embeds = momentum.encode_text(batch["token_ids"].masked_fill(hidden, run.mask_id), keep)
            logits = momentum.mlm_logits(momentum.fuse(text_embeds, keep, photos)[hidden])
            chosen = batch["token_ids"][hidden][:, None]
            found[name][hidden] = logits.log_softmax(dim=-1).gather(1, chosen).squeeze(1)
    gains = {f"gain over {name} photo": found["own"] - found[name] for name in ("another", "the average", "no")}
    return {"log p(word)": found["own"]} | gains


def prediction_skills(run: Run, photos: Subset, scores: Scores = predictions) -> dict[str, dict[str, float]]:
    """For each of the scores of words, the co-occurrence of the words that it would mask, and of random words.

    photos: of a synthetic data set"""
    generator, sums = torch.Generator(run.device).manual_seed(run.config.seed), {}
    photos.dataset.truths = True
    loader = DataLoader(photos, run.config.batch_size, collate_fn=run.collate)
    for batch in tqdm(loader, "predictions", leave=False):
        batch = to_device(batch, run.device)
        known = word_truth(batch, run.config.model.grid)
        attribute, detail, visible = known.attribute, known.detail, known.visible
        random = random_word_mask(batch["words"], run.config.mlm_ratio, generator)
        for name, score in scores(run, batch, generator).items():
            for suffix, mask in (("", mask_words(score, batch["words"], run.config.mlm_ratio)), ("_random", random)):
                for key, words, hits in (("word_cooccurrence", attribute, visible),
                                         ("detail_cooccurrence", attribute & detail, visible),
                                         ("attribute_share", batch["described"], attribute)):  # fmt: skip
                    total = sums.setdefault(name, {}).setdefault(key + suffix, np.zeros(2))
                    total += [part.item() for part in cooccurrence(mask, words, hits)]
    return {name: {key: hits / max(1, of) for key, (hits, of) in found.items()} for name, found in sums.items()}


def main(argv: list[str] | None = None) -> None:
    """The command line."""
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
    readings = itertools.product(get_args(MaskSource), [*range(1, config.model.fusion_layers + 1), 0],
                                 get_args(HeadReduction), get_args(WordScore), get_args(PatchScore))  # fmt: skip
    titles = "source | layer | heads | word score | patches of | attributes % | words | details | patches | pointing ×"
    lines = [f"| {titles} |", "|" + "---|" * 10]
    for source, layer, heads, word_score, patch_score in tqdm(list(readings), "readings", leave=False):
        if source == "gradcam" and layer in (config.model.fusion_layers, 0):
            continue  # empty in the last layer, where only [CLS] reaches the match logit
        if word_score == "gain" and source != "hidden":
            continue  # a word that stands there gains nothing
        run.config = replace(config, mask_source=source, mask_layer=layer, mask_heads=heads, word_score=word_score,
                             patch_score=patch_score)  # fmt: skip
        found = mask_truth(run, dataset)
        whose = {"all": "all words", "masked": "masked words"}[patch_score]
        words, details, patches = (skill(found, f"{what}_cooccurrence") for what in ("word", "detail", "patch"))
        lines.append(
            f"| {source} | {layer or 'all'} | {heads} | {word_score} | {whose} | "
            f"{100 * found['attribute_share']:.0f} | "
            f"{words:.2f} | {details:.2f} | {patches:.2f} | {found['pointing'] / found['pointing_random']:.1f} |"
        )
    for name, found in prediction_skills(run, first_products(dataset, args.products)).items():
        words, details = skill(found, "word_cooccurrence"), skill(found, "detail_cooccurrence")
        lines.append(f"| {name} | | | | | {100 * found['attribute_share']:.0f} | {words:.2f} | {details:.2f} | | |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
