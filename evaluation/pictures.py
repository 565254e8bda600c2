"""The pictures of a run: curves of its metrics, masks, search results, confusion matrices.

Letters: B batch, S side of an image in pixels, L text tokens, P patches, N image tokens, h heads, n images.
"""

import contextlib
import re
import textwrap
from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer
from torch import Tensor

from data import encode, normalise, to_device
from engine.log import name_in_errors
from engine.run import Run, autocast
from evaluation.ground_truth import synchronized_masks
from masking import itm_grad_cam, random_patch_mask, random_word_mask, soft_mask
from readers.dataset import PairDataset, pad_to_square
from readers.prompts import Text

# The panels of curves.png: title -> keys of metrics.jsonl. Each key is drawn with key_random, its value for random
# masks, where the run has it. The values of "held-out" panels are shares.
PANELS = {
    "loss": ["itc", "itm", "mlm", "mim", "rtd", "align", "class"],
    "held-out recall": ["val_i2t_r1", "val_i2t_r5", "val_i2t_r10", "val_t2i_r1", "val_t2i_r5", "val_t2i_r10"],
    "held-out recall by image and text": ["val_r1", "val_r10", "val_r50"],
    "held-out accuracy": ["val_itm_accuracy", "val_mlm_accuracy", "choice_fine", "choice_fine_itm"],
    "held-out": ["val_accuracy", "val_macro_f1"],
    "image gain": ["val_image_gain", "image_gain_coarse", "image_gain_fine"],
    "held-out masks against the ground truth": ["patch_precision", "word_precision", "pointing_game"],
}


# the font that matplotlib brings: Pillow's own has no accents
DEJAVU = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


@cache
def find_font(text: str) -> str | None:
    """Find a font file that has all letters of a text: DejaVu Sans, or else one of the system. -> None without one"""
    # fonts of last resort draw boxes, emoji fonts bitmaps that matplotlib cannot scale
    system_fonts = [font.fname for font in fontManager.ttflist if not re.search("Resort|Emoji", font.name)]
    for path in (DEJAVU, *system_fonts):
        with contextlib.suppress(OSError, RuntimeError):  # a font that was removed, or is damaged
            font = FT2Font(path)
            if all(font.get_char_index(ord(letter)) for letter in text if not letter.isspace()):
                return path
    return None


def picture_labels(names: list[str]) -> list[str]:
    """Return the names as pictures show them: "no. 3" in place of the third one, where no font has its letters."""
    return [name if find_font(name) else f"no. {number}" for number, name in enumerate(names, 1)]


def draw_curves(lines: list[dict], path: Path) -> None:
    """Draw the metrics over the steps, one panel of PANELS for each group that the run has.

    lines: of metrics.jsonl
    """
    logged_keys = {key for line in lines for key in line}
    panels = {}
    for title, keys in PANELS.items():
        panel_keys = []
        for key in keys:
            panel_keys += [name for name in (key, f"{key}_random") if name in logged_keys]
        if panel_keys:
            panels[title] = panel_keys
    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, keys) in zip(axes, panels.items(), strict=True):
        for key in keys:
            steps = [line["step"] for line in lines if key in line]
            values = [line[key] for line in lines if key in line]
            style = {}
            if key.endswith("_random"):  # dotted, in the colour of its metric
                style = {"linestyle": ":", "color": axis.lines[-1].get_color()}
            marker = "." if len(steps) < 20 else None
            axis.plot(steps, values, label=key.removeprefix("val_"), marker=marker, **style)
        axis.set(title=title, xlabel="step")
        if "held-out" in title:
            axis.set_ylim(0, 1.02)
        elif title == "loss":
            axis.set_ylim(0, None)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    with name_in_errors(path):
        figure.savefig(path, dpi=110)


INK, PAPER, GREY = (30, 30, 34), (255, 255, 255), (150, 150, 156)
LINE_HEIGHT = 22  # pixels from one line of text to the next


def first_images(dataset: PairDataset, count: int) -> list[int]:
    """Select one image of each of the first `count` products: the first of one, the second of the next, and so on.

    -> rows
    """
    selected = []
    for product in np.unique(dataset.product_ids)[:count]:
        rows = np.flatnonzero(dataset.product_ids == product)
        selected.append(int(rows[product % len(rows)]))
    return selected


