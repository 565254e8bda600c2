"""What the explorer's page shows, computed by the functions that training and its measures use, as JSON holds it.

Letters: B photos, L text tokens, W words that may be masked, P patches, S shares.
"""

import base64
import io
from collections.abc import Callable, Iterator
from typing import get_args

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor

from data import IMAGENET_MEAN, IMAGENET_STD, encode
from harness.run import Run
from harness.wiring import Teacher
from losses import mim_loss, pick_negatives, same_pairs
from masking import (
    MaskSource,
    average_attention,
    clean_attention,
    concentration,
    first_pieces,
    grad_cam,
    hidden_words,
    middle_layer,
    random_patch_mask,
    random_word_mask,
    soft_mask,
    split_patches,
    sync_mask,
    true_mask,
)
from measures.truth import WordTruth
from photos.dataset import PhotoDataset
from photos.prompts import Text
from photos.synthetic import Synthetic

SHARES = (10, 30, 50, 70, 90)  # in per cent, the stops of the sliders for masks
MARGIN_STOPS = (0.0, 0.5, 1.0, 1.5, 2.0)  # times the margin of the run
NEVER = 255  # in place of a share: masked at none
GUESSES = 5

Masks = tuple[Tensor, Tensor]  # of patches (B, P), of words (B, L)


def packed(values: Tensor) -> str:
    """Floats in full precision, anything else as bytes, for the page's `floats` and `bytes`."""
    kind = np.float32 if values.is_floating_point() else np.uint8
    return base64.b64encode(values.cpu().numpy().astype(kind).tobytes()).decode()


def picture(pixels: Tensor) -> str:
    """A photo (3, S, S) uint8 as the address of an image."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(file, "jpeg", quality=92, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def numbers_of(mask: Tensor) -> list[int]:
    """Which of (X,) are marked."""
    return mask.nonzero()[:, 0].tolist()


def drawn_anew(run: Run) -> torch.Generator:
    """Whatever is drawn for the page is drawn alike each time."""
    return torch.Generator(run.device).manual_seed(run.config.seed)


def caption_parts(run: Run, text: Text, words: Tensor) -> list[list]:
    """A text in parts, [string, number of the word that it is, or None], by its tokens' `words` (L,)."""
    encoding, spans, parts = encode(run.tokenizer, [text])[0], {}, []
    for place, piece, (start, end) in zip(words.tolist(), encoding.word_ids, encoding.offsets, strict=False):
        if place:
            spans[place] = (*spans.get(place, (piece, start))[:2], end)
    for piece, string in enumerate(text):
        done = 0
        for number, (where, start, end) in enumerate(spans.values()):
            if where == piece:
                parts += [[string[done:start], None], [string[start:end], number]]
                done = end
        parts.append([string[done:] + " ", None])
    return [part for part in parts if part[0]]


def word_facts(words: Tensor, known: WordTruth, b: int) -> list[dict]:
    """What is known of each word of a photo: how many of its pieces name an attribute, and one that the photo shows;
    whether it is a detail; the patches that show it."""
    facts = []
    for place in words[b].unique().tolist()[1:]:  # after 0, which is no word
        pieces, first = words[b] == place, place - 1
        named, shown = (int(truth[b][pieces].sum()) for truth in (known.attribute, known.visible))
        region = numbers_of(known.regions[b, first])
        facts.append({"named": named, "shown": shown, "detail": bool(known.detail[b, first]), "region": region})
    return facts


def attentions_by(
    run: Run, batch: dict, teacher: Teacher, source: MaskSource, generator: torch.Generator
) -> tuple[list[Tensor], Tensor]:
    """The maps (B, h, L, N) of each fusion layer, and the scores of words (B, L), as `synchronize` reads them."""
    if source == "masked":
        maps, answers = hidden_words(run.momentum, batch, teacher.photos, run.mask_id, generator)
        return maps, run.worth(batch["token_ids"], answers)
    maps = clean_attention(run.momentum, batch, teacher.photos, teacher.text_embeds)
    return maps, concentration(average_attention(maps))


def readings(run: Run, batch: dict, teacher: Teacher) -> Iterator[tuple[MaskSource, int, Tensor]]:
    """Source, layer, map (B, L, P): all that attention can be read by; layer 0 is what the layers agree on."""
    for source in get_args(MaskSource):
        maps, _ = attentions_by(run, batch, teacher, source, drawn_anew(run))
        for layer, attention in enumerate(maps, start=1):
            yield source, layer, average_attention([attention])
        if len(maps) > 1:
            yield source, 0, average_attention(maps)


