"""One page to look into a trained model with: where its words attend, its masks, its negatives.

python tutorial/explore.py --checkpoint runs/…/last.pt      writes runs/…/explore.html, which opens offline

Python computes everything here, in fp32, by the functions that train and measure. The page (explorer/) only draws it.
Masks and negatives come computed for the five stops of each slider.

Letters: B images, L text tokens, N image tokens, P patches, h heads, M masked patches, S side of an image.
"""

import argparse
import base64
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor

from data import imagenet, normalise, to_device
from engine.flags import ConfigError
from engine.run import Run
from evaluation.pictures import first_photos
from evaluation.truth import WordTruth, synchronized_masks, word_truth
from experiments.figures import open_run
from losses import pick_negatives, same_pairs
from masking import (
    MaskSource,
    cooccurrence,
    grad_cam,
    middle_layer,
    random_patch_mask,
    random_word_mask,
    soft_mask,
    split_patches,
)
from readers.dataset import DataError, PhotoDataset
from readers.synthetic import Synthetic

PARTS = Path(__file__).parent / "explorer"
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the patches and of the words, the stops of the slider for masks
MARGIN_STOPS = (0.0, 0.5, 1.0, 1.5, 2.0)  # times the margin of the run
SPECIAL = ("[PAD]", "[CLS]", "[SEP]")


def gather(run: Run, dataset: PhotoDataset, count: int) -> dict:
    """Compute all that the page shows, of one image of each of the first `count` products. -> what JSON can hold."""
    run.config = replace(run.config, precision="fp32")
    run.model.eval()
    dataset.truths = isinstance(dataset, Synthetic)
    batch = run.collate([dataset[row] for row in first_photos(dataset, count)])
    if len(batch["rows"]) < 2:
        raise DataError("the page needs photos of at least two products of the validation split, which can be decoded")
    batch = to_device(batch, run.device)
    config = run.config
    truth = word_truth(batch, config.model.grid) if dataset.truths else None
    with torch.no_grad():
        return {
            "run": {"recipe": config.recipe, "preset": config.preset, "data": config.data, "step": run.step},
            "grid": config.model.grid,
            "images": [to_jpeg(image) for image in batch["images"]],
            "captions": captions(run, batch, truth),
            "shares": SHARES,
            "masks": masks(run, batch, truth),
            "negatives": negatives(run, batch, dataset),
        }


def to_jpeg(pixels: Tensor) -> str:
    """Encode an image (3, S, S) uint8 as a data address."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(file, "jpeg", quality=92, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def indices(mask: Tensor) -> list[int]:
    """List which entries of a mask (X,) are set."""
    return mask.nonzero()[:, 0].tolist()


def fixed_draws(run: Run) -> torch.Generator:
    """Seed a generator, so that a page draws the same each time it is written."""
    return torch.Generator(run.device).manual_seed(run.config.seed)


def captions(run: Run, batch: dict, truth: WordTruth | None) -> list[list[dict]]:
    """List the words of each caption, as the tokenizer splits it.

    A word that may be masked has a `place`, the place of its first token, and maps over the patches in 255ths: its
    attention by each mask source, scaled to its highest patch, and its soft mask. With ground truth it also has
    `named`, whether it names an attribute, and `region`, the patches that show the attribute.
    """
    maps = {"soft": soft_masks(run, batch)}
    for source in get_args(MaskSource):
        attention, *_ = synchronized(run, batch, source, SHARES[0])
        maps[source] = attention / attention.amax(dim=2, keepdim=True)
    maps = {name: (255 * values).round().byte() for name, values in maps.items()}  # (B, L, P) each
    found = []
    for b, ids in enumerate(batch["token_ids"].tolist()):
        caption = []
        for place, token in enumerate(map(run.tokenizer.id_to_token, ids)):
            if token in SPECIAL:
                continue
            if token.startswith("##") and caption:
                caption[-1]["text"] += token.removeprefix("##")
                continue
            word = {"text": token}
            if batch["words"][b, place]:
                word["place"] = place
                word |= {name: values[b, place].tolist() for name, values in maps.items()}
                if truth:
                    word |= {"named": bool(truth.attribute[b, place]), "region": indices(truth.regions[b, place])}
            caption.append(word)
        found.append(caption)
    return found


def synchronized(run: Run, batch: dict, source: MaskSource, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Make synchronized masks as training does. -> attention (B, L, P), patch mask (B, P), word mask (B, L)."""
    trained = run.config
    run.config = replace(trained, mask_source=source, mim_ratio=share, mlm_ratio=share)
    made = synchronized_masks(run, batch, fixed_draws(run))
    run.config = trained
    return made


