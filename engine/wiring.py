"""What recipes and tasks share word for word: the teacher's view, contrasting, wrong pairs, matching, restoring words.

Letters: B batch, N image tokens, L text tokens, D width, E shared embedding, K contrastive keys, n pairs.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import grouping_of
from engine.run import Run
from losses import accuracy, itc_loss, itc_targets, itm_loss, mlm_loss, same_pairs
from masking import score_words, sync_mask
from model import MomentumModel


@dataclass
class Teacher:
    """The clean pair as the momentum model sees it."""

    model: MomentumModel
    image_embeds: Tensor  # (B, N, D)
    text_embeds: Tensor  # (B, L, D)
    image_feat: Tensor  # (B, E)
    text_feat: Tensor  # (B, E)

    @cached_property
    def photos(self) -> list[Tensor]:
        """What its texts look at, made when it is first asked for."""
        with torch.no_grad():
            return self.model.model.fusion.project_image_kv(self.image_embeds)


@torch.no_grad()
def teach(run: Run, batch: dict) -> Teacher:
    """Encode a batch with the momentum model."""
    image_embeds = run.momentum.model.vision(batch["images"])
    text_embeds = run.momentum.model.text(batch["token_ids"], batch["attention_mask"])
    feats = run.momentum.model.project_image(image_embeds), run.momentum.model.project_text(text_embeds)
    return Teacher(run.momentum, image_embeds, text_embeds, *feats)


def synchronize(
    run: Run, batch: dict, teacher: Teacher, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Synchronized masks as the config says. -> the attention (B, L, P) that they are made of, patch mask (B, P), word
    mask (B, L)."""
    config, words = run.config, batch["words"]
    attention, scores = score_words(
        run.momentum.model, batch, teacher.photos, teacher.text_embeds, run.mask_id, config.mask_source, generator
    )
    shares = config.mim_ratio, config.mlm_ratio, config.word_pool
    return attention, *sync_mask(attention, scores, words, *shares, generator)


class Contrast(NamedTuple):
    """The ITC loss, and logits against the batch of all ranks, without the queue."""

    loss: Tensor
    sim_i2t: Tensor  # logits (B, K) of the batch's photos to all ranks' texts
    sim_t2i: Tensor  # logits (B, K) of its texts to all photos


def contrast(run: Run, batch: dict, image_feat: Tensor, text_feat: Tensor, teacher: Teacher) -> Contrast:
    """ITC of online features (B, E) against momentum keys: those of the batch, then the queue's.

    The new keys then go into the queue, and to the sampler, which groups the next epoch by them.
    """
    temp, config, ranks = run.model.temp, run.config, run.ranks
    with torch.no_grad():
        new = teacher.image_feat, teacher.text_feat, batch["product_ids"], batch["caption_ids"]
        new = [ranks.gather(x) for x in new]
        image_keys, text_keys, *ids = map(torch.cat, zip(new, run.queue.filled(), strict=True))  # (K, E), …, (K,)
        right = same_pairs(batch["product_ids"], batch["caption_ids"], *ids)  # (B, K)
    # in full precision: at a temperature of 0.02, bf16 would round the logits to steps of a quarter
    with torch.autocast(run.device.type, enabled=False):
        sim_i2t, sim_t2i = image_feat @ text_keys.T / temp, text_feat @ image_keys.T / temp  # (B, K)
        with torch.no_grad():
            targets_i2t = itc_targets(right, teacher.image_feat @ text_keys.T / temp, run.alpha)
            targets_t2i = itc_targets(right, teacher.text_feat @ image_keys.T / temp, run.alpha)
        loss = itc_loss(sim_i2t, sim_t2i, targets_i2t, targets_t2i, config.focal_gamma)
    run.queue.push(*new)
    if run.sampler and grouping_of(config) != "random":
        run.sampler.collect(ranks.gather(batch["rows"]), *new[:2])
    in_batch = len(new[0])
    return Contrast(ranks.mean(loss, len(image_feat)), sim_i2t[:, :in_batch], sim_t2i[:, :in_batch])


class Pairs(NamedTuple):
    """Texts with the photos that they are to be fused with, as `FusionEncoder` takes them."""

    text_embeds: Tensor  # (n, L, D)
    keep: Tensor  # (n, L)
    photos: list[Tensor]  # C photos, the batch's own first
    rows: Tensor  # (n,) which of the photos each text is paired with
    labels: Tensor  # (n,) 1 match, 0 no match, −100 where every other pair would match

    @property
    def inputs(self) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
        """All but the labels."""
        return self[:4]


