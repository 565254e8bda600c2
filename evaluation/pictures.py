"""The pictures that runs leave: curves, masks, answers, confusion."""

import textwrap
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer
from torch import Tensor

from data import encode, normalise, to_device
from engine.run import Run, autocast
from evaluation.ground_truth import synchronized_masks
from masking import itm_grad_cam, random_patch_mask, random_word_mask, soft_mask
from readers.dataset import PairDataset, pad_to_square
from readers.prompts import Text

# of curves.png: title -> keys of metrics.jsonl; each with its value for random masks, key_random, where there is one
PANELS = {
    "loss": ["itc", "itm", "mlm", "mim", "rtd", "align", "class"],
    "held-out recall": ["val_i2t_r1", "val_i2t_r5", "val_i2t_r10", "val_t2i_r1", "val_t2i_r5", "val_t2i_r10"],
    "held-out recall by image and text": ["val_r1", "val_r10", "val_r50"],
    "held-out accuracy": ["val_itm_accuracy", "val_mlm_accuracy", "choice_fine", "choice_fine_itm"],
    "held-out": ["val_accuracy", "val_macro_f1"],
    "what the photo adds, held out": ["val_image_gain", "image_gain_coarse", "image_gain_fine"],
    "held-out truth of the masks": ["patch_precision", "word_precision", "pointing_game"],
}


def draw_curves(lines: list[dict], path: Path) -> None:
    """Draw the metrics over the steps, in as many of PANELS as there are metrics for."""
    panels = {}
    for title, keys in PANELS.items():
        both = [name for key in keys for name in (key, f"{key}_random")]
        logged = [name for name in both if any(name in line for line in lines)]
        if logged:
            panels[title] = logged
    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, keys) in zip(axes, panels.items(), strict=True):
        for key in keys:
            steps = [line["step"] for line in lines if key in line]
            values = [line[key] for line in lines if key in line]
            style = {}
            if key.endswith("_random"):  # dotted, in the colour of the curve before
                style = {"linestyle": ":", "color": axis.lines[-1].get_color()}
            marker = "." if len(steps) < 20 else None
            axis.plot(steps, values, label=key.removeprefix("val_"), marker=marker, **style)
        axis.set(title=title, xlabel="step", ylim=(0, 1.02) if "held-out" in title else (0, None))
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


INK, PAPER, GREY = (30, 30, 34), (255, 255, 255), (150, 150, 156)
LINE = 22  # pixels from one line of text to the next


def first_images(dataset: PairDataset, count: int) -> list[int]:
    """One photo of each of the first `count` products: the first of one, the second of the next, and so on."""
    chosen = []
    for product in np.unique(dataset.product_ids)[:count]:
        rows = np.flatnonzero(dataset.product_ids == product)
        chosen.append(int(rows[product % len(rows)]))
    return chosen


def draw_masks(run: Run, dataset: PairDataset, rows: list[int], path: Path) -> None:
    """Draw, for each image, what random and synchronized masks hide of the image and of its caption, and what a soft
    mask of one random word, marked in the caption, suppresses."""
    batch = run.collate([dataset[row] for row in rows])
    if not len(batch["rows"]):  # no image can be decoded
        return
    pixels = batch["images"].permute(0, 2, 3, 1).numpy()  # (B, S, S, 3) uint8
    captions = [dataset.text(row) for row in batch["rows"].tolist()]
    batch = to_device(batch, run.device)
    batch["images"] = normalise(batch["images"])
    masks = example_masks(run, batch)

    # the font that matplotlib brings: Pillow's own has no accents
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 14)
    side, cell, column_width = 150, 160, 360  # of an image, of an image with its margin, of a caption
    text_left = 10 + cell * (len(masks) + 1)
    page = Image.new("RGB", (text_left + column_width * len(masks), 30 + 5 * cell * len(pixels)), PAPER)
    pen = ImageDraw.Draw(page)
    for column, title in enumerate(masks):
        pen.text((10 + cell * (column + 1), 8), title, INK, font)
        pen.text((text_left + column_width * column, 8), f"{title}: words", INK, font)
    top = 30
    for i, caption in enumerate(captions):
        image = Image.fromarray(pixels[i]).resize((side, side), Image.Resampling.BICUBIC)
        page.paste(image, (10, top))
        bottom = top + side
        for column, (patch_mask, word_mask) in enumerate(masks.values()):
            covered = cover(image, patch_mask[i], run.config.model.grid)
            page.paste(covered, (10 + cell * (column + 1), top))
            corner = (text_left + column_width * column, top)
            foot = draw_caption(pen, font, run.tokenizer, caption, word_mask[i], corner)
            bottom = max(bottom, foot)
        top = bottom + 10
    page.crop((0, 0, page.width, top)).save(path)


def example_masks(run: Run, batch: dict) -> dict[str, tuple[Tensor, Tensor]]:
    """Make a mask of each kind for a batch with normalised images. -> title -> patch mask (B, P), word mask (B, L)"""
    config, words = run.config, batch["maskable"]
    run.model.eval()
    generator = torch.Generator(run.device).manual_seed(config.seed)
    _, sync_patches, sync_words = synchronized_masks(run, batch, generator)
    random_patches = random_patch_mask(len(words), config.model.grid**2, config.mim_ratio, generator, run.device)
    random_words = random_word_mask(words, config.mlm_ratio, generator)
    masks = {"random": (random_patches, random_words), "synchronized": (sync_patches, sync_words)}
    if config.model.fusion_layers > 1:
        masks["soft"] = example_soft_mask(run, batch, generator)
    return masks


