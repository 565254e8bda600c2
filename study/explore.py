"""One page to look into a trained model with: where its words look, its masks, negatives, reconstructions and curves.

python study/explore.py --checkpoint runs/…/last.pt      writes runs/…/explore.html, which opens from the disk, offline

Everything is computed here, in fp32 (explored.py); the page (explorer/) draws, and chooses among what it was given. Its
masks are made here for every share that its sliders offer. Negatives it chooses itself, from the cosines in full
precision, by the rule of `losses.pick_negatives`.
"""

import argparse
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from data import normalise, to_device
from harness.flags import ConfigError
from harness.run import Run
from harness.wiring import teach
from measures.pictures import PANELS, first_photos
from measures.truth import shown_masks, word_truth
from photos.dataset import DataError, PhotoDataset
from photos.synthetic import Synthetic
from study.explored import (
    SHARES,
    all_masks,
    caption_parts,
    drawn_anew,
    negatives,
    numbers_of,
    picture,
    readings,
    rebuilt,
    shown_map,
    soft_masks,
    word_facts,
)
from study.figures import open_run

PARTS = Path(__file__).parent / "explorer"
SCRIPTS = ("page", "words", "masks", "negatives", "rebuilt", "run")
CANDIDATES = 3  # photos among which negatives are chosen, for each photo that all other sections show


