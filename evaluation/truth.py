"""What masks and negatives are worth, where the data set knows the truth: on synthetic photos."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import normalise, to_device, word_regions
from engine.batches import first_products
from engine.config import TrainConfig, grouping_of
from engine.run import Run, autocast
from engine.wiring import synchronize, teach
from evaluation.choice import choices
from losses import NegativeMode, pick_negatives, same_pairs
from masking import cooccurrence, pointing, random_patch_mask, random_word_mask
from readers.dataset import PhotoDataset
from readers.synthetic import Synthetic
from readers.wardrobe import WHOLE
from sampler import SEARCH_SIZE, SamplerMode, chain

CHOICE_PRODUCTS = 120  # held-out products whose photos choose between texts


@dataclass
class WordTruth:
    """What is known of a batch, token by token. Letters: B, L, P patches."""

    kinds: Tensor  # (B, L): which of KINDS a token is about, visible in this photo or not, counted from 1; else 0
    regions: Tensor  # (B, L, P): where this photo shows it; nowhere where it does not

    @property
    def attribute(self) -> Tensor:
        """(B, L): names an attribute, visible in this photo or not."""
        return self.kinds > 0

    @property
    def detail(self) -> Tensor:
        """(B, L): names a detail, which one does not see from afar."""
        return self.kinds > len(WHOLE)

    @property
    def visible(self) -> Tensor:
        """(B, L): names an attribute that this photo shows."""
        return self.regions.any(dim=2)


def word_truth(batch: dict, grid: int) -> WordTruth:
    """The truth about every token of a batch of a data set with `truths`; frames and prompts have none."""
    return WordTruth(batch["kinds"], word_regions(batch, grid))


def truth(run: Run, train_set: PhotoDataset, val_set: PhotoDataset) -> dict[str, float]:
    """What masks and negatives are worth, where the data set knows it: `mask_truth` and `negative_truth`."""
    if not (isinstance(train_set, Synthetic) and isinstance(val_set, Synthetic)):
        return {}
    return mask_truth(run, val_set) | choices(run, val_set, CHOICE_PRODUCTS) | negative_truth(run, train_set)


@torch.no_grad()
def mask_truth(run: Run, dataset: Synthetic, parts: int = 3) -> dict[str, float]:
    """Synchronized masks of held-out photos against what the photos show; beside each figure that of random masks.

    They are made as the config says, whether the run trains with them or not, without warm-up and hint. For what a
    photo adds, words are hidden in so many `parts`, one after the other.
    """
    config, generator = run.config, torch.Generator(run.device).manual_seed(run.config.seed)
    grid, sums = config.model.grid, {}

    def add(key: str, hits: Tensor, total: Tensor) -> None:
        before = sums.get(key, (0, 0))
        sums[key] = before[0] + hits.item(), before[1] + total.item()

    dataset.truths = True
    loader = DataLoader(first_products(dataset, config.val_products), config.batch_size, collate_fn=run.collate)
    for batch in tqdm(loader, "masks against the truth", unit=" batches", leave=False, disable=None):
        batch = to_device(batch, run.device)
        known = word_truth(batch, grid)
        visible, named = known.visible, known.regions.any(dim=1)  # (B, L), (B, P)
        attention, patch_mask, word_mask = shown_masks(run, batch, generator)
        random_patches = random_patch_mask(len(named), grid**2, config.mim_ratio, generator, run.device)
        random_words = random_word_mask(batch["words"], config.mlm_ratio, generator)
        for suffix, patches, words in (("", patch_mask, word_mask), ("_random", random_patches, random_words)):
            add("patch_cooccurrence" + suffix, *cooccurrence(patches, torch.ones_like(named), named))
            add("word_cooccurrence" + suffix, *cooccurrence(words, known.attribute, visible))
        hidden, right, right_elsewhere = restored(run, batch, generator, parts)
        groups = {"": visible, "_detail": visible & known.detail, "_whole": visible & ~known.detail}
        for end, words in groups.items():
            own, total = cooccurrence(hidden, words, right)
            elsewhere, _ = cooccurrence(hidden, words, right_elsewhere)
            add("photo_gain" + end, own - elsewhere, total)
        hits, expected, total = pointing(attention, known.regions, visible & known.detail)
        add("pointing", hits, total)
        add("pointing_random", expected, total)
    return {key: hits / max(1, total) for key, (hits, total) in sums.items()}


def restored(run: Run, batch: dict, generator: torch.Generator, parts: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Every word hidden once, with 1 / parts of the others. -> which tokens (B, L) were hidden, which of them are
    restored from their own photo, and which from that of another product."""
    model, ids, keep, words = run.model, batch["token_ids"], batch["attention_mask"], batch["words"]
    part_of = torch.randint(parts, words.shape, generator=generator, device=run.device)
    part_of = part_of.gather(1, (words - 1).clamp(min=0))  # all pieces of a word in the same
    forbidden = same_pairs(batch["product_ids"], batch["caption_ids"])
    other = pick_negatives(torch.zeros(forbidden.shape, device=run.device), forbidden, None, "random", generator)
    right = torch.zeros(2, *words.shape, dtype=torch.bool, device=run.device)
    with autocast(run):
        photos = model.fusion.project_image_kv(model.vision(normalise(batch["images"])))
        for part in range(parts):
            hidden = (words > 0) & (part_of == part)
            text_embeds = model.text(ids.masked_fill(hidden, run.mask_id), keep)
            for whose, rows in enumerate((None, other.clamp(min=0))):
                logits = model.mlm_logits(model.fusion(text_embeds, keep, photos, rows)[hidden])
                right[whose][hidden] = logits.argmax(-1) == ids[hidden]
    return words > 0, *right


