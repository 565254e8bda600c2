"""The pictures that runs leave: curves, masks, answers, confusion."""

import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer
from torch import Tensor

from data import encode, normalise, to_device
from engine.run import Run, autocast
from engine.wiring import teach
from engine.writer import whole_file
from evaluation.scores import most_confused
from evaluation.truth import synchronized_masks
from masking import grad_cam, middle_layer, random_patch_mask, random_word_mask, soft_mask
from readers.dataset import PhotoDataset, square
from readers.prompts import Text

TRUTHS = ("patch_cooccurrence", "word_cooccurrence", "pointing")
PANELS = {
    "loss": ["itc", "itm", "mlm", "mim", "rtd", "align"],
    "held-out recall": [f"val_{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)],
    "held-out accuracy": ["val_itm_accuracy", "val_mlm_accuracy", "choice_fine", "choice_fine_itm"],
    "what the photo adds, held out": ["val_photo_gain", "photo_gain_whole", "photo_gain_detail"],
    "held-out truth of the masks": [key + end for key in TRUTHS for end in ("", "_random")],
}


def draw_curves(lines: list[dict], path: Path, panels: dict[str, list[str]] = PANELS) -> None:
    """curves.png: for each of the panels, title -> keys of metrics.jsonl, what there is of these over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = {key: [(line["step"], line[key]) for line in lines if key in line] for key in sum(panels.values(), [])}
    panels = {title: [key for key in keys if curves[key]] for title, keys in panels.items()}
    panels = {title: keys for title, keys in panels.items() if keys}
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), layout="constrained", squeeze=False)
    for axis, (title, keys) in zip(axes[0], panels.items(), strict=True):
        for key in keys:
            style = {"linestyle": ":", "color": axis.lines[-1].get_color()} if key.endswith("_random") else {}
            marker = "." if len(curves[key]) < 20 else None
            axis.plot(*zip(*curves[key], strict=True), label=key.removeprefix("val_"), marker=marker, **style)
        axis.set(title=title, xlabel="step", ylim=(0, 1.02) if "held-out" in title else (0, None))
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


INK, PAPER, GREY = (30, 30, 34), (255, 255, 255), (150, 150, 156)


def first_photos(dataset: PhotoDataset, count: int) -> list[int]:
    """One photo of each of the first `count` products: the first of one, the second of the next, and so on."""
    owners = dataset.product_ids
    views = [(owners == product).nonzero()[0] for product in range(min(count, int(owners.max()) + 1))]
    return [int(rows[number % len(rows)]) for number, rows in enumerate(views)]


def letters(size: int) -> ImageFont.FreeTypeFont:
    """The font that matplotlib brings: Pillow's own has no accents."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def draw_masks(run: Run, dataset: PhotoDataset, rows: list[int], path: Path, side: int = 150) -> None:
    """masks.png: for each photo the patches and words that random and that synchronized masks would hide, and what a
    soft mask of one random word, marked in its text, would suppress."""
    batch = run.collate([dataset[row] for row in rows])
    if not len(batch["rows"]):  # none can be decoded
        return
    images, texts = batch["images"], [dataset.text(row) for row in batch["rows"].tolist()]
    batch, grid, line = to_device(batch, run.device), run.config.model.grid, 2 * side + 60
    generator = torch.Generator(run.device).manual_seed(run.config.seed)
    run.model.eval()
    _, patches, words = synchronized_masks(run, batch | {"images": normalise(batch["images"])}, generator)
    masks = [
        ("random", random_patch_mask(len(images), grid**2, run.config.mim_ratio, generator, run.device),
         random_word_mask(batch["words"], run.config.mlm_ratio, generator)),
        ("synchronized" + ", in training not yet" * (run.step <= run.config.mask_warmup), patches, words),
        *shown_soft_masks(run, batch, generator),
    ]  # fmt: skip
    font, text_left = letters(14), (len(masks) + 1) * (side + 10) + 10
    page = Image.new("RGB", (text_left + len(masks) * line, 30 + len(images) * 5 * side), PAPER)
    pen, top = ImageDraw.Draw(page), 30
    for column, (title, _, _) in enumerate(masks):
        pen.text((side * (column + 1) + 10 * (column + 2), 8), title, INK, font)
        pen.text((text_left + line * column, 8), f"{title}: words", INK, font)
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        photo = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BICUBIC)
        page.paste(photo, (10, top))
        bottom = top + side
        for column, (_, patch_mask, word_mask) in enumerate(masks):
            hidden = (patch_mask[i].float() * 255).byte().view(grid, grid).cpu().numpy()
            cover = Image.fromarray(hidden).resize((side, side), Image.Resampling.NEAREST)
            page.paste(Image.composite(Image.new("RGB", photo.size, GREY), photo, cover),
                       (side * (column + 1) + 10 * (column + 2), top))  # fmt: skip
            corner = (text_left + line * column, top)
            end = draw_text(pen, font, text, run.tokenizer, word_mask[i].tolist(), corner, line - 20)
            bottom = max(bottom, end)
        top = bottom + 10
    page.crop((0, 0, page.width, top)).save(path)