def gather(run: Run, dataset: PhotoDataset, count: int, metrics: Path) -> dict:
    """All that the page shows, of `count` photos of as many products, as JSON holds it."""
    run.config = replace(run.config, precision="fp32")
    run.model.eval()
    dataset.truths = isinstance(dataset, Synthetic)
    everything = run.collate([dataset[row] for row in first_photos(dataset, CANDIDATES * count)])
    rows = everything["rows"].tolist()
    if len(rows) < 2:
        raise DataError("the page needs photos of at least two products of the validation split, which can be decoded")
    shown = list(range(0, len(rows), max(1, len(rows) // count)))[:count]
    config, products = run.config, 1 + int(dataset.product_ids.max())
    facts = {key: getattr(config, key) for key in ("recipe", "preset", "data", "mask_source", "mask_layer")}
    facts |= {"step": run.step, "grid": config.model.grid, "patch_share": config.mim_ratio,
              "word_share": config.mlm_ratio, "shares": list(SHARES), "pool": config.word_pool}  # fmt: skip
    return {
        "run": facts,
        **looked_into(run, dataset, [rows[number] for number in shown]),
        "negatives": compared(run, dataset, everything),
        **curves(metrics, min(config.val_products, products)),
    }


def looked_into(run: Run, dataset: PhotoDataset, rows: list[int]) -> dict:
    """Of the photos that sections show one by one: themselves, attention, masks and what the model restores."""
    batch = to_device(run.collate([dataset[row] for row in rows]), run.device)
    images, words = normalise(batch["images"]), batch["words"]
    known = word_truth(batch, run.config.model.grid) if dataset.truths else None
    teacher = teach(run, batch | {"images": images})
    photos = []
    for b, row in enumerate(batch["rows"].tolist()):
        parts = caption_parts(run, dataset.text(row), words[b])
        photos.append({"row": row, "image": picture(batch["images"][b]), "parts": parts, "words": None})
        if known:
            photos[b] |= {"words": word_facts(words, known, b), "named": numbers_of(known.regions[b].any(dim=0))}
    read = [{"source": source, "layer": layer, "photos": [shown_map(*of) for of in zip(heat, words, strict=True)]}
            for source, layer, heat in readings(run, batch, teacher)]  # fmt: skip
    _, patch_mask, word_mask = shown_masks(run, batch, drawn_anew(run))
    return {
        "photos": photos,
        "readings": read,
        "masks": all_masks(run, batch, teacher, known),
        "soft": soft_masks(run, batch, teacher),
        "rebuilt": rebuilt(run, batch, images, patch_mask, word_mask),
    }


def compared(run: Run, dataset: PhotoDataset, batch: dict) -> dict:
    """`negatives` among the photos of a batch, with the photos and their texts."""
    batch = to_device(batch, run.device)
    teacher = teach(run, batch | {"images": normalise(batch["images"])})
    items = [{"row": row, "image": picture(image), "text": " ".join(dataset.text(row)).strip()}
             for row, image in zip(batch["rows"].tolist(), batch["images"], strict=True)]  # fmt: skip
    return {"items": items, **negatives(run, batch, teacher, dataset)}


def curves(metrics: Path, products: int) -> dict:
    """The panels of curves.png as [title, [[key, [[step, value], …]], …]], and held-out figures beside chance."""
    if not metrics.is_file():
        return {"curves": None, "figures": []}
    lines = []
    for number, line in enumerate(metrics.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            found = json.loads(line)
            lines.append({key: value for key, value in found.items() if math.isfinite(value)} | {"step": found["step"]})
        except (ValueError, TypeError, AttributeError, KeyError):
            raise ConfigError(f"{metrics} line {number}: not a line of train.py; mend it, or move the file") from None
    points = lambda key: [[line["step"], line[key]] for line in lines if key in line and not line.get("final")]
    panels = [[title, [[key, points(key)] for key in keys if points(key)]] for title, keys in PANELS.items()]
    validated = [line for line in lines if any(key.startswith("val_") for key in line)]
    return {
        "curves": [panel for panel in panels if panel[1]],
        "figures": beside_chance(validated[-1], products) if validated else [],
    }


def beside_chance(line: dict, products: int) -> list[list]:
    """Of a validation: what is measured, its key, the value, and by chance or with random masks."""
    random = lambda key: line.get(key + "_random")
    named = [
        ("right text found first for a photo (R@1)", "val_i2t_r1", 1 / products),
        ("right photo found first for a text (R@1)", "val_t2i_r1", 1 / products),
        ("matching pairs told from random wrong ones", "val_itm_accuracy", 0.5),
        ("what the photo adds to restored words", "val_photo_gain", 0.0),
        ("the same, words for garment, colour, pattern, sleeve", "photo_gain_whole", 0.0),
        ("the same, words for details", "photo_gain_detail", 0.0),
        ("own text told from one with a wrong detail", "detail_choice", 0.5),
        ("the same by the matching head", "detail_choice_matching", 0.5),
        ("the same by restoring words", "detail_choice_restoring", 0.5),
        ("masked attribute words that the photo shows", "word_cooccurrence", random("word_cooccurrence")),
        ("masked patches on what the text names", "patch_cooccurrence", random("patch_cooccurrence")),
        ("brightest patch of a detail's word lies on it", "pointing", random("pointing")),
        ("chosen negatives that are false, in training", "false_negative_rate", random("false_negative_rate")),
        ("the same, of the hardest in hard batches", "false_negative_rate_hard", random("false_negative_rate")),
    ]
    return [[name, key, line[key], chance] for name, key, chance in named if key in line]


def page(found: dict) -> str:
    """The template with style, scripts and data in it. No text of the data can end the element that holds it."""
    read = lambda name: (PARTS / name).read_text(encoding="utf-8")
    filled = {
        "style": read("style.css"),
        "data": json.dumps(found, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        "script": "\n".join(read(f"{name}.js") for name in SCRIPTS),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda name: filled[name[1]], read("template.html"))


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("explore.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", type=Path, required=True, help="last.pt of a pretraining, of any recipe")
    parser.add_argument("--root", help="folder of the data set (default: where it was in training)")
    parser.add_argument("--file", type=Path, help="page to write (default explore.html beside the checkpoint)")
    parser.add_argument("--photos", type=int, default=16, help="photos to look into (default 16)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    args.file = args.file or args.checkpoint.parent / "explore.html"
    if not 2 <= args.photos <= 64:
        parser.error(f"--photos {args.photos}: from 2 to 64")
    try:
        run, dataset = open_run(args.checkpoint, args.root, args.device)
        with torch.no_grad():
            found = gather(run, dataset, args.photos, args.checkpoint.parent / "metrics.jsonl")
        args.file.write_text(page(found), encoding="utf-8")
    except (ConfigError, DataError, OSError) as error:
        sys.exit(f"explore.py: {error}")
    print(f"{args.file}: {args.file.stat().st_size / 2**20:.1f} MiB, {len(found['photos'])} photos")


if __name__ == "__main__":
    main()
