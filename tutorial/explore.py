"""Write a page that shows where a trained model attends, what it would mask, and which negatives it would choose.

python tutorial/explore.py      # writes explore.html, which opens offline

Python computes all values in fp32, by the functions of training and validation. The page (explorer.html) draws them.
Each slider of the page has five stops, and their masks and negatives are computed beforehand.

Letters: B images, L text tokens, P patches, S side of an image.
"""

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
from engine.checkpoints import default_checkpoint
from engine.flags import ConfigError, OneLineParser, in_one_line
from engine.log import write_text
from engine.run import Run
from evaluation.ground_truth import TokenLabels, synchronized_masks, token_labels
from evaluation.pictures import first_images, momentum_grad_cam
from experiments.figures import open_run
from losses import pick_negatives, positive_pairs
from masking import mask_precision, random_patch_mask, random_word_mask, soft_mask
from readers.dataset import DataError, PairDataset
from readers.synthetic import Synthetic

IMAGES = 24  # one of each product
MASK_RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)  # shares of patches and words to mask, the stops of a slider
MARGIN_FACTORS = (0.0, 0.5, 1.0, 1.5, 2.0)  # times the margin of the run, the stops of a slider
DEFAULT_MARGIN = 0.2  # cosine; for runs without a margin
SPECIAL_TOKENS = ("[PAD]", "[CLS]", "[SEP]")


def compute_page_data(run: Run, dataset: PairDataset) -> dict:
    """Compute all that the page shows, for one image of each of the first IMAGES products.

    Returns values that JSON can hold: about, grid, ground_truth, images, captions, mask_ratios, masks, negatives.
    Raises DataError where fewer than two images can be decoded.
    """
    config = run.config = replace(run.config, precision="fp32")
    run.model.eval()
    dataset.with_ground_truth = isinstance(dataset, Synthetic)
    batch = run.collate([dataset[row] for row in first_images(dataset, IMAGES)])
    count = len(batch["rows"])
    if count < 2:
        raise DataError(
            f"{config.data}: {count} of the first {IMAGES} images of the validation split can be decoded, and the page "
            "needs at least two; give --root with other files"
        )
    labels = token_labels(batch, config.model.grid) if dataset.with_ground_truth else None
    images = [to_data_url(pixels) for pixels in batch["images"]]
    batch["images"] = normalise(batch["images"])
    return {
        "about": f"Recipe {config.recipe}, preset {config.preset}, data {config.data}, {run.step} training steps. "
        f"{count} images of held-out products.",
        "grid": config.model.grid,
        "ground_truth": dataset.with_ground_truth,
        "images": images,
        "captions": describe_captions(run, batch, labels),
        "mask_ratios": MASK_RATIOS,
        "masks": make_masks(run, batch, labels),
        "negatives": choose_negatives(run, batch, dataset),
    }


