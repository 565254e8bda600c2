"""What masks and negatives are worth, where the data set knows the truth: on synthetic photos."""

from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import Collate, encode, normalise, to_device
from harness.batches import first_products
from harness.config import TrainConfig
from harness.run import Run, autocast
from harness.wiring import synchronize, teach
from losses import NegativeMode, forbidden_negatives, pick_negatives
from masking import cooccurrence, pointing, random_patch_mask, random_word_mask, reduce_heads
from photos.dataset import PhotoDataset
from photos.synthetic import Synthetic
from sampler import SamplerMode, chain


@dataclass
class WordTruth:
    """`Synthetic.truth` of a batch, token by token. Letters: B, L, P patches."""

    attribute: Tensor  # (B, L): names an attribute, visible in this photo or not
    detail: Tensor  # (B, L): a small one, not the garment itself nor its colour or pattern
    regions: Tensor  # (B, L, P): where this photo shows it; nowhere where it does not

    @property
    def visible(self) -> Tensor:
        """(B, L): names an attribute that this photo shows."""
        return self.regions.any(dim=2)


def word_truth(dataset: Synthetic, rows: list[int], tokenizer: Tokenizer, grid: int) -> WordTruth:
    """The truth about every token of the descriptions of `rows`, tokenised together; frames and prompts have none."""
    encodings = encode(tokenizer, [dataset.text(row) for row in rows])
    attribute = torch.zeros(len(rows), len(encodings[0].ids), dtype=torch.bool)
    detail, regions = attribute.clone(), torch.zeros(*attribute.shape, grid**2, dtype=torch.bool)
    for b, (row, encoding) in enumerate(zip(rows, encodings, strict=True)):
        spans, seen = dataset.truth(row, grid)
        for token, (piece, (start, end)) in enumerate(zip(encoding.word_ids, encoding.offsets, strict=True)):
            for first, last, key in spans:
                if piece == 1 and first <= start < end <= last:
                    attribute[b, token], detail[b, token] = True, key not in ("garment", "colour", "pattern")
                    if key in seen:
                        regions[b, token] = torch.from_numpy(seen[key])
    return WordTruth(attribute, detail, regions)


def truth(run: Run, train_set: PhotoDataset, val_set: PhotoDataset) -> dict[str, float]:
    """What masks and negatives are worth, where the data set knows it: `mask_truth` and `negative_truth`."""
    if not (isinstance(train_set, Synthetic) and isinstance(val_set, Synthetic)):
        return {}
    return mask_truth(run, val_set) | negative_truth(run, train_set)


@torch.no_grad()
def mask_truth(run: Run, dataset: Synthetic) -> dict[str, float]:
    """Synchronized masks of held-out photos against what the photos show; beside each figure that of random masks.

    They are made as the config says, whether the run trains with them or not, without noise, warm-up and hint.
    """
    config, generator = run.config, torch.Generator(run.device).manual_seed(run.config.seed)
    grid, sums = config.model.grid, {}

    def add(key: str, hits: Tensor, total: Tensor) -> None:
        before = sums.get(key, (0, 0))
        sums[key] = before[0] + hits.item(), before[1] + total.item()

    shown = first_products(dataset, config.val_products)
    loader = DataLoader(shown, config.batch_size, collate_fn=Collate(run.tokenizer))
    for batch in tqdm(loader, "masks against the truth", unit=" batches", leave=False, disable=None):
        known = word_truth(dataset, batch["rows"].tolist(), run.tokenizer, grid)
        attribute, detail, visible = (t.to(run.device) for t in (known.attribute, known.detail, known.visible))
        regions = known.regions.to(run.device)
        named = regions.any(dim=1)  # (B, P)
        batch = to_device(batch, run.device)
        attention, patch_mask, word_mask = shown_masks(run, batch, generator)
        random_patches = random_patch_mask(len(named), grid**2, config.mim_ratio, generator, run.device)
        random_words = random_word_mask(batch["words"], config.mlm_ratio, generator)
        for suffix, patches, words in (("", patch_mask, word_mask), ("_random", random_patches, random_words)):
            add("patch_cooccurrence" + suffix, *cooccurrence(patches, torch.ones_like(named), named))
            add("word_cooccurrence" + suffix, *cooccurrence(words, attribute, visible))
            add("detail_cooccurrence" + suffix, *cooccurrence(words, attribute & detail, visible))
            add("attribute_share" + suffix, *cooccurrence(words, batch["words"], attribute))
        hidden = batch["token_ids"].masked_fill(random_words, run.mask_id)
        with autocast(run):
            text_embeds = run.model.encode_text(hidden, batch["attention_mask"])
            image_embeds = run.model.encode_image(normalise(batch["images"]))
            fused = run.model.fuse(text_embeds, batch["attention_mask"], image_embeds)
        for key, words in (("visible", random_words & visible), ("unseen", random_words & attribute & ~visible)):
            right = run.model.mlm_logits(fused[words]).argmax(-1) == batch["token_ids"][words]
            add(f"{key}_word_accuracy", right.sum(), words.sum())
        heat = reduce_heads(attention, config.mask_heads)
        for key, words in (("pointing", visible & detail), ("pointing_whole", visible & ~detail)):
            hits, expected, total = pointing(heat, regions, words)
            add(key, hits, total)
            add(key + "_random", expected, total)
    return {key: hits / max(1, total) for key, (hits, total) in sums.items()}