def shown_soft_masks(run: Run, batch: dict, generator: torch.Generator) -> list[tuple[str, Tensor, Tensor]]:
    """Title, soft mask (B, P) and the random word (B, L) that it is of; nothing where there is one fusion layer."""
    layers, words = run.config.model.fusion_layers, batch["words"]
    if layers == 1:
        return []
    with autocast(run):
        teacher = teach(run, batch | {"images": normalise(batch["images"])})
        with torch.enable_grad():
            text = teacher.text_embeds.detach().requires_grad_()
            fused, attentions = run.momentum.model.fusion(
                text, batch["attention_mask"], teacher.photos, return_attention=True
            )
            maps = grad_cam(attentions[middle_layer(layers)], run.momentum.model.itm_logits(fused)[:, 1].sum())
    words = words > 0
    word = torch.multinomial((words | ~words.any(dim=1, keepdim=True)).float(), 1, generator=generator)  # (B, 1)
    mask = soft_mask(maps, word.squeeze(1))
    return [("soft", mask, torch.zeros_like(words).scatter(1, word, True) & words)]


def draw_text(
    pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, text: Text, tokenizer: Tokenizer, mask: list[bool],
    corner: tuple[int, int], width: int,
) -> int:  # fmt: skip
    """The text from `corner` on, broken between words at `width` pixels, its masked tokens blacked out but legible, and
    … where it goes on beyond what the model reads. -> its foot"""
    (x, y), encoding, words = corner, encode(tokenizer, [text])[0], []
    for piece, (start, stop), masked in zip(encoding.word_ids, encoding.offsets, mask, strict=False):
        if piece is None:  # [CLS], [SEP]
            continue
        if not words or (piece, start) != words[-1][0]:
            words.append([None, []])
        words[-1][0] = (piece, stop)
        words[-1][1].append((text[piece][start:stop], masked))
    for _, pieces in [*words, *([(None, [("…", False)])] if encoding.overflowing else [])]:
        if x + font.getlength("".join(piece for piece, _ in pieces)) > corner[0] + width and x > corner[0]:
            x, y = corner[0], y + 22
        for piece, masked in pieces:
            size = font.getlength(piece)
            if masked:
                pen.rectangle((x - 1, y, x + size + 1, y + 19), INK)
            pen.text((x, y), piece, PAPER if masked else INK, font)
            x += size + 1
        x += 5
    return y + 22


MOST_CLASSES = 60  # of a confusion matrix that can be read


def draw_confusion(right: Tensor, answered: Tensor, names: list[str], path: Path) -> None:
    """confusion.png: for each class that occurs, which classes its photos were given, in shares of the row; of more
    than MOST_CLASSES the most confused ones."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    occurs, shown = len(torch.cat([right, answered]).unique()), most_confused(right, answered, MOST_CLASSES)
    place = torch.full((len(names),), -1).index_put_((shown,), torch.arange(len(shown)))
    both = (place[right] >= 0) & (place[answered] >= 0)
    cells = place[right[both]], place[answered[both]]
    counts = torch.zeros(len(shown), len(shown)).index_put_(cells, torch.ones(int(both.sum())), accumulate=True)
    side, labels = max(4.0, 0.22 * len(shown) + 2), [names[c] for c in shown.tolist()]
    figure, axis = plt.subplots(figsize=(side, side), layout="constrained")
    shares = counts / right.bincount(minlength=len(names))[shown, None].clamp(min=1)
    axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks(range(len(shown)), labels, rotation=90, fontsize=7, parse_math=False)  # a $ is a $
    axis.set_yticks(range(len(shown)), labels, fontsize=7, parse_math=False)
    some = f"the {len(shown)} of {occurs} classes with most errors; " if len(shown) < occurs else ""
    axis.set(xlabel="answered", ylabel="right", title=f"{some}colour: share of the class")
    for i, j in counts.nonzero().tolist():
        colour = "white" if shares[i, j] > 0.5 else "k"
        axis.text(j, i, int(counts[i, j]), ha="center", va="center", fontsize=5, color=colour)
    figure.savefig(path, dpi=130)
    plt.close(figure)


RIGHT = (30, 150, 70)  # the frame of a right answer
Answer = tuple[int, str, bool]  # row, note, is it a right one?


def draw_answers(
    dataset: PhotoDataset, queries: list[tuple[str, Image.Image | None, list[Answer]]], path: Path, side: int = 128
) -> None:
    """A sheet of queries, text with or without a photo, each with its best photos, five a line; right ones framed."""
    font, columns, gap = letters(12), 5, 26
    lines = [max(1, -(-len(answers) // columns)) for _, _, answers in queries]
    page = Image.new("RGB", ((columns + 2) * (side + 8) + 16, sum(lines) * (side + gap) + 8), PAPER)
    pen, top = ImageDraw.Draw(page), 8
    for (text, photo, answers), height in zip(queries, lines, strict=True):
        left = 8
        if photo is not None:
            page.paste(square(photo, dataset.image_size).resize((side, side), Image.Resampling.BICUBIC), (left, top))
        left += (side + 8) * (photo is not None)
        width = 18 if photo is not None else 38
        pen.multiline_text((left, top), "\n".join(textwrap.wrap(text, width)[:8]), INK, font)
        for number, (row, note, right) in enumerate(answers):
            x = 8 + (side + 8) * (2 + number % columns)
            y = top + (number // columns) * (side + gap)
            picture = square(dataset.photo(row), dataset.image_size).resize((side, side), Image.Resampling.BICUBIC)
            if right:
                pen.rectangle((x - 3, y - 3, x + side + 2, y + side + 2), RIGHT)
            page.paste(picture, (x, y))
            pen.text((x, y + side + 3), note, INK, font)
        top += height * (side + gap)
    page.save(path)
