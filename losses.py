"""Every objective, and the choice of negatives inside a batch. Pure functions on tensors.

Letters: B batch, K contrastive keys (in-batch momentum features, then the queue), M rows, V vocabulary.
Similarities are logits: already divided by the temperature. −100 marks a label that is ignored.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

NegativeMode = Literal["random", "similar", "hard", "semihard"]


def itc_targets(positives: Tensor, sim_m: Tensor, alpha: float) -> Tensor:
    """Mix the momentum model's similarities with the known pairs: the soft targets of ALBEF (§3.2).

    y = α·softmax(s_m) + (1 − α)·y_hard, with y_hard uniform over the positives of a row
    positives (B, K) by `positive_pairs`, one at least in each row · sim_m (B, K): momentum logits
    -> (B, K), rows sum to 1
    """
    hard = positives / positives.sum(dim=1, keepdim=True)
    return alpha * sim_m.float().softmax(dim=1) + (1 - alpha) * hard


def itc_loss(
    sim_i2t: Tensor,
    sim_t2i: Tensor,
    targets_i2t: Tensor,
    targets_t2i: Tensor,
    gamma: float = 0.0,
) -> Tensor:
    """Compute the image-text contrastive loss, focal where gamma > 0. All tensors (B, K) -> scalar.

    L = −½ Σ_directions mean_b Σ_j (1 − p_bj)^γ · y_bj · log p_bj
    γ = 0 is ALBEF's eq. 6, up to a constant. γ > 0 is the focal loss of Park & Han (2023; our choice: with the soft
    targets) and of Fashion-FINE's hard negative mining.
    """

    def one_way(sim: Tensor, targets: Tensor) -> Tensor:
        log_p = F.log_softmax(sim.float(), dim=1)
        weights = targets
        if gamma > 0:
            one_minus_p = -torch.expm1(log_p)
            # never 0, since below γ = 1 the slope would be infinite there
            weights = targets * one_minus_p.clamp(min=1e-12) ** gamma
        return -(weights * log_p).sum(dim=1).mean()

    return (one_way(sim_i2t, targets_i2t) + one_way(sim_t2i, targets_t2i)) / 2


def positive_pairs(
    product_ids: Tensor,
    caption_ids: Tensor,
    key_product_ids: Tensor | None = None,
    key_caption_ids: Tensor | None = None,
) -> Tensor:
    """Mark the positives of each row, which are never its negatives. -> (B, K) bool

    Positives are keys of the same product, and keys with the same caption to the letter (our choice).
    product_ids, caption_ids (B,): of the rows · key_product_ids, key_caption_ids (K,): of the keys, by default the rows
    """
    if key_product_ids is None:
        key_product_ids = product_ids
    if key_caption_ids is None:
        key_caption_ids = caption_ids
    same_product = product_ids[:, None] == key_product_ids
    same_caption = caption_ids[:, None] == key_caption_ids
    return same_product | same_caption


def pick_negatives(
    sim: Tensor,
    positives: Tensor,
    mode: NegativeMode = "similar",
    generator: torch.Generator | None = None,
    margin: float | Tensor = 0.0,
) -> Tensor:
    """Pick one negative in the batch for each row of `sim` (B, B): its column (B,), or −1 where all are positive.

    random: uniform · similar: drawn ∝ exp(sim) (ALBEF §3.2) · hard: the most similar one (GRIT-VLP)
    semihard: the most similar one that is less similar than the own pair, the diagonal, by more than `margin`; if none
    is, the least similar one (our choice; `sampler.chain` follows the same rule). FaceNet's semi-hard negatives are
    less similar than the own pair by *less* than the margin; here the margin keeps away from false negatives.
    """
    sim = sim.detach().float()
    possible = ~positives.all(dim=1)
    if mode == "hard":
        chosen = sim.masked_fill(positives, -torch.inf).argmax(dim=1)
    elif mode == "semihard":
        below = (sim < sim.diagonal()[:, None] - margin) & ~positives
        most_similar_below = sim.masked_fill(~below, -torch.inf).argmax(dim=1)
        least_similar = sim.masked_fill(positives, torch.inf).argmin(dim=1)
        chosen = torch.where(below.any(dim=1), most_similar_below, least_similar)
    else:
        logits = sim if mode == "similar" else torch.zeros_like(sim)
        # before the softmax: at a low temperature probabilities can be 0 everywhere but at the positive
        logits = logits.masked_fill(positives & possible[:, None], -torch.inf)
        chosen = torch.multinomial(logits.softmax(dim=1), 1, generator=generator).squeeze(1)
    return torch.where(possible, chosen, -1)


def itm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute image-text matching, a two-way cross-entropy (ALBEF eq. 4). logits (M, 2), labels (M,) 1 = match."""
    return cross_entropy(logits, labels)