def negative_truth(run: Run, dataset: Synthetic) -> dict[str, float]:
    """How many ITM negatives are false, and how similar to the anchor they are: batches grouped and negatives chosen
    by the config's modes, at random, and hard. Over some search blocks of training photos; chosen negatives alone,
    without the random ones that `itm_share` mixes in."""
    config, generator, figures = run.config, torch.Generator().manual_seed(run.config.seed), {}
    rows = np.random.default_rng(config.seed).permutation(len(dataset))[: 4 * config.search_size]
    image_feat, text_feat = momentum_features(run, dataset, rows)
    modes = {"": (config.sampler, config.itm_negatives), "_random": ("random", "random"), "_hard": ("hard", "hard")}
    for suffix, (grouping, picking) in modes.items():
        chosen = []  # (photo, text, similarity)
        for block in np.split(np.arange(len(rows)), range(config.search_size, len(rows), config.search_size)):
            sim = image_feat[block] @ text_feat[block].T  # (M, M)
            groups = np.stack([dataset.product_ids[rows[block]], dataset.caption_ids[rows[block]]])
            for batch in grouped(sim, groups, grouping, config):
                found = batch_negatives(run, sim[batch][:, batch], groups[:, batch], picking, generator)
                chosen += [(rows[block[batch[i]]], rows[block[batch[t]]], cosine) for i, t, cosine in found]
        false = [dataset.describes(int(dataset.product_ids[text]), int(photo)) for photo, text, _ in chosen]
        figures["false_negative_rate" + suffix] = float(np.mean(false)) if chosen else 0.0
        figures["negative_similarity" + suffix] = float(np.mean([c for _, _, c in chosen])) if chosen else 0.0
    return figures


@torch.no_grad()
def momentum_features(run: Run, dataset: PhotoDataset, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """image_feat, text_feat (n, E) of some rows by the momentum model, on the CPU; no photo is cropped or flipped."""
    loader = DataLoader(torch.utils.data.Subset(dataset, rows.tolist()), 128, collate_fn=Collate(run.tokenizer))
    feats = []
    for batch in tqdm(loader, "negatives against the truth", unit=" batches", leave=False, disable=None):
        batch = to_device(batch, run.device)
        with autocast(run):
            teacher = teach(run, batch | {"images": normalise(batch["images"])})
        feats.append((teacher.image_feat.cpu(), teacher.text_feat.cpu()))
    image_feat, text_feat = map(torch.cat, zip(*feats, strict=True))
    return image_feat, text_feat


def grouped(sim: Tensor, groups: np.ndarray, grouping: SamplerMode, config: TrainConfig) -> list[np.ndarray]:
    """The items of a search block, sim (M, M), in batches as the sampler would compose them. -> item numbers."""
    order = np.arange(len(sim))
    if grouping != "random":
        order = chain(sim.numpy(), groups, 0, config.batch_size, grouping, config.margin)
    return np.split(order, range(config.batch_size, len(order), config.batch_size))


def batch_negatives(
    run: Run, sim: Tensor, groups: np.ndarray, picking: NegativeMode, generator: torch.Generator
) -> list[tuple[int, int, float]]:
    """The negatives of a batch by its cosines (B, B): photo, text, cosine, of every photo and then of every text."""
    forbidden, found = forbidden_negatives(*torch.from_numpy(groups)), []
    for scores, by_text in ((sim, False), (sim.T, True)):
        logits = scores / run.model.temp.item() if picking == "similar" else scores
        wrong = pick_negatives(logits, forbidden, None, picking, generator, run.config.margin).tolist()
        pairs = [(j, a) if by_text else (a, j) for a, j in enumerate(wrong) if j >= 0]
        found += [(photo, text, sim[photo, text].item()) for photo, text in pairs]
    return found


def shown_masks(run: Run, batch: dict, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """Attention (B, h, L, N) and synchronized masks (B, P), (B, L) of photos that are neither cropped nor flipped."""
    with autocast(run):
        teacher = teach(run, batch | {"images": normalise(batch["images"])})
        return synchronize(run, batch, teacher, 0.0, generator)


def skill(figures: dict[str, float], key: str) -> float:
    """How far `key` is on the way from what random masks get to perfect: (value − random) / (1 − random)."""
    return (figures[key] - figures[key + "_random"]) / max(1e-9, 1 - figures[key + "_random"])


def truth_in_words(figures: dict[str, float]) -> list[str]:
    """The truth for the eye: one line for the masks as skill over random ones, one for the negatives."""
    if not figures:
        return []
    times = lambda key: figures[key] / max(1e-9, figures[key + "_random"])
    three = lambda key: " / ".join(f"{figures[key + suffix]:.3f}" for suffix in ("", "_random", "_hard"))
    patches, words, details = (skill(figures, f"{what}_cooccurrence") for what in ("patch", "word", "detail"))
    return [
        f"masks, skill over random ones: patches {patches:.2f}, words {words:.2f}, of details {details:.2f}; "
        f"pointing to details {times('pointing'):.1f} x chance, to the rest {times('pointing_whole'):.1f} x",
        f"negatives, chosen / random / hard: false {three('false_negative_rate')}, "
        f"similarity {three('negative_similarity')}",
    ]