def momentum_grad_cam(run: Run, batch: dict) -> Tensor:
    """Compute Grad-CAM of the momentum encoder's ITM logit of a batch with normalised images. -> (B, h, L, N)"""
    momentum, attention_mask = run.momentum.model, batch["attention_mask"]
    with autocast(run), torch.enable_grad():
        image_kv = momentum.fusion.project_image_kv(momentum.vision(batch["images"]))
        text_embeds = momentum.text(batch["token_ids"], attention_mask).requires_grad_()
        fused, attentions = momentum.fusion(text_embeds, attention_mask, image_kv, return_attention=True)
        return itm_grad_cam(momentum, attentions, fused)


def example_soft_mask(run: Run, batch: dict, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Make the soft mask (B, P) of one random word of each caption; the word as a mask (B, L)."""
    maps = momentum_grad_cam(run, batch)
    words = batch["maskable"] > 0
    drawn = torch.multinomial(words.float().clamp(min=1e-9), 1, generator=generator)  # (B, 1), also without words
    word_mask = torch.zeros_like(words).scatter(1, drawn, True) & words
    return soft_mask(maps, drawn.squeeze(1)), word_mask


def cover(image: Image.Image, patch_mask: Tensor, grid: int) -> Image.Image:
    """Lay grey over the masked patches of an image, as much as the mask (P,) in [0, 1] says."""
    opacity = (patch_mask.float() * 255).byte().view(grid, grid).cpu().numpy()
    opacity = Image.fromarray(opacity).resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", image.size, GREY), image, opacity)


def draw_caption(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont,
    tokenizer: Tokenizer,
    caption: Text,
    word_mask: Tensor,
    corner: tuple[int, int],
) -> int:
    """Write a caption with its masked tokens, word_mask (L,), in white on black, and … where the model's input is cut.
    -> the lower end in pixels"""
    encoding = encode(tokenizer, [caption])[0]
    left, y = corner
    x = left
    end_before = None
    for piece, (start, stop), masked in zip(encoding.word_ids, encoding.offsets, word_mask.tolist(), strict=False):
        if piece is None:  # [CLS], [SEP]
            continue
        if end_before not in (None, (piece, start)):  # a new word
            x += 5
            if x > left + 280:  # pixels
                x, y = left, y + LINE
        token = caption[piece][start:stop]
        size = font.getlength(token)
        if masked:
            pen.rectangle((x - 1, y, x + size + 1, y + LINE - 3), INK)
        pen.text((x, y), token, PAPER if masked else INK, font)
        x += size + 1
        end_before = (piece, stop)
    if encoding.overflowing:
        pen.text((x + 5, y), "…", INK, font)
    return y + LINE


def draw_confusion(labels: Tensor, preds: Tensor, names: list[str], path: Path) -> None:
    """Draw which classes the images of each class were predicted as, in shares of the row; classes that occur alone."""
    classes = len(names)
    counts = (labels * classes + preds).bincount(minlength=classes**2).view(classes, classes)
    occurring = torch.cat([labels, preds]).unique()
    counts = counts[occurring][:, occurring]
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)

    side = min(max(4.0, 0.22 * len(counts) + 2), 40.0)  # inches
    figure = Figure(figsize=(side, side), layout="constrained")
    axis = figure.subplots()
    axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    ticks = [names[label] for label in occurring.tolist()]
    axis.set_xticks(range(len(ticks)), ticks, rotation=90, fontsize=7, parse_math=False)  # a $ is a $
    axis.set_yticks(range(len(ticks)), ticks, fontsize=7, parse_math=False)
    axis.set(xlabel="prediction", ylabel="label", title="colour: share of the label")
    for row, column in counts.nonzero().tolist():
        colour = "white" if shares[row, column] > 0.5 else "k"
        axis.text(column, row, int(counts[row, column]), ha="center", va="center", fontsize=5, color=colour)
    figure.savefig(path, dpi=130)


Answer = tuple[int, str, bool]  # row, note, is it a right one?


def draw_answers(dataset: PairDataset, queries: list[tuple[str, Image.Image | None, list[Answer]]], path: Path) -> None:
    """Draw a line for each query, a text with or without an image, with its best images; right ones are framed."""
    columns = 2 + max(len(answers) for _, _, answers in queries)
    figure = Figure(figsize=(1.4 * columns, 1.5 * len(queries)), layout="constrained")
    axes = figure.subplots(len(queries), columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for line, (text, image, answers) in zip(axes, queries, strict=True):
        lines = textwrap.wrap(text, 42 if image is None else 20)
        line[0].text(0, 1, "\n".join(lines[:8]), va="top", fontsize=8, parse_math=False, in_layout=False)
        if image is not None:
            line[1].imshow(pad_to_square(image, dataset.image_size), interpolation="bicubic")
        for axis, (row, note, right) in zip(line[2:], answers, strict=False):
            axis.axis("on")
            axis.imshow(pad_to_square(dataset.image(row), dataset.image_size), interpolation="bicubic")
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(note, fontsize=8)
            axis.spines[:].set(color="tab:green" if right else "white", linewidth=3)
    figure.savefig(path, dpi=100)
