"""One page to look into a trained model with: where its words attend, its masks, its negatives.

python tutorial/explore.py --checkpoint runs/…/last.pt      writes runs/…/explore.html, which opens offline

Python computes everything, in fp32, by the functions that train and measure; the page (explorer.html) only draws it.
Masks and negatives come computed for the five stops of each slider.

Letters: B images, L text tokens, P patches, S side of an image.
"""

import argparse
import base64
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from PIL import Image
from torch import Tensor

from data import normalise
from engine.flags import ConfigError
from engine.run import Run
from evaluation.ground_truth import TokenLabels, synchronized_masks, token_labels
from evaluation.pictures import first_images, momentum_grad_cam
from experiments.figures import open_run
from losses import pick_negatives, positive_pairs
from masking import mask_precision, random_patch_mask, random_word_mask, soft_mask
from readers.dataset import DataError, PairDataset
from readers.synthetic import Synthetic

IMAGES = 24  # one a product
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the patches and of the words, the stops of the slider for masks
MARGIN_STOPS = (0.0, 0.5, 1.0, 1.5, 2.0)  # times the margin of the run


def gather(run: Run, dataset: PairDataset) -> dict:
    """Compute all that the page shows, of one image of each of the first products. -> what JSON can hold"""
    config = run.config = replace(run.config, precision="fp32")
    run.model.eval()
    dataset.with_ground_truth = isinstance(dataset, Synthetic)
    batch = run.collate([dataset[row] for row in first_images(dataset, IMAGES)])
    count = len(batch["rows"])
    if count < 2:
        raise DataError("the page needs images of at least two products of the validation split, which can be decoded")
    truth = token_labels(batch, config.model.grid) if dataset.with_ground_truth else None
    images = [to_jpeg(image) for image in batch["images"]]
    batch["images"] = normalise(batch["images"])
    return {
        "about": f"Recipe {config.recipe}, preset {config.preset}, data {config.data}, {run.step} steps; "
        f"{count} images of held-out products.",
        "grid": config.model.grid,
        "ground_truth": dataset.with_ground_truth,
        "images": images,
        "captions": captions(run, batch, truth),
        "shares": SHARES,
        "masks": masks(run, batch, truth),
        "negatives": negatives(run, batch, dataset),
    }


