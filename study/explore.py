"""One page to look into a trained model with: where its words look, its masks, negatives and reconstructions.

python study/explore.py --checkpoint runs/…/last.pt      writes runs/…/explore.html, which opens from the disk, offline

Everything is computed here, in fp32 (explored.py). The page (explorer/) draws, and chooses among what it was given:
masks and negatives come computed for the five stops of each slider.
"""

import argparse
import json
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
from measures.pictures import first_photos
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
SCRIPTS = ("page", "words", "masks", "negatives", "rebuilt")
CANDIDATES = 3  # photos among which negatives are chosen, for each photo that all other sections show


def gather(run: Run, dataset: PhotoDataset, count: int) -> dict:
    """All that the page shows, of `count` photos of as many products, as JSON holds it."""
    run.config = replace(run.config, precision="fp32")
    run.model.eval()
    dataset.truths = isinstance(dataset, Synthetic)
    everything = run.collate([dataset[row] for row in first_photos(dataset, CANDIDATES * count)])
    rows = everything["rows"].tolist()
    if len(rows) < 2:
        raise DataError("the page needs photos of at least two products of the validation split, which can be decoded")
    shown = list(range(0, len(rows), max(1, len(rows) // count)))[:count]
    config = run.config
    facts = {key: getattr(config, key) for key in ("recipe", "preset", "data", "mask_source")}
    facts |= {"step": run.step, "grid": config.model.grid, "patch_share": config.mim_ratio,
              "word_share": config.mlm_ratio, "shares": list(SHARES), "pool": config.word_pool}  # fmt: skip
    return {
        "run": facts,
        **looked_into(run, dataset, [rows[number] for number in shown]),
        "negatives": compared(run, dataset, everything),
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
            found = gather(run, dataset, args.photos)
        args.file.write_text(page(found), encoding="utf-8")
    except (ConfigError, DataError, OSError) as error:
        sys.exit(f"explore.py: {error}")
    print(f"{args.file}: {args.file.stat().st_size / 2**20:.1f} MiB, {len(found['photos'])} photos")


if __name__ == "__main__":
    main()