def shown_map(heat: Tensor, words: Tensor) -> dict:
    """The maps (L, P) of a photo's words, by their first pieces, as bytes (W, P): each up to its own most, which alone
    is 255; where that is, and how many times the average patch's it is."""
    heat = heat[first_pieces(words[None])[0]]  # (W, P)
    peaks = heat.argmax(dim=1, keepdim=True)
    most, average = heat.amax(dim=1), heat.mean(dim=1)
    scaled = 255 * heat / most[:, None].clamp(min=1e-30)
    shown = packed(scaled.floor().clamp(max=254).scatter(1, peaks, 255).byte())
    return {"map": shown, "peaks": peaks[:, 0].tolist(), "times": (most / average.clamp(min=1e-30)).tolist()}


def by_share(make: Callable[[float, float], Masks], words: Tensor) -> list[dict]:
    """Masks of every share: for each photo from which share on a word is masked, (W,), and, where that share is the
    words', from which on a patch is, (S, P). A larger share hides what a smaller one does and more: `make`, of patches'
    and words' share, draws the same every time."""
    made = [[make(p / 100, w / 100) for p in SHARES] for w in SHARES]
    shares = torch.tensor(SHARES, device=words.device)

    def first(masks: list[Tensor]) -> Tensor:
        masks = torch.stack(masks)  # (S, …)
        return torch.where(masks.any(dim=0), shares[masks.byte().argmax(dim=0)], NEVER)

    patches = torch.stack([first([patch_mask for patch_mask, _ in row]) for row in made], dim=1)  # (B, S, P)
    word, starts = first([row[0][1] for row in made]), first_pieces(words)
    return [{"words": packed(word[b][starts[b]]), "patches": packed(patches[b])} for b in range(len(words))]


def all_masks(run: Run, batch: dict, teacher: Teacher, known: WordTruth | None) -> dict[str, list[dict]]:
    """`by_share` of random, synchronized and, where it is known, true masks."""
    config, words = run.config, batch["words"]
    generator = drawn_anew(run)
    maps, scores = attentions_by(run, batch, teacher, config.mask_source, generator)
    attention, after = average_attention(maps), generator.get_state()

    def synchronized(patch_share: float, word_share: float) -> Masks:
        generator.set_state(after)
        return sync_mask(attention, scores, words, patch_share, word_share, config.word_pool, generator)

    def random(patch_share: float, word_share: float) -> Masks:
        draws = drawn_anew(run)
        patches = random_patch_mask(len(words), config.model.grid**2, patch_share, draws, run.device)
        return patches, random_word_mask(words, word_share, draws)

    makers = {"random": random, "sync": synchronized}
    if known:

        def true(patch_share: float, word_share: float) -> Masks:
            return true_mask(known.regions, words, patch_share, word_share, drawn_anew(run))

        makers["true"] = true
    return {name: by_share(make, words) for name, make in makers.items()}


def soft_masks(run: Run, batch: dict, teacher: Teacher) -> list[str] | None:
    """The soft mask of every word of each photo, (W, P) in 255ths, from the layer that `shown_soft_masks` reads."""
    layers, words = run.config.model.fusion_layers, batch["words"]
    if layers == 1:
        return None
    with torch.enable_grad():
        text = teacher.text_embeds.detach().requires_grad_()
        keep = batch["attention_mask"]
        fused, attentions = run.momentum.fusion(text, keep, teacher.photos, return_attention=True)
        maps = grad_cam(attentions[middle_layer(layers)], run.momentum.itm_logits(fused)[:, 1].sum())
    of_words = [soft_mask(maps, torch.full_like(words[:, 0], place)) for place in range(words.shape[1])]
    soft = torch.stack(of_words, dim=1)  # (B, L, P)
    return [packed((255 * soft[b][starts]).round().byte()) for b, starts in enumerate(first_pieces(words))]


