"""Held-out retrieval, ITM and MLM accuracy while pretraining goes on."""

from collections import defaultdict

import torch
from torch import Tensor

from engine.batches import batches_of, first_products, text_features, texts_to_search
from engine.run import Run, autocast
from evaluation.scores import full_rankings, recalls_of
from losses import pick_negatives, positive_pairs
from masking import random_word_mask
from readers.dataset import PairDataset

TABLE = {  # metric -> its name in the closing table; docs/glossary.md explains all
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
    "false_negative_rate": "false negatives among those chosen",
}


def metrics_table(metrics: dict[str, float], chance: dict[str, float]) -> list[str]:
    """The metrics that there are as lines: name, value and unit, what chance or random masks give."""
    half = {key: 0.5 for key in TABLE if key.startswith("choice") or key == "val_itm_accuracy"}
    lines = [f"  {'held out':40}{'value':>7}{'chance':>16}"]
    for key, name in TABLE.items():
        if key not in metrics:
            continue
        by_chance = (chance | half).get(key, metrics.get(f"{key}_random"))
        if "gain" in key:
            by_chance = 0.0
        line = f"  {name:40}{100 * metrics[key]:7.1f} {'points' if 'gain' in key else '%':7}"
        if by_chance is not None:
            line += f"{100 * by_chance:8.1f}"
        if key in ("patch_precision", "word_precision"):
            line += f"   chance-corrected {chance_corrected(metrics, key):.2f}"
        lines.append(line.rstrip())
    return lines


def chance_corrected(metrics: dict[str, float], key: str) -> float:
    """`key` on a scale from random masks, 0, to perfect masks, 1: (value − random) / (1 − random)."""
    chance = metrics[f"{key}_random"]
    return (metrics[key] - chance) / max(1e-9, 1 - chance)


@torch.no_grad()
def validate(run: Run, dataset: PairDataset) -> tuple[dict[str, float], dict[str, float]]:
    """Measure retrieval, ITM and MLM on held-out products, with the same random draws every time.

    -> metrics, and the recalls of a random order under the same keys
    """
    run.model.eval()
    shown = first_products(dataset, run.config.val_products)
    outputs = defaultdict(list)
    for number, batch in enumerate(batches_of(run, shown, "validating")):
        generator = torch.Generator(run.device).manual_seed((run.config.seed * 1_000_003 + number) % 2**63)
        with autocast(run):
            predicted = predict_batch(run, batch, generator)
        outputs["rows"].append(batch["rows"].cpu())
        for key, value in predicted.items():
            outputs[key].append(value.cpu())
    outputs = {key: torch.cat(parts) for key, parts in outputs.items()}

    texts, image_products, text_products = texts_to_search(dataset, outputs["rows"].numpy())
    text_feat = text_features(run, texts).cpu()
    rankings = full_rankings(outputs["image_feat"], text_feat, image_products, text_products)
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
    metrics["val_unreadable"] = len(shown) - len(outputs["rows"])
    return metrics, chance


def predict_batch(run: Run, batch: dict, generator: torch.Generator) -> dict[str, Tensor]:
    """Predict, for a batch of held-out images, whether captions match them and which words are masked.

    -> image_feat (B, E); mlm_hits (M,): masked tokens predicted from their own image, mlm_hits_other (M,): from the
    image of another product; itm_hits (≤ 2B,): pairs that are classified rightly
    """
    model = run.model
    ids, attention_mask = batch["token_ids"], batch["attention_mask"]  # (B, L)
    masked = random_word_mask(batch["maskable"], run.config.mlm_ratio, generator)  # (B, L)
    other = draw_other(batch, generator)
    has_other = other >= 0
    other = other.clamp(min=0)

    image_embeds = model.vision(batch["images"])
    image_kv = model.fusion.project_image_kv(image_embeds)
    text_embeds = model.text(ids, attention_mask)
    masked_embeds = model.text(ids.masked_fill(masked, run.mask_id), attention_mask)

    # ITM: each image with its own caption, then with one of another product
    matching = model.fusion(text_embeds, attention_mask, image_kv, cls_only=True)
    wrong = model.fusion(text_embeds[other], attention_mask[other], image_kv, cls_only=True)
    own_hits = model.itm_logits(matching).argmax(dim=1) == 1
    wrong_hits = model.itm_logits(wrong).argmax(dim=1) == 0

    # MLM: from the own image, then from one of another product
    labels = ids[masked]
    fused = model.fusion(masked_embeds, attention_mask, image_kv)
    fused_other = model.fusion(masked_embeds, attention_mask, image_kv, image_index=other)
    return {
        "image_feat": model.image_feature(image_embeds),
        "mlm_hits": model.mlm_logits(fused[masked]).argmax(dim=1) == labels,
        "mlm_hits_other": model.mlm_logits(fused_other[masked]).argmax(dim=1) == labels,
        "itm_hits": torch.cat([own_hits, wrong_hits[has_other]]),
    }


def draw_other(batch: dict, generator: torch.Generator) -> Tensor:
    """Draw for each pair of a batch another one, of another product. -> (B,), −1 where there is none"""
    positives = positive_pairs(batch["product_ids"], batch["caption_ids"])
    return pick_negatives(torch.zeros_like(positives, dtype=torch.float), positives, "random", generator)