def draw_masks(run: Run, dataset: PairDataset, rows: list[int], path: Path) -> None:
    """Draw some images and captions with random, synchronized and soft masks.

    The soft mask is of one random word, which is marked in the caption.
    run: its momentum encoder makes the masks
    rows: the images
    """
    batch = run.collate([dataset[row] for row in rows])
    if not len(batch["rows"]):  # no image can be decoded
        return
    pixels = batch["images"].permute(0, 2, 3, 1).numpy()  # (B, S, S, 3) uint8
    captions = [dataset.text(row) for row in batch["rows"].tolist()]
    batch = to_device(batch, run.device)
    batch["images"] = normalise(batch["images"])
    masks = example_masks(run, batch)

    font = ImageFont.truetype(DEJAVU, 14)
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
            masked_image = grey_out_patches(image, patch_mask[i], run.config.model.grid)
            page.paste(masked_image, (10 + cell * (column + 1), top))
            corner = (text_left + column_width * column, top)
            caption_font = ImageFont.truetype(find_font("".join(caption)) or DEJAVU, 14)
            caption_bottom = draw_caption(pen, caption_font, run.tokenizer, caption, word_mask[i], corner)
            bottom = max(bottom, caption_bottom)
        top = bottom + 10
    with name_in_errors(path):
        page.crop((0, 0, page.width, top)).save(path)


def example_masks(run: Run, batch: dict) -> dict[str, tuple[Tensor, Tensor]]:
    """Make a mask of each kind. A single fusion layer has no soft mask: in the last layer only [CLS] matters to ITM.

    batch: on the device, with normalised images
    -> title -> patch mask (B, P), word mask (B, L)
    """
    config, maskable = run.config, batch["maskable"]
    run.model.eval()
    generator = torch.Generator(run.device).manual_seed(config.seed)
    _, sync_patches, sync_words = synchronized_masks(run, batch, generator)
    random_patches = random_patch_mask(len(maskable), config.model.grid**2, config.mim_ratio, generator, run.device)
    random_words = random_word_mask(maskable, config.mlm_ratio, generator)
    masks = {"random": (random_patches, random_words), "synchronized": (sync_patches, sync_words)}
    if config.model.fusion_layers > 1:
        masks["soft"] = example_soft_mask(run, batch, generator)
    return masks


def momentum_grad_cam(run: Run, batch: dict) -> Tensor:
    """Compute Grad-CAM of the momentum encoder's ITM logit. -> (B, h, L, N)

    batch: on the device, with normalised images
    """
    momentum, attention_mask = run.momentum.model, batch["attention_mask"]
    with autocast(run), torch.enable_grad():
        image_kv = momentum.fusion.project_image_kv(momentum.vision(batch["images"]))
        text_embeds = momentum.text(batch["token_ids"], attention_mask).requires_grad_()
        fused, attentions = momentum.fusion(text_embeds, attention_mask, image_kv, return_attention=True)
        return itm_grad_cam(momentum, attentions, fused)