def negatives(run: Run, batch: dict, teacher: Teacher, dataset: PhotoDataset) -> dict:
    """Cosines (B, B) of photos and texts; which pairs may not serve as negatives, and which would be false ones; the
    hard negative of each photo and text, and the semi-hard one at each margin, −1 where there is none."""
    forbidden, false = same_pairs(batch["product_ids"], batch["caption_ids"]), None
    if isinstance(dataset, Synthetic):
        rows, products = batch["rows"].tolist(), batch["product_ids"].tolist()
        false = [[dataset.describes(product, row) for product in products] for row in rows]
        false = packed(torch.tensor(false).to(run.device) & ~forbidden)
    sim = teacher.image_feat @ teacher.text_feat.T
    margins = [stop * (run.config.margin or 0.2) for stop in MARGIN_STOPS]
    chosen = {}
    for way, scores in {"photo": sim, "text": sim.T}.items():
        semihard = [pick_negatives(scores, forbidden, None, "semihard", None, margin).tolist() for margin in margins]
        chosen[way] = {"hard": pick_negatives(scores, forbidden, None, "hard").tolist(), "semihard": semihard}
    pairs = {"sim": packed(sim), "forbidden": packed(forbidden), "false": false, "chosen": chosen}
    return pairs | {"margins": margins, "margin": run.config.margin, "mode": run.config.negatives}


def guesses(run: Run, chances: Tensor, right: int) -> dict:
    """The likeliest tokens by chances (V,), and how likely the right one is."""
    best = chances.topk(GUESSES)
    named = [[run.tokenizer.id_to_token(token), p] for p, token in zip(*map(Tensor.tolist, best), strict=True)]
    return {"best": named, "right": chances[right].item()}


def painted(images: Tensor, pixels: Tensor, hidden: Tensor) -> Tensor:
    """Photos (B, 3, S, S), normalised, with what MIM predicts, pixels (B, M, 3p²), in place of their patches `hidden`.
    It predicts them up to mean and deviation, see `mim_loss`, which are the photo's own. -> uint8 (B, 3, S, S)"""
    side = round((pixels.shape[2] / 3) ** 0.5)
    patches = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=side, q=side)
    where = repeat(hidden, "b m -> b m x", x=pixels.shape[2])
    target = patches.gather(1, where)
    std, mean = torch.std_mean(target, dim=2, keepdim=True, correction=0)
    patches = patches.scatter(1, where, pixels.to(patches.dtype) * std + mean)
    rows = images.shape[2] // side
    images = rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=side, q=side)
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (255 * (images * std + mean)).round().clamp(0, 255).byte()


@torch.no_grad()
def rebuilt(run: Run, batch: dict, images: Tensor, patch_mask: Tensor, word_mask: Tensor) -> list[dict]:
    """For each masked token the best guesses with its own photo and with another one; and, of a run that has learnt it,
    what MIM paints with the photo's own text and with another one. Another one: of the batch, drawn at random.
    images (B, 3, S, S), normalised"""
    model, config, ids, keep = run.model, run.config, batch["token_ids"], batch["attention_mask"]
    forbidden = same_pairs(batch["product_ids"], batch["caption_ids"])
    flat = torch.zeros(forbidden.shape, device=run.device)
    other = pick_negatives(flat, forbidden, None, "random", drawn_anew(run)).clamp(min=0)
    ways = {"own": torch.arange(len(ids), device=run.device), "elsewhere": other}
    found = [{"other": of, "hidden": numbers_of(mask)} for of, mask in zip(other.tolist(), patch_mask, strict=True)]
    photos = model.look(model.encode_image(images))
    masked = model.encode_text(ids.masked_fill(word_mask, run.mask_id), keep)
    for way, rows in ways.items():
        chances = model.mlm_logits(model.fuse(masked, keep, photos, rows)).softmax(dim=-1)  # (B, L, V)
        for b, item in enumerate(found):
            item[way] = [guesses(run, chances[b, at], ids[b, at]) for at in numbers_of(word_mask[b])]
    whose = first_pieces(batch["words"]).cumsum(dim=1) - 1  # number of the word that a token is of
    for b, item in enumerate(found):
        item["tokens"] = [[run.tokenizer.id_to_token(ids[b, at]), int(whose[b, at])] for at in numbers_of(word_mask[b])]
    if config.recipe == "syncmask" and config.mim_weight:
        visible, hidden = split_patches(patch_mask, config.mim_ratio)
        visible_embeds, texts = model.encode_image(images, visible), model.encode_text(ids, keep)
        for way, rows in ways.items():
            pixels = model.reconstruct_patches(visible_embeds, visible, hidden, texts[rows], keep[rows])
            for b, image in enumerate(painted(images, pixels, hidden)):
                error = mim_loss(*(x[b : b + 1] for x in (pixels, images, hidden))).item()
                found[b]["painted_" + way] = {"image": picture(image), "error": error}
    return found