def soft_masks(run: Run, batch: dict) -> Tensor:
    """Compute the soft mask of every token from the layer that the recipe `softmask` reads. -> (B, L, P)

    With one fusion layer all are 0: the ITM head reads [CLS] alone, so other rows of that layer have no gradient."""
    momentum = run.momentum.model
    image_kv = momentum.fusion.project_image_kv(momentum.vision(normalise(batch["images"])))
    text_embeds = momentum.text(batch["token_ids"], batch["attention_mask"])
    with torch.enable_grad():
        text_embeds = text_embeds.detach().requires_grad_()
        fused, attentions = momentum.fusion(text_embeds, batch["attention_mask"], image_kv, return_attention=True)
        match_logit = momentum.itm_logits(fused)[:, 1].sum()
        maps = grad_cam(attentions[middle_layer(len(attentions))], match_logit)  # (B, h, L, N)
    rows, tokens = batch["words"].shape
    by_token = [soft_mask(maps, torch.full((rows,), place, device=run.device)) for place in range(tokens)]
    return torch.stack(by_token, dim=1)


def masks(run: Run, batch: dict, truth: WordTruth | None) -> dict[str, list[dict]]:
    """Make random masks and synchronized ones of each source, for each of SHARES; of the recipe `syncmask` also what
    MIM reconstructs from the mask that the run trains with."""
    own_source, words, grid = run.config.mask_source, batch["words"], run.config.model.grid
    found = {name: [] for name in ("random", *get_args(MaskSource))}
    for share in SHARES:
        draws = fixed_draws(run)
        patch_mask = random_patch_mask(len(words), grid**2, share, draws, run.device)
        found["random"].append(mask_facts(patch_mask, random_word_mask(words, share, draws), truth))
        for source in get_args(MaskSource):
            _, patch_mask, word_mask = synchronized(run, batch, source, share)
            facts = mask_facts(patch_mask, word_mask, truth)
            if source == own_source and run.config.recipe == "syncmask" and run.config.mim_weight:
                facts["reconstructed"] = [to_jpeg(image) for image in reconstruct(run, batch, patch_mask, share)]
            found[source].append(facts)
    return found


def mask_facts(patch_mask: Tensor, word_mask: Tensor, truth: WordTruth | None) -> dict:
    """List the masked patches and tokens of each image, and the precision over all images where the truth is known.

    patch_mask (B, P), word_mask (B, L)"""
    facts = {"patches": [indices(mask) for mask in patch_mask], "tokens": [indices(mask) for mask in word_mask]}
    if truth:
        on_named = truth.regions.any(dim=1)  # (B, P)
        hits, total = cooccurrence(patch_mask, torch.ones_like(patch_mask), on_named)
        facts["patch_precision"] = (hits / total.clamp(min=1)).item()
        hits, total = cooccurrence(word_mask, truth.attribute, truth.visible)
        facts["word_precision"] = (hits / total.clamp(min=1)).item()
    return facts


def reconstruct(run: Run, batch: dict, patch_mask: Tensor, share: float) -> Tensor:
    """Predict the masked patches from the others and the caption. -> uint8 (B, 3, S, S)"""
    model, images = run.model, normalise(batch["images"])
    ids_keep, ids_masked = split_patches(patch_mask, share)
    text_embeds = model.text(batch["token_ids"], batch["attention_mask"])
    visible_embeds = model.vision(images, ids_keep)
    pixels = model.decoder(visible_embeds, ids_keep, ids_masked, text_embeds, batch["attention_mask"])
    return paint(images, pixels, ids_masked)