def example_soft_mask(run: Run, batch: dict, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Make the soft mask of one random word of each caption.

    batch: on the device, with normalised images
    -> soft patch mask (B, P) in [0, 1]; the word as a mask (B, L), empty for a caption without words
    """
    maps = momentum_grad_cam(run, batch)
    is_word = batch["maskable"] > 0
    weights = is_word.float().clamp(min=1e-9)  # above 0, so that a caption without words can be drawn from
    word = torch.multinomial(weights, 1, generator=generator)  # (B, 1)
    word_mask = torch.zeros_like(is_word).scatter(1, word, True) & is_word
    return soft_mask(maps, word.squeeze(1)), word_mask


def grey_out_patches(image: Image.Image, patch_mask: Tensor, grid: int) -> Image.Image:
    """Cover the masked patches of an image with grey.

    patch_mask: (P,) in [0, 1], the opacity of the grey
    grid: patches along a side of the image
    """
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
    """Write a caption, with masked tokens in white on black, and … where the model's input is cut.

    pen, font: of the picture
    word_mask: (L,)
    corner: x and y of the upper left corner, pixels
    -> y of the lower end, pixels
    """
    encoding = encode(tokenizer, [caption])[0]
    left, y = corner
    x = left
    previous_end = None
    for segment, (start, stop), masked in zip(encoding.word_ids, encoding.offsets, word_mask.tolist(), strict=False):
        if segment is None:  # [CLS], [SEP]
            continue
        if previous_end is not None and previous_end != (segment, start):  # a new word
            x += 5
            if x > left + 280:  # pixels
                x, y = left, y + LINE_HEIGHT
        token = caption[segment][start:stop]
        size = font.getlength(token)
        if masked:
            pen.rectangle((x - 1, y, x + size + 1, y + LINE_HEIGHT - 3), INK)
        pen.text((x, y), token, PAPER if masked else INK, font)
        x += size + 1
        previous_end = (segment, stop)
    if encoding.overflowing:
        pen.text((x + 5, y), "…", INK, font)
    return y + LINE_HEIGHT


def draw_confusion(labels: Tensor, preds: Tensor, names: list[str], path: Path) -> None:
    """Draw the confusion matrix of the classes that occur: counts, coloured by their share of the label.

    labels, preds: (n,)
    names: of all classes; those that no font can write have the number that `picture_labels` gives
    """
    classes = len(names)
    counts = (labels * classes + preds).bincount(minlength=classes**2).view(classes, classes)
    present = torch.cat([labels, preds]).unique()  # classes that occur
    counts = counts[present][:, present]
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)

    side = min(max(4.0, 0.22 * len(counts) + 2), 40.0)  # inches
    figure = Figure(figsize=(side, side), layout="constrained")
    axis = figure.subplots()
    axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    labels_drawn = picture_labels(names)
    ticks = [labels_drawn[label] for label in present.tolist()]
    axis.set_xticks(range(len(ticks)), ticks, rotation=90, fontsize=7, parse_math=False)  # a $ is a $
    axis.set_yticks(range(len(ticks)), ticks, fontsize=7, parse_math=False)
    for tick in (*axis.get_xticklabels(), *axis.get_yticklabels()):
        tick.set_fontproperties(FontProperties(fname=find_font(tick.get_text()), size=7))
    axis.set(xlabel="prediction", ylabel="label", title="colour: share of the label")
    for row, column in counts.nonzero().tolist():
        colour = "white" if shares[row, column] > 0.5 else "k"
        axis.text(column, row, int(counts[row, column]), ha="center", va="center", fontsize=5, color=colour)
    with name_in_errors(path):
        figure.savefig(path, dpi=130)


class RetrievedImage(NamedTuple):
    """An image that was retrieved for a query."""

    row: int
    note: str  # its score, below the image
    is_positive: bool  # framed in green


class ExampleQuery(NamedTuple):
    """A query with its most similar images, the best first."""

    text: str
    image: Image.Image | None
    retrieved: list[RetrievedImage]


def draw_retrieved(dataset: PairDataset, queries: list[ExampleQuery], path: Path) -> None:
    """Draw a line for each query with the images that were retrieved; positives have a green frame.

    A query that no font can write has its number in the picture, and is printed.
    """
    columns = 2 + max(len(query.retrieved) for query in queries)
    figure = Figure(figsize=(1.4 * columns, 1.5 * len(queries)), layout="constrained")
    axes = figure.subplots(len(queries), columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for number, (line_axes, query) in enumerate(zip(axes, queries, strict=True), 1):
        text_lines = textwrap.wrap(query.text, 42 if query.image is None else 20)
        text = "\n".join(text_lines[:8])
        font = find_font(text)
        if font is None:
            print(f"query {number} in {path}, for whose letters there is no font: {query.text}")
            text = f"query {number}"
        properties = FontProperties(fname=font or DEJAVU, size=8)
        line_axes[0].text(0, 1, text, va="top", font=properties, parse_math=False, in_layout=False)
        if query.image is not None:
            line_axes[1].imshow(pad_to_square(query.image, dataset.image_size), interpolation="bicubic")
        for axis, image in zip(line_axes[2:], query.retrieved, strict=False):
            axis.axis("on")
            axis.imshow(pad_to_square(dataset.image(image.row), dataset.image_size), interpolation="bicubic")
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(image.note, fontsize=8)
            axis.spines[:].set(color="tab:green" if image.is_positive else "white", linewidth=3)
    with name_in_errors(path):
        figure.savefig(path, dpi=100)
