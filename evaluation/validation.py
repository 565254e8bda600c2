"""Validation while pretraining goes on: held-out retrieval, ITM and MLM.

Letters: B batch, L text tokens, E embedding, M masked tokens.
"""

from collections import defaultdict

import torch
from torch import Tensor

from engine.batches import evaluation_batches, images_of_first_products, retrieval_captions, text_features
from engine.run import Run, autocast
from evaluation.scores import full_rankings, recalls_of
from losses import pick_negatives, positive_pairs
from masking import random_word_mask
from readers.dataset import PairDataset

METRIC_TITLES = {  # key of metrics.jsonl -> title in the closing table; docs/glossary.md explains all keys
    "val_i2t_r1": "R@1, image to caption",
    "val_t2i_r1": "R@1, caption to image",
    "val_itm_accuracy": "ITM accuracy",
    "val_mlm_accuracy": "MLM accuracy",
    "val_image_gain": "image gain",
    "image_gain_coarse": "image gain, coarse attributes shown",
    "image_gain_fine": "image gain, fine attributes shown",
    "choice_coarse": "own caption chosen, coarse, by cosine",
    "choice_fine": "own caption chosen, fine, by cosine",
    "choice_coarse_itm": "own caption chosen, coarse, by ITM",
    "choice_fine_itm": "own caption chosen, fine, by ITM",
    "patch_precision": "mask precision, patches",
    "word_precision": "mask precision, words",
    "pointing_game": "pointing game, fine attributes",
    "false_negative_rate": "false ITM negatives",
}


def metrics_table(metrics: dict[str, float], chance: dict[str, float]) -> list[str]:
    """Format the closing table of a run: for each metric a line with its title, value, unit and chance.

    metrics: key -> value, a share; keys that are not in METRIC_TITLES are left out
    chance: key -> the recall of a random order
    """
    lines = [f"  {'held out':40}{'value':>7}{'chance':>16}"]
    for key, title in METRIC_TITLES.items():
        if key not in metrics:
            continue
        line = f"  {title:40}{100 * metrics[key]:7.1f} {unit_of(key):7}"
        chance_value = chance_of(key, metrics, chance)
        if chance_value is not None:
            line += f"{100 * chance_value:8.1f}"
        if key in ("patch_precision", "word_precision"):
            line += f"   chance-corrected {chance_corrected(metrics, key):.2f}"
        lines.append(line.rstrip())
    return lines


def unit_of(key: str) -> str:
    """Return the unit of 100 times a metric. Gains are differences of percentages."""
    return "points" if "gain" in key else "%"


def chance_of(key: str, metrics: dict[str, float], chance: dict[str, float]) -> float | None:
    """Return the value of a metric by chance, or with random masks or negatives; None where it is not known."""
    if "gain" in key:
        return 0.0
    if key.startswith("choice") or key == "val_itm_accuracy":
        return 0.5
    if key in chance:
        return chance[key]
    return metrics.get(f"{key}_random")


def chance_corrected(metrics: dict[str, float], key: str) -> float:
    """Compute the precision of a mask on a scale from random masks, 0, to perfect masks, 1.

    (value − chance) / (1 − chance), with the precision of random masks as chance
    """
    chance = metrics[f"{key}_random"]
    return (metrics[key] - chance) / max(1e-9, 1 - chance)


@torch.no_grad()
def validate(run: Run, dataset: PairDataset) -> tuple[dict[str, float], dict[str, float]]:
    """Measure retrieval, ITM and MLM on held-out products, with the same random draws every time.

    -> metrics; the recalls of a random order, under the same keys
    Raises DataError where no image can be read.
    """
    run.model.eval()
    images = images_of_first_products(dataset, run.config.val_products)
    outputs = defaultdict(list)
    for number, batch in enumerate(evaluation_batches(run, images, "validating")):
        generator = torch.Generator(run.device).manual_seed((run.config.seed * 1_000_003 + number) % 2**63)
        with autocast(run):
            batch_outputs = predict_batch(run, batch, generator)
        outputs["rows"].append(batch["rows"].cpu())
        for key, value in batch_outputs.items():
            outputs[key].append(value.cpu())
    outputs = {key: torch.cat(values) for key, values in outputs.items()}

    captions, image_products, caption_products = retrieval_captions(dataset, outputs["rows"].numpy())
    text_feat = text_features(run, captions).cpu()
    rankings = full_rankings(outputs["image_feat"], text_feat, image_products, caption_products)
    metrics = {key.replace("full", "val"): value for key, value in recalls_of(rankings).items()}
    del metrics["val_mean"]
    chance = {}
    for ranking in rankings:
        for key, value in ranking.chance().items():
            chance[key.replace("full", "val")] = value

    mlm_accuracy = outputs["mlm_hits"].float().mean().item()
    mlm_accuracy_other = outputs["mlm_hits_other"].float().mean().item()
    metrics["val_mlm_accuracy"] = mlm_accuracy
    metrics["val_image_gain"] = mlm_accuracy - mlm_accuracy_other
    metrics["val_itm_accuracy"] = outputs["itm_hits"].float().mean().item()
    metrics["val_unreadable"] = len(images) - len(outputs["rows"])
    return metrics, chance


def predict_batch(run: Run, batch: dict, generator: torch.Generator) -> dict[str, Tensor]:
    """Predict which captions match the images of a held-out batch, and its masked words.

    -> image_feat (B, E)
    -> mlm_hits (M,): whether a masked token is predicted with its own image
    -> mlm_hits_other (M,): whether it is predicted with the image of another product
    -> itm_hits (up to 2B,): whether a pair is classified correctly
    """
    model = run.model
    ids, attention_mask = batch["token_ids"], batch["attention_mask"]  # (B, L)
    masked = random_word_mask(batch["maskable"], run.config.mlm_ratio, generator)  # (B, L)
    other = draw_other_products(batch, generator)
    has_other = other >= 0
    other = other.clamp(min=0)

    image_embeds = model.vision(batch["images"])
    image_kv = model.fusion.project_image_kv(image_embeds)
    text_embeds = model.text(ids, attention_mask)
    masked_embeds = model.text(ids.masked_fill(masked, run.mask_id), attention_mask)

    # ITM: each image with its own caption, then with a caption of another product
    own_cls = model.fusion(text_embeds, attention_mask, image_kv, cls_only=True)
    other_cls = model.fusion(text_embeds[other], attention_mask[other], image_kv, cls_only=True)
    own_hits = model.itm_logits(own_cls).argmax(dim=1) == 1
    other_hits = model.itm_logits(other_cls).argmax(dim=1) == 0

    # MLM: with the own image, then with the image of another product
    labels = ids[masked]
    fused = model.fusion(masked_embeds, attention_mask, image_kv)
    fused_other = model.fusion(masked_embeds, attention_mask, image_kv, image_index=other)
    return {
        "image_feat": model.image_feature(image_embeds),
        "mlm_hits": model.mlm_logits(fused[masked]).argmax(dim=1) == labels,
        "mlm_hits_other": model.mlm_logits(fused_other[masked]).argmax(dim=1) == labels,
        "itm_hits": torch.cat([own_hits, other_hits[has_other]]),
    }


def draw_other_products(batch: dict, generator: torch.Generator) -> Tensor:
    """Draw, for each pair of a batch, another pair of the batch with another product.

    -> its number (B,), −1 where there is none
    """
    positives = positive_pairs(batch["product_ids"], batch["caption_ids"])
    return pick_negatives(torch.zeros_like(positives, dtype=torch.float), positives, "random", generator)