def to_data_url(pixels: Tensor) -> str:
    """Encode an image (3, S, S) uint8 as JPEG in a data URL."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "jpeg", quality=92, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def describe_captions(run: Run, batch: dict, labels: TokenLabels | None) -> list[list[dict]]:
    """List the words of each caption, as the tokenizer splits it.

    Every word has its `text`. A word that may be masked also has `index`, the index of its first token, and maps over
    the patches, in integers from 0 to 255:
        masked, clean   its attention while it is masked, and while it is not; the highest patch has 255
        soft            its soft mask
    With ground truth it also has `is_attribute`, and `region` (0 or 1): the patches that show the attribute.
    """
    maps = {"soft": make_soft_masks(run, batch)}
    for source in ("masked", "clean"):
        attention, _, _ = make_sync_masks(run, batch, MASK_RATIOS[0], source)
        maps[source] = attention / attention.amax(dim=2, keepdim=True)
    captions = []
    for b, token_ids in enumerate(batch["token_ids"].tolist()):
        caption = []
        for index, token in enumerate(map(run.tokenizer.id_to_token, token_ids)):
            if token in SPECIAL_TOKENS:
                continue
            if token.startswith("##") and caption:
                caption[-1]["text"] += token.removeprefix("##")
                continue
            word = {"text": token}
            if batch["maskable"][b, index]:
                word["index"] = index
                for name, values in maps.items():
                    word[name] = (255 * values[b, index]).round().int().tolist()
                if labels:
                    word["is_attribute"] = bool(labels.attribute[b, index])
                    word["region"] = labels.regions[b, index].int().tolist()
            caption.append(word)
        captions.append(caption)
    return captions


def make_sync_masks(run: Run, batch: dict, ratio: float, source: str) -> tuple[Tensor, Tensor, Tensor]:
    """Make synchronized masks as training does, with this share of patches and words and this --mask-source.

    At least this share of the words is scored, too. Returns attention (B, L, P), patch mask (B, P), word mask (B, L).
    """
    config = replace(run.config, mask_source=source, mim_ratio=ratio, mlm_ratio=ratio)
    generator = torch.Generator().manual_seed(config.seed)
    return synchronized_masks(replace(run, config=config), batch, generator)


def make_soft_masks(run: Run, batch: dict) -> Tensor:
    """Make the soft mask of every token. Returns (B, L, P).

    A model with one fusion layer has soft masks of 0: the ITM head reads [CLS] alone, so the rows of other tokens in
    the last layer have no gradient.
    """
    maps = momentum_grad_cam(run, batch)  # (B, h, L, N)
    num_images, num_tokens = batch["token_ids"].shape
    by_token = [soft_mask(maps, torch.full((num_images,), index)) for index in range(num_tokens)]
    return torch.stack(by_token, dim=1)


def make_masks(run: Run, batch: dict, labels: TokenLabels | None) -> dict[str, list[dict]]:
    """Make random and synchronized masks. Returns for each kind a list over MASK_RATIOS, see `summarize_masks`."""
    maskable = batch["maskable"]
    num_patches = run.config.model.grid**2
    masks = {"Random": [], "Synchronized": []}
    for ratio in MASK_RATIOS:
        generator = torch.Generator().manual_seed(run.config.seed)
        random_patches = random_patch_mask(len(maskable), num_patches, ratio, generator)
        random_words = random_word_mask(maskable, ratio, generator)
        masks["Random"].append(summarize_masks(random_patches, random_words, labels))
        _, sync_patches, sync_words = make_sync_masks(run, batch, ratio, run.config.mask_source)
        masks["Synchronized"].append(summarize_masks(sync_patches, sync_words, labels))
    return masks


def summarize_masks(patch_mask: Tensor, word_mask: Tensor, labels: TokenLabels | None) -> dict:
    """List a patch mask (B, P) and a word mask (B, L) as 0 and 1; with labels also their precision over all images."""
    summary = {"patches": patch_mask.int().tolist(), "words": word_mask.int().tolist()}
    if labels:
        is_named = labels.regions.any(dim=1)  # (B, P): patches that show something that the caption names
        hits, total = mask_precision(patch_mask, torch.ones_like(patch_mask), is_named)
        summary["patch_precision"] = (hits / total.clamp(min=1)).item()
        hits, total = mask_precision(word_mask, labels.attribute, labels.visible)
        summary["word_precision"] = (hits / total.clamp(min=1)).item()
    return summary


def choose_negatives(run: Run, batch: dict, dataset: PairDataset) -> dict:
    """Choose negatives for every image among the captions of the batch.

    Returns cosines (B, B) of images and captions; margins; `hard` (B,) and `semihard` (margins, B): the columns of the
    chosen captions, −1 where there is none. With ground truth also `is_false` (B, B): captions of other products that
    describe the image.
    """
    momentum = run.momentum.model
    image_feat_m = momentum.project_image(momentum.vision(batch["images"]))
    text_feat_m = momentum.project_text(momentum.text(batch["token_ids"], batch["attention_mask"]))
    cosines = image_feat_m @ text_feat_m.T
    positives = positive_pairs(batch["product_ids"], batch["caption_ids"])
    margins = [factor * (run.config.margin or DEFAULT_MARGIN) for factor in MARGIN_FACTORS]
    hard = pick_negatives(cosines, positives, "hard")
    semihard = [pick_negatives(cosines, positives, "semihard", None, margin).tolist() for margin in margins]
    negatives = {"cosines": cosines.tolist(), "margins": margins, "hard": hard.tolist(), "semihard": semihard}
    if isinstance(dataset, Synthetic):
        products = batch["product_ids"].tolist()
        matches = []
        for row in batch["rows"].tolist():
            matches.append([dataset.caption_matches(product, row) for product in products])
        negatives["is_false"] = (torch.tensor(matches) & ~positives).tolist()
    return negatives


def fill_page(page_data: dict) -> str:
    """Return the page with this data. No text in the data can end the element that holds the data."""
    template = Path(__file__).with_name("explorer.html").read_text(encoding="utf-8")
    data = json.dumps(page_data, allow_nan=False, separators=(",", ":"))
    return template.replace("{{data}}", data.replace("<", "\\u003c"))


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Exits with one line where the checkpoint or its data cannot be used."""
    parser = OneLineParser("explore.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=default_checkpoint(),
        help="last.pt of a pretraining run of any recipe, or a folder of experiments/export.py (default %(default)s)",
    )
    parser.add_argument(
        "--file", type=Path, help="page to write (default explore.html beside last.pt, or here for a folder)"
    )
    parser.add_argument("--root", help="folder of the data set (default: the folder in training)")
    args = parser.parse_args(argv)
    folder = Path() if args.checkpoint.is_dir() else args.checkpoint.parent
    path = args.file or folder / "explore.html"
    try:
        run, dataset = open_run(args.checkpoint, args.root, "cpu")
        page_data = compute_page_data(run, dataset)
        write_text(path, fill_page(page_data))
    except (ConfigError, DataError, OSError) as error:
        sys.exit(f"explore.py: {in_one_line(error)}")
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, {len(page_data['images'])} images; open it in a browser")


if __name__ == "__main__":
    main()