def to_jpeg(pixels: Tensor) -> str:
    """Encode an image (3, S, S) uint8 as a data address."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "jpeg", quality=92, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def captions(run: Run, batch: dict, truth: TokenLabels | None) -> list[list[dict]]:
    """List the words of each caption, as the tokenizer splits it.

    A word that may be masked has a `place`, the place of its first token, and maps over the patches in 255ths: its
    attention while masked and as it stands, scaled to its highest patch, and its soft mask. With ground truth it also
    has `named`, whether it names an attribute, and `region`, 1 for patches that show the attribute.
    """
    maps = {"soft": soft_masks(run, batch)}
    for source in ("masked", "clean"):
        attention, _, _ = synchronized(run, batch, SHARES[0], source)
        maps[source] = attention / attention.amax(dim=2, keepdim=True)
    found = []
    for b, ids in enumerate(batch["token_ids"].tolist()):
        caption = []
        for place, token in enumerate(map(run.tokenizer.id_to_token, ids)):
            if token in ("[PAD]", "[CLS]", "[SEP]"):
                continue
            if token.startswith("##") and caption:
                caption[-1]["text"] += token.removeprefix("##")
                continue
            word = {"text": token}
            if batch["maskable"][b, place]:
                word["place"] = place
                for name, values in maps.items():
                    word[name] = (255 * values[b, place]).round().int().tolist()
                if truth:
                    word["named"] = bool(truth.attribute[b, place])
                    word["region"] = truth.regions[b, place].int().tolist()
            caption.append(word)
        found.append(caption)
    return found


def synchronized(run: Run, batch: dict, share: float, source: str) -> tuple[Tensor, Tensor, Tensor]:
    """Make synchronized masks as training does. -> attention (B, L, P), patch mask (B, P), word mask (B, L)"""
    config = replace(run.config, mask_source=source, mim_ratio=share, mlm_ratio=share)
    generator = torch.Generator().manual_seed(config.seed)
    return synchronized_masks(replace(run, config=config), batch, generator)


def soft_masks(run: Run, batch: dict) -> Tensor:
    """Compute the soft mask of every token. -> (B, L, P)

    With one fusion layer all are 0: the ITM head reads [CLS] alone, so other rows of that layer have no gradient."""
    maps = momentum_grad_cam(run, batch)  # (B, h, L, N)
    rows, tokens = batch["token_ids"].shape
    by_token = [soft_mask(maps, torch.full((rows,), place)) for place in range(tokens)]
    return torch.stack(by_token, dim=1)


def masks(run: Run, batch: dict, truth: TokenLabels | None) -> dict[str, list[dict]]:
    """Make random and synchronized masks, for each of SHARES."""
    words, patches = batch["maskable"], run.config.model.grid**2
    found = {"Random": [], "Synchronized": []}
    for share in SHARES:
        generator = torch.Generator().manual_seed(run.config.seed)
        random_patches = random_patch_mask(len(words), patches, share, generator)
        random_words = random_word_mask(words, share, generator)
        found["Random"].append(mask_facts(random_patches, random_words, truth))
        _, sync_patches, sync_words = synchronized(run, batch, share, run.config.mask_source)
        found["Synchronized"].append(mask_facts(sync_patches, sync_words, truth))
    return found


def mask_facts(patch_mask: Tensor, word_mask: Tensor, truth: TokenLabels | None) -> dict:
    """List masks (B, P), (B, L) as 0 and 1, and their precision over all images where the ground truth is known."""
    facts = {"patches": patch_mask.int().tolist(), "words": word_mask.int().tolist()}
    if truth:
        hits, total = mask_precision(patch_mask, torch.ones_like(patch_mask), truth.regions.any(dim=1))
        facts["patch_precision"] = (hits / total.clamp(min=1)).item()
        hits, total = mask_precision(word_mask, truth.attribute, truth.visible)
        facts["word_precision"] = (hits / total.clamp(min=1)).item()
    return facts


def negatives(run: Run, batch: dict, dataset: PairDataset) -> dict:
    """Choose the ITM negatives of every image: the hard caption, and the semi-hard one at each margin.

    -> cosines (B, B) of images and captions; columns of the negatives, −1 where there is none; with ground truth also
    `false_negatives` (B, B): the pairs that would be false"""
    momentum = run.momentum.model
    image_feat_m = momentum.project_image(momentum.vision(batch["images"]))
    text_feat_m = momentum.project_text(momentum.text(batch["token_ids"], batch["attention_mask"]))
    cosines = image_feat_m @ text_feat_m.T
    positives = positive_pairs(batch["product_ids"], batch["caption_ids"])
    margins = [stop * (run.config.margin or 0.2) for stop in MARGIN_STOPS]
    hard = pick_negatives(cosines, positives, "hard")
    semihard = [pick_negatives(cosines, positives, "semihard", None, margin).tolist() for margin in margins]
    found = {"cosines": cosines.tolist(), "margins": margins, "hard": hard.tolist(), "semihard": semihard}
    if isinstance(dataset, Synthetic):
        products = batch["product_ids"].tolist()
        is_caption = [[dataset.caption_matches(product, row) for product in products] for row in batch["rows"].tolist()]
        found["false_negatives"] = (torch.tensor(is_caption) & ~positives).tolist()
    return found


def page(found: dict) -> str:
    """Fill the template with the data, no text of which can end the element that holds it."""
    template = Path(__file__).with_name("explorer.html").read_text(encoding="utf-8")
    data = json.dumps(found, allow_nan=False, separators=(",", ":"))
    return template.replace("{{data}}", data.replace("<", "\\u003c"))


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser("explore.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", type=Path, required=True, help="last.pt of a pretraining, of any recipe")
    parser.add_argument("--root", help="folder of the data set (default: where it was in training)")
    args = parser.parse_args(argv)
    file = args.checkpoint.parent / "explore.html"
    try:
        run, dataset = open_run(args.checkpoint, args.root, "cpu")
        found = gather(run, dataset)
        file.write_text(page(found), encoding="utf-8")
    except (ConfigError, DataError, OSError) as error:
        sys.exit(f"explore.py: {error}")
    print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB, {len(found['images'])} images")


if __name__ == "__main__":
    main()
