"""What recipes and tasks share word for word: contrasting, choosing wrong pairs, fusing pairs, restoring words."""

import typing

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.run import Run
from losses import forbidden_negatives, itc_loss, itc_targets
from masking import HeadReduction, random_word_mask


def contrast(
    run: Run, batch: dict, image_feat: Tensor, text_feat: Tensor, image_feat_m: Tensor, text_feat_m: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """ITC of online features against momentum keys (in-batch, then the queue), which it then pushes. All (B, E).

    -> weighted loss, and the logits (B, K) photo to text and text to photo of the batch, all ranks' part of it, for
    choosing ITM negatives.
    """
    temp = run.model.temp
    with torch.no_grad():
        new = [run.ranks.gather(x) for x in (image_feat_m, text_feat_m, batch["product_ids"])]
        image_keys, text_keys, products = map(torch.cat, zip(new, run.queue.filled(), strict=True))  # (K, E), …, (K,)
    # in full precision: at a temperature of 0.02, bf16 would round the logits to steps of a quarter
    with torch.autocast(run.device.type, enabled=False):
        sim_i2t, sim_t2i = image_feat @ text_keys.T / temp, text_feat @ image_keys.T / temp  # (B, K)
        with torch.no_grad():
            targets = lambda sim_m: itc_targets(batch["product_ids"], products, sim_m, run.alpha)
            targets_i2t = targets(image_feat_m @ text_keys.T / temp)
            targets_t2i = targets(text_feat_m @ image_keys.T / temp)
        loss = itc_loss(sim_i2t, sim_t2i, targets_i2t, targets_t2i, run.config.focal_gamma)
    run.queue.push(*new)
    run.features = new[:2]
    in_batch = len(new[0])
    loss = run.ranks.mean(run.config.itc_weight * loss, len(image_feat))
    return loss, sim_i2t[:, :in_batch], sim_t2i[:, :in_batch]


class WrongPairs(typing.NamedTuple):
    """ITM negatives of a batch, from all ranks' photos and texts: each photo's wrong text, each text's wrong photo."""

    text_embeds: Tensor  # (B, L, D)
    keep: Tensor  # (B, L)
    photos: Tensor  # image tokens (C, N, D): the batch's own, and with several ranks after them each text's wrong one
    places: Tensor  # (B,) the row of `photos` that is each text's wrong one
    labels: Tensor  # (2B,) 0, or −100 where every other pair would match: first the wrong texts, then the wrong photos


def wrong_pairs(
    run: Run, batch: dict, sim_i2t: Tensor, sim_t2i: Tensor, text_embeds: Tensor, image_embeds: Tensor
) -> WrongPairs:
    """Choose negatives by logits (B, K) of the batch's photos to all ranks' texts, and of its texts to all photos."""
    ranks, keep = run.ranks, batch["attention_mask"]
    forbidden = forbidden_negatives(ranks.gather(batch["product_ids"]), ranks.gather(batch["caption_ids"]))
    forbidden = forbidden[ranks.first :][: len(keep)]  # (B, K)
    text, photo = run.negatives(sim_i2t, forbidden), run.negatives(sim_t2i, forbidden)
    labels = torch.where(torch.cat([text, photo]) < 0, -100, 0)
    text, photo = text.clamp(min=0), photo.clamp(min=0)
    photos = image_embeds
    if ranks.count > 1:
        photos = torch.cat([image_embeds, ranks.fetch(image_embeds, photo)])
        photo = torch.arange(len(photo), 2 * len(photo), device=run.device)
    return WrongPairs(ranks.fetch(text_embeds, text), ranks.gather(keep)[text], photos, photo, labels)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of the labelled rows (label ≥ 0) whose highest logit is the label's."""
    right = (logits.argmax(dim=-1) == labels) & (labels >= 0)
    return right.sum() / (labels >= 0).sum().clamp(min=1)


def accuracies(run: Run, itm_logits: Tensor, itm_labels: Tensor, mlm_logits: Tensor, labels: Tensor) -> dict:
    """Figures that every recipe logs."""
    return {
        "itm_accuracy": run.ranks.mean(accuracy(itm_logits, itm_labels), itm_labels >= 0),
        "mlm_accuracy": run.ranks.mean(accuracy(mlm_logits, labels), labels >= 0),
    }


def momentum_attention(
    run: Run, batch: dict, image_embeds_m: Tensor, text_embeds_m: Tensor, generator: torch.Generator | None
) -> Tensor:
    """The momentum model's cross-attention that the masks are made of, (B, h, L, N), after `config.mask_source`.

    attention  A, of the clean pair: the plainest reading of SyncMask
    gradcam    A · max(0, ∂ match logit / ∂A), of the clean pair (Grad-CAM, as in ALBEF's grounding)
    hidden     row w of A while word w is hidden: a word that is there needs not look at the photo, a hidden one must.
               Two passes, each with one random half of the words hidden (choice)
    """
    config, momentum, words = run.config, run.momentum, batch["words"]
    ids, keep = batch["token_ids"], batch["attention_mask"]
    if config.mask_source == "hidden":
        half = random_word_mask(words, 0.5, generator)
        hidden = torch.stack([half, words & ~half])  # (2, B, L)
        with torch.no_grad():
            keep, image_embeds_m = keep.repeat(2, 1), image_embeds_m.repeat(2, 1, 1)
            text = momentum.encode_text(ids.masked_fill(hidden, run.mask_id).flatten(0, 1), keep)
            _, attentions = momentum.fuse(text, keep, image_embeds_m, return_attention=True)
        first, second = read_layer(attentions, config.mask_layer, config.mask_heads).chunk(2)
        return torch.where(half[:, None, :, None], first, second)
    gradcam = config.mask_source == "gradcam"
    # compiled code would lose the way from the match logit back to the attention
    with torch.set_grad_enabled(gradcam), torch.compiler.set_stance("force_eager" if gradcam else "default"):
        text = text_embeds_m.detach().requires_grad_(gradcam)
        fused, attentions = momentum.fuse(text, keep, image_embeds_m, return_attention=True)
        if gradcam:
            attentions = attentions[:-1]  # of the last layer only [CLS] reaches the match logit
            gradients = torch.autograd.grad(momentum.itm_logits(fused)[:, 1].sum(), attentions)
            attentions = [a * gradient.clamp(min=0) for a, gradient in zip(attentions, gradients, strict=True)]
    return read_layer(attentions, config.mask_layer, config.mask_heads)


def read_layer(attentions: list[Tensor], layer: int, heads: HeadReduction) -> Tensor:
    """Of attention maps (B, h, L, N) that of one layer, from 1 on; or for 0 what all layers agree on, (B, 1, L, N):
    their geometric mean, heads reduced first, since those of different layers have nothing to do with each other."""
    if layer:
        return attentions[layer - 1].detach()
    attentions = [a.detach().float() for a in attentions]
    maps = torch.stack([a.mean(dim=1) if heads == "mean" else a.amax(dim=1) for a in attentions])
    return maps.clamp(min=1e-12).log().mean(dim=0).exp()[:, None]


def matching(
    model, text_embeds: Tensor, keep: Tensor, image_embeds: Tensor, wrong_text: Tensor, wrong_image: Tensor
) -> tuple[Tensor, Tensor]:
    """ITM logits (3B, 2) and labels (3B,) of the pairs, of each photo with a wrong text, of each text with a wrong
    photo; −1 as a wrong one: there is none, ignored."""
    own = torch.arange(len(text_embeds), device=text_embeds.device)
    t, i = torch.cat([own, wrong_text.clamp(min=0), own]), torch.cat([own, own, wrong_image.clamp(min=0)])
    labels = torch.cat([torch.ones_like(own), torch.where(torch.cat([wrong_text, wrong_image]) < 0, -100, 0)])
    paired, _ = model.fuse(text_embeds[t], keep[t], image_embeds, photos=i, only_cls=len(t))
    return model.itm_logits(paired), labels


def compose(run: Run, batch: dict, references: Tensor, fused: bool) -> Tensor:
    """Unit-length queries (B, E) of photos, encoded (B, N, D), and texts: after fine-tuning the projected fused [CLS],
    before it the sum of both features."""
    model, keep = run.model, batch["attention_mask"]
    text_embeds = model.encode_text(batch["token_ids"], keep)
    if fused:
        return model.project_text(model.fuse(text_embeds, keep, references, only_cls=len(keep))[0])
    return F.normalize(model.image_feature(references) + model.text_feature(text_embeds, keep), dim=-1)