def wrong_pairs(
    run: Run, batch: dict, itc: Contrast, text_embeds: Tensor, image_embeds: Tensor, photos: list[Tensor]
) -> Pairs:
    """ITM's negatives (2B), chosen by similarity among all ranks' photos and texts: each photo with a wrong text, each
    text with a wrong photo. photos: what `model.look` made of image_embeds (B, N, D)."""
    ranks, keep = run.ranks, batch["attention_mask"]
    forbidden = same_pairs(ranks.gather(batch["product_ids"]), ranks.gather(batch["caption_ids"]))
    forbidden = forbidden[ranks.first :][: len(keep)]  # (B, K)
    text, photo = run.negatives(itc.sim_i2t, forbidden), run.negatives(itc.sim_t2i, forbidden)
    labels = torch.where(torch.cat([text, photo]) < 0, -100, 0)
    text, photo = text.clamp(min=0), photo.clamp(min=0)
    own = torch.arange(len(keep), device=run.device)
    text_route, photo_route = ranks.routes(text, photo)
    if ranks.count > 1:  # what the others have is sent for, and stands after the batch's own
        others = run.model.fusion.project_image_kv(ranks.fetch(image_embeds, photo_route))
        photos = [torch.cat(layer) for layer in zip(photos, others, strict=True)]
        photo = own + len(own)
    texts = torch.cat([ranks.fetch(text_embeds, text_route), text_embeds])
    return Pairs(texts, torch.cat([ranks.gather(keep)[text], keep]), photos, torch.cat([own, photo]), labels)


def add_matches(pairs: Pairs, text_embeds: Tensor, keep: Tensor) -> Pairs:
    """After the pairs, as matches: the texts (B, L, D), each with its own photo."""
    rows = torch.arange(len(keep), device=keep.device)
    texts, keeps = torch.cat([pairs.text_embeds, text_embeds]), torch.cat([pairs.keep, keep])
    labels = torch.cat([pairs.labels, torch.ones_like(rows)])
    return Pairs(texts, keeps, pairs.photos, torch.cat([pairs.rows, rows]), labels)


def match_pairs(run: Run, fused: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """ITM of fused pairs (n, …, D), labels (n,). -> loss, accuracy."""
    logits, known = run.model.itm_logits(fused), labels >= 0
    return run.ranks.mean(itm_loss(logits, labels), known), run.ranks.mean(accuracy(logits, labels), known)


def restore_words(
    run: Run, batch: dict, fused: Tensor, masked_ids: Tensor, mlm_labels: Tensor, teacher: Teacher | None = None
) -> tuple[Tensor, Tensor]:
    """MLM from the fused tokens (B, L, D) of masked texts; with a teacher and alpha > 0 the momentum model's prediction
    on the same masked texts is a soft target. -> loss, accuracy."""
    keep, chosen, fused_m = batch["attention_mask"], mlm_labels != -100, []
    if teacher and run.alpha > 0:
        with torch.no_grad():
            fused_m = [run.momentum.model.fusion(run.momentum.model.text(masked_ids, keep), keep, teacher.photos)]
    fused, labels, *fused_m = pick(chosen, fused, mlm_labels, *fused_m)  # (M, D), (M,), (M, D)
    logits, logits_m = (
        run.model.mlm_logits(fused),
        run.momentum.model.mlm_logits(*fused_m) if fused_m else None,
    )  # (M, V)
    loss = mlm_loss(logits, labels, logits_m, run.alpha)
    return run.ranks.mean(loss, chosen), run.ranks.mean(accuracy(logits, labels), chosen)


def pick(mask: Tensor, *tensors: Tensor) -> list[Tensor]:
    """What the mask (B, L) marks of some tensors (B, L, …), as x[mask] would; but a GPU is asked only once how many
    there are, and not again in the backward pass. -> (M, …) each."""
    marked = mask.flatten().nonzero().squeeze(1)
    return [x.flatten(0, 1).index_select(0, marked) for x in tensors]


def compose(run: Run, batch: dict, references: Tensor, fused: bool) -> Tensor:
    """Unit-length queries (B, E) of photos, encoded (B, N, D), and texts: after fine-tuning the projected fused [CLS],
    before it the sum of both features."""
    model, keep = run.model, batch["attention_mask"]
    text_embeds = model.text(batch["token_ids"], keep)
    if fused:
        image_kv = model.fusion.project_image_kv(references)
        return model.project_text(model.fusion(text_embeds, keep, image_kv, cls_only=True))
    return F.normalize(model.image_feature(references) + model.text_feature(text_embeds, keep), dim=-1)