def mlm_loss(logits: Tensor, labels: Tensor, logits_m: Tensor | None = None, alpha: float = 0.0) -> Tensor:
    """Compute masked language modelling with momentum soft targets (ALBEF eq. 3, 7). -> scalar, 0 without labels.

    L = (1 − α)·CE(label) + α·CE(softmax(logits_m)), mean over the labelled rows
    logits, logits_m (M, V), labels (M,).
    """
    if logits_m is None or alpha == 0:
        return cross_entropy(logits, labels)
    log_p = F.log_softmax(logits.float(), dim=-1)
    hard = F.nll_loss(log_p, labels, ignore_index=-100, reduction="none")  # (M,)
    targets = logits_m.float().softmax(dim=-1)
    soft = -(targets * log_p).sum(dim=-1)  # (M,)
    labelled = labels != -100
    total = (((1 - alpha) * hard + alpha * soft) * labelled).sum()
    return total / labelled.sum().clamp(min=1)


def mim_loss(pixels: Tensor, images: Tensor, ids_masked: Tensor) -> Tensor:
    """Compute masked image modelling: the squared error on masked patches (MAE, He et al. 2022, §3). -> scalar.

    L = mean over masked patches p and their pixels of (x̂_p − (x_p − mean x_p) / std x_p)²
    our choice: std without Bessel's correction; MAE's code applies it, so its std is 0.3 % larger for 192 numbers
    pixels (B, M, 3p²) predicted of the patches `ids_masked` (B, M), images (B, 3, H, W)
    """
    side = round((pixels.shape[2] / 3) ** 0.5)
    patches = rearrange(images.float(), "b c (h p) (w q) -> b (h w) (p q c)", p=side, q=side)
    target = patches.gather(1, repeat(ids_masked, "b m -> b m x", x=pixels.shape[2]))
    target = F.layer_norm(target, target.shape[2:], eps=1e-6)
    error = F.mse_loss(pixels.float(), target, reduction="sum")
    return error / max(1, target.numel())  # 0, not NaN, where nothing is masked


def alignment_loss(text_feat: Tensor, image_feat: Tensor) -> Tensor:
    """Compute the distance of unit-length features (FashionSAP, Fashion-FINE's C-CmA). (B, E), (B, E) -> scalar.

    L = mean_b (1 − (cos(t_b, i_b) + 1) / 2), in [0, 1]
    """
    cosine = (text_feat.float() * image_feat.float()).sum(dim=1)
    return (1 - (cosine + 1) / 2).mean()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean cross-entropy over the rows with a label; 0, not NaN, without any."""
    total = F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")
    return total / (labels != -100).sum().clamp(min=1)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the share of labelled rows (label ≥ 0) that are classified rightly. logits (M, C), labels (M,)."""
    labelled = labels >= 0
    highest = logits.max(dim=-1).indices  # argmax is six times as slow in bf16 on a CPU
    correct = (highest == labels) & labelled
    return correct.sum() / labelled.sum().clamp(min=1)