def negative_truth(run: Run, dataset: Synthetic) -> dict[str, float]:
    """How many ITM negatives are false: batches grouped and negatives chosen
    by the config's modes, at random, and hard. Over some search blocks of training photos; chosen negatives alone,
    without the random ones that `itm_share` mixes in."""
    config, generator, figures = run.config, torch.Generator().manual_seed(run.config.seed), {}
    rows = np.random.default_rng(config.seed).permutation(len(dataset))[: 4 * SEARCH_SIZE]
    image_feat, text_feat = momentum_features(run, dataset, rows)
    modes = {"": (grouping_of(config), config.negatives), "_random": ("random", "random"), "_hard": ("hard", "hard")}
    for suffix, (grouping, picking) in modes.items():
        chosen = []  # (photo, text)
        for block in np.split(np.arange(len(rows)), range(SEARCH_SIZE, len(rows), SEARCH_SIZE)):
            sim = image_feat[block] @ text_feat[block].T  # (M, M)
            groups = np.stack([dataset.product_ids[rows[block]], dataset.caption_ids[rows[block]]])
            for batch in grouped(sim, groups, grouping, config):
                found = batch_negatives(run, sim[batch][:, batch], groups[:, batch], picking, generator)
                chosen += [(rows[block[batch[i]]], rows[block[batch[t]]]) for i, t in found]
        false = [dataset.describes(int(dataset.product_ids[text]), int(photo)) for photo, text in chosen]
        figures["false_negative_rate" + suffix] = float(np.mean(false)) if chosen else 0.0
    return figures


@torch.no_grad()
def momentum_features(run: Run, dataset: PhotoDataset, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """image_feat, text_feat (n, E) of some rows by the momentum model, on the CPU; no photo is cropped or flipped."""
    loader = DataLoader(torch.utils.data.Subset(dataset, rows.tolist()), 128, collate_fn=run.collate)
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
) -> list[tuple[int, int]]:
    """The negatives of a batch by its cosines (B, B): photo and text, of every photo and then of every text."""
    forbidden, found = same_pairs(*torch.from_numpy(groups)), []
    for scores, by_text in ((sim, False), (sim.T, True)):
        logits = scores / run.model.temp.item() if picking == "similar" else scores
        wrong = pick_negatives(logits, forbidden, None, picking, generator, run.config.margin).tolist()
        found += [(j, a) if by_text else (a, j) for a, j in enumerate(wrong) if j >= 0]
    return found


def shown_masks(run: Run, batch: dict, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """Attention (B, L, P) and synchronized masks (B, P), (B, L) of photos that are neither cropped nor flipped."""
    run.model.eval()  # or what photos add to words would be learnt from this, and by the first rank alone
    with autocast(run):
        teacher = teach(run, batch | {"images": normalise(batch["images"])})
        return synchronize(run, batch, teacher, generator)


def chance_corrected(figures: dict[str, float], key: str) -> float:
    """`key` on a scale from random masks, 0, to perfect ones, 1: (value − random) / (1 − random)."""
    chance = figures[key + "_random"]
    return (figures[key] - chance) / max(1e-9, 1 - chance)


def truth_in_words(figures: dict[str, float]) -> list[str]:
    """The truth for the eye: lines for the image gain, for the choice between captions, for masks and negatives."""
    if not figures:
        return []
    percent = {key: f"{100 * value:.1f}" for key, value in figures.items()}
    patches, words = (chance_corrected(figures, f"{what}_cooccurrence") for what in ("patch", "word"))
    pointing_ratio = figures["pointing"] / max(1e-9, figures["pointing_random"])
    false = " / ".join(percent["false_negative_rate" + end] for end in ("", "_random", "_hard"))
    lines = [
        f"the photo adds {percent['photo_gain_detail']} points to masked words for details, "
        f"{percent['photo_gain_whole']} to those for garment, colour, pattern, sleeve"
    ]
    if "choice_coarse" in figures and "choice_fine" in figures:  # not where too few photos show such values
        lines.append(
            f"own caption chosen, coarse / fine: "
            f"{percent['choice_coarse']} / {percent['choice_fine']} % by similarity, "
            f"{percent['choice_coarse_itm']} / {percent['choice_fine_itm']} % by the ITM head (chance 50)"
        )
    lines.append(
        f"masks, chance-corrected: patches {patches:.2f}, words {words:.2f}; "
        f"pointing to details {pointing_ratio:.1f} x chance"
    )
    lines.append(f"false negatives, chosen / random / hard: {false} %")
    return lines