def paint(images: Tensor, pixels: Tensor, ids_masked: Tensor) -> Tensor:
    """Put predicted patches into normalised images. MIM predicts a patch up to mean and deviation of its pixels (see
    `mim_loss`), which are taken from the image.

    images (B, 3, S, S), pixels (B, M, 3p²), ids_masked (B, M) -> uint8 (B, 3, S, S)"""
    side = round((pixels.shape[2] / 3) ** 0.5)
    rows = images.shape[2] // side
    patches = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=side, q=side)
    where = repeat(ids_masked, "b m -> b m x", x=pixels.shape[2])
    std, mean = torch.std_mean(patches.gather(1, where), dim=2, keepdim=True, correction=0)
    patches = patches.scatter(1, where, pixels * std + mean)
    painted = rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=side, q=side)
    mean, std = imagenet(images.device)
    return (255 * (painted * std + mean)).round().clamp(0, 255).byte()


def negatives(run: Run, batch: dict, dataset: PhotoDataset) -> dict:
    """Choose the ITM negatives of every image and every caption: the hard one, and the semi-hard one at each margin.

    -> cosines (B, B) of images and captions; `false` (B, B), which pairs would be false negatives, only with ground
    truth; `chosen`, by whether an image or a caption is the anchor, where −1 stands for none"""
    forbidden = same_pairs(batch["product_ids"], batch["caption_ids"])
    momentum = run.momentum.model
    image_feat = momentum.project_image(momentum.vision(normalise(batch["images"])))
    text_feat = momentum.project_text(momentum.text(batch["token_ids"], batch["attention_mask"]))
    cosines = image_feat @ text_feat.T
    margins = [stop * (run.config.margin or 0.2) for stop in MARGIN_STOPS]
    chosen = {}
    for anchor, scores in (("image", cosines), ("caption", cosines.T)):
        hard = pick_negatives(scores, forbidden, None, "hard")
        semihard = [pick_negatives(scores, forbidden, None, "semihard", None, margin) for margin in margins]
        chosen[anchor] = {"hard": hard.tolist(), "semihard": [by_margin.tolist() for by_margin in semihard]}
    found = {"cosines": cosines.tolist(), "margins": margins, "chosen": chosen}
    if isinstance(dataset, Synthetic):
        rows, products = batch["rows"].tolist(), batch["product_ids"].tolist()
        described = [[dataset.describes(product, row) for product in products] for row in rows]
        found["false"] = (torch.tensor(described, device=run.device) & ~forbidden).tolist()
    return found


def page(found: dict) -> str:
    """Fill the template with style, script and data. No text of the data can end the element that holds it."""
    made = (PARTS / "template.html").read_text(encoding="utf-8")
    for name in ("style.css", "explorer.js"):
        made = made.replace("{{" + name + "}}", (PARTS / name).read_text(encoding="utf-8"))
    data = json.dumps(found, allow_nan=False, separators=(",", ":"))
    return made.replace("{{data}}", data.replace("<", "\\u003c"))


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser("explore.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", type=Path, required=True, help="last.pt of a pretraining, of any recipe")
    parser.add_argument("--root", help="folder of the data set (default: where it was in training)")
    parser.add_argument("--file", type=Path, help="page to write (default explore.html beside the checkpoint)")
    parser.add_argument("--photos", type=int, default=24, help="photos to look into, one a product (default 24)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    file = args.file or args.checkpoint.parent / "explore.html"
    if not 2 <= args.photos <= 64:
        parser.error(f"--photos {args.photos}: from 2 to 64")
    try:
        run, dataset = open_run(args.checkpoint, args.root, args.device)
        found = gather(run, dataset, args.photos)
        file.write_text(page(found), encoding="utf-8")
    except (ConfigError, DataError, OSError) as error:
        sys.exit(f"explore.py: {error}")
    print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB, {len(found['images'])} photos")


if __name__ == "__main__":
    main()
