"""What is wrong, in words, for the mistakes that are easily made. The project's own tests then check the rest.

Each check takes the functions of an exercise and raises Mistake.
"""

from itertools import product

import torch
from torch import Tensor

from masking import first_pieces, word_counts
from tutorial.exercises.catalogue import Functions, Mistake

WORDS = torch.tensor(
    [
        [0, 2, 3, 3, 0, 6, 7, 0],  # [CLS] a zip ##per of black silk [SEP], where "of" may not be masked
        [0, 2, 0, 0, 0, 0, 0, 0],  # a caption of one word
        [0, 0, 0, 0, 0, 0, 0, 0],  # a caption without a word
    ]
)
SEEDS = range(20)


def check(number: int, functions: Functions) -> None:
    """Check an exercise. A stub is no mistake."""
    try:
        CHECKS[number - 1](*functions.values())
    except NotImplementedError:
        raise Mistake(f"exercise {number} is not written yet: {', '.join(functions)}") from None


def seeded(seed: int = 0) -> torch.Generator:
    """Make a generator."""
    return torch.Generator().manual_seed(seed)


def want(right: bool | Tensor, message: str) -> None:
    """Assert with a sentence."""
    if not right:
        raise Mistake(message)


def check_word_mask(mask: Tensor, words: Tensor, ratio: float) -> None:
    """Check what holds of any word mask (B, L): words alone, whole words, exact counts."""
    want(mask.dtype == torch.bool, "a word mask is boolean, True = masked")
    want(mask.shape == words.shape, "a word mask is (B, L)")
    want(not mask[words == 0].any(), "tokens are masked that are no words, where `maskable` is 0: [CLS], [SEP], [PAD]")
    masked_first = mask.gather(1, (words - 1).clamp(min=0))  # of each token whether its word's first piece is masked
    whole = torch.equal(mask, masked_first & (words > 0))
    want(whole, "one piece of a word is masked and another is not, which gives the word away")
    masked = (mask & first_pieces(words)).sum(dim=1).tolist()
    counts = word_counts(words, ratio).flatten().tolist()
    hint = "count words (`word_counts`), not tokens, and no coin for each word or one argsort"
    want(masked == counts, f"{masked} words are masked, not {counts}: {hint}")


def check_1(random_word_mask) -> None:
    """Exact counts, whole words, drawn uniformly and anew in each row."""
    for seed in SEEDS:
        check_word_mask(random_word_mask(WORDS, 0.5, seeded(seed)), WORDS, 0.5)
    same_caption = WORDS[:1].expand(9, -1)
    masks = random_word_mask(same_caption, 0.5, seeded()).unique(dim=0)
    want(len(masks) > 1, "all captions get the same random numbers: draw (B, L) of them, not (L,)")


def check_2(corrupt_words) -> None:
    """80/10/10, labels where something is masked."""
    ids = torch.randint(5, 1000, (100, 100), generator=seeded())
    clean = ids.clone()
    mask = torch.rand(ids.shape, generator=seeded(1)) < 0.5
    allowed = torch.arange(500, 1000)
    corrupted, labels = corrupt_words(ids, mask, 4, allowed, seeded())
    want(torch.equal(ids, clean), "token_ids itself is written into; the clean caption is still needed (ITC, ITM)")
    want((labels[~mask] == -100).all(), "words that are not masked have labels: −100 there")
    now, before = corrupted[mask], clean[mask]
    want(torch.equal(labels[mask], before), "the labels of masked words must be the original ids")
    gone = (now == 4).float().mean()
    kept = (now == before).float().mean()
    said = f"of the masked words {gone:.0%} become [MASK] and {kept:.0%} stay, not 80 and 10 %"
    want(abs(gone - 0.8) < 0.03 and abs(kept - 0.1) < 0.03, f"{said}: cut one draw into three ranges")
    drawn = now[(now != 4) & (now != before)]
    want(torch.isin(drawn, allowed).all(), "random words must come from replacement_ids, which has no special tokens")


def check_3(mask_precision, pointing_game) -> None:
    """Shares and chances worked out by hand."""
    mask = torch.tensor([[True, True, True, False, False]])
    candidates = torch.tensor([[True, True, False, True, False]])
    shared = torch.tensor([[True, False, True, False, True]])
    found = mask_precision(mask, candidates, shared)
    want(isinstance(found, tuple), "mask_precision returns two counts, hits and of how many: shares do not add up")
    hits, total = found
    want(total == 2, f"of {total} masked ones, should be 2: only masked candidates count, hit or not")
    want(hits == 1, f"{hits} hits, should be 1: masked, a candidate and shared")

    attention = torch.tensor([[0.1, 0.7, 0.1, 0.1], [0.5, 0.3, 0.2, 0.0]])
    regions = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 0]]).bool()
    words = torch.tensor([True, True])
    hits, expected, _ = pointing_game(attention[None], regions[None], words[None])
    want(hits == 1, f"pointing_game has {hits} hits, should be 1: is the most attended patch of a word in its region?")
    said = f"a random patch would hit {expected:.2f} times, should be 1 (3/4 + 1/4)"
    want(abs(expected - 1) < 1e-6, f"{said}: it hits a region as often as the region is large")


def check_4(positive_pairs, itc_targets) -> None:
    """Positives by product or caption; rows that sum to 1."""
    products = torch.tensor([7, 8])
    captions = torch.tensor([3, 4])
    key_products = torch.tensor([7, 8, 7, 9])
    key_captions = torch.tensor([3, 4, 5, 4])
    right = positive_pairs(products, captions, key_products, key_captions)
    want(right[0, 2], "the second image of a product counts as a negative: compare products, not positions")
    want(right[1, 3], "a key with the same caption to the letter counts as a negative, which nobody could tell apart")
    sim_m = torch.tensor([[0.0, 0, 0, 0], [0, 9, 0, 0]])
    total = itc_targets(right, sim_m, 0.0)[0].sum()
    want(abs(total - 1) < 1e-5, f"targets of two positives sum to {total:.1f}, not to 1: divide by their number")
    _, other, second, _ = itc_targets(right, sim_m, 0.4)[0]
    want(abs(other - 0.1) < 1e-5, "alpha is the share of softmax(sim_m), 1 − alpha is the share of the known pairs")
    want(abs(second - 0.4) < 1e-5, "positives share 1 − alpha evenly, also the second")


def check_5(pick_negatives) -> None:
    """Never a positive, also at low temperatures."""
    pairs = torch.tensor([0, 0, 1, 1])  # the first two are one product
    positives = pairs[:, None] == pairs
    positives[3] = True
    sim = torch.tensor(
        [
            [-1.0, -2, -8, -9],
            [-2.0, -1, -9, -8],
            [-9.0, -10, -1, -4],
            [-9.0, -8, -7, -1],
        ]
    )

    def draws(mode: str, scale: int) -> Tensor:
        """Draw with each seed. -> (seeds, 4)"""
        logits = sim * scale
        try:
            drawn = [pick_negatives(logits, positives, mode=mode, generator=seeded(seed)) for seed in SEEDS]
        except RuntimeError as error:
            if "prob" not in str(error):  # as torch.multinomial says it
                raise
            why = "nothing is left to draw by: at a low temperature the softmax is 0 but for the own pair"
            mend = "Mask the logits before the softmax. Keep the logits finite where every column is a positive"
            raise Mistake(f"{mode}: {why}. {mend}") from None
        want(torch.equal(logits, sim * scale), f"{mode}: sim itself is written into; it is still needed: masked_fill")
        return torch.stack(drawn)

    for mode, scale in product(("hard", "random", "similar"), (1, 1000)):
        drawn = draws(mode, scale)
        wrong = positives[:3].gather(1, drawn[:, :3].T)
        want(not wrong.any(), f"{mode}: a pair itself, or another positive, is drawn: −∞ at positives")
        want((drawn[:, 3] == -1).all(), f"{mode}: where every column is a positive the answer is −1")
        again = draws(mode, scale)
        want(torch.equal(drawn, again), f"{mode}: one generator, two draws: give it to torch.multinomial")
    best = torch.tensor([2, 3, 0])
    certain = draws("similar", 1000)[:, :3] == best
    want(certain.all(), "similar: not drawn ∝ exp(sim), by which the best is certain here")
    first_row = draws("random", 1000)[:, 0]
    want(len(first_row.unique()) > 1, "random always draws the same: it does not depend on `sim`")


def check_6(pick_negatives) -> None:
    """Below the own pair, by the margin."""

    def semihard(own: float, margin: float) -> int:
        sim = torch.tensor([[own, 0.9, 0.75, 0.5, 0.1]])
        positives = torch.tensor([[True, False, False, False, False]])
        return pick_negatives(sim, positives, mode="semihard", margin=margin).item()

    found = semihard(own=0.8, margin=0.0)
    want(found > 1, "the pair itself, or a negative more similar than the own pair, which is hard: sim < own")
    want(found == 2, "the least similar one below is the easiest; take the largest cosine below the own pair")
    said = "the margin is on the wrong side: of an own pair of 0.8 minus 0.2, the most similar one below 0.6"
    want(semihard(own=0.8, margin=0.2) == 3, said)
    want(semihard(own=0.0, margin=0.0) == 4, "none is below the own pair: then the least similar one")


def check_7(sync_mask) -> None:
    """Words by their score, the first of three pieces. Then patches by the attention of the words just masked."""

    def draws(attention: Tensor, scores: Tensor, words: Tensor, ratio: float, pool: float) -> tuple[Tensor, Tensor]:
        """Mask one pair with each seed. -> patch masks (seeds, P), word masks (seeds, L)"""
        patch_masks, word_masks = [], []
        for seed in SEEDS:
            patch_mask, word_mask = sync_mask(attention, scores, words, 0.25, ratio, pool, seeded(seed))
            check_word_mask(word_mask, words, ratio)
            patch_masks.append(patch_mask)
            word_masks.append(word_mask)
        return torch.cat(patch_masks), torch.cat(word_masks)

    words = torch.tensor([[0, 2, 2, 2, 5, 6, 0]])
    scores = torch.tensor([[99.0, 3, 3, 3, 1, 2, 99]])
    flat = torch.ones(1, 7, 4)

    def times_masked(scores: Tensor, ratio: float, pool: float) -> list[int]:
        _, word_masks = draws(flat, scores, words, ratio, pool)
        return word_masks[:, [1, 4, 5]].sum(dim=0).tolist()  # of the first piece of each word

    best, _, second = times_masked(scores, 0.67, 0.0)
    want(best, "the lowest scores are masked: it should be the highest")
    drawn = "word_ratio is drawn from the best max(pool, word_ratio) of the words, not of the tokens, not of all words"
    want(best == second == len(SEEDS), drawn)
    best, worst, second = times_masked(scores, 0.34, 0.67)
    want(best and second and not worst, f"the pool is ignored: {drawn}")
    equal = times_masked(torch.ones(1, 7), 0.34, 0.0)
    want(max(equal) < len(SEEDS), "of equal scores it is always the same word: `break_ties` first")

    best = [0.0, 0.1, 0.6, 0.0]
    other = [1.0, 1.0, 0.0, 0.0]
    special = [9.0, 9.0, 0.0, 9.0]
    attention = torch.tensor([[special, best, best, best, other, other, special]])
    patches, _ = draws(attention, scores, words, 0.34, 0.0)
    want(patches.shape[1] == 4, "a patch mask is (B, P)")
    want((patches.sum(dim=1) == 1).all(), "a patch mask has round(ratio · P) patches in each row")
    highest = "the highest mean attention of the words just masked; rows of other words, [CLS], [SEP] do not count"
    want(patches[:, 2].all(), f"other patches are masked than those with {highest}")
    equal, _ = draws(flat, scores, words, 0.34, 0.0)
    want(len(equal.unique(dim=0)) > 1, "of equal scores it is always the same patches: `break_ties` first")
    without, _ = draws(flat, scores, words * 0, 0.34, 0.0)
    want(len(without.unique(dim=0)) > 1, "a caption without a word has always the same patches: divide by 1 at least")


def check_8(grad_cam, soft_mask) -> None:
    """Grad-CAM, then one word's row of it, scaled."""
    attention = torch.rand(2, 2, 4, 6, generator=seeded()) + 0.1
    attention.requires_grad_()
    gradient = torch.randn(attention.shape, generator=seeded(1))
    score = (attention * gradient).sum()
    maps = grad_cam(attention, score)
    want(not maps.requires_grad, "maps are detached: nothing is learnt through a soft mask")
    want((maps >= 0).all(), "a negative gradient speaks against the match: max(0, ∂s/∂A) first (the ReLU of Grad-CAM)")
    right = (attention * gradient.clamp(min=0)).detach()
    want(torch.allclose(maps, right), "A · max(0, ∂s/∂A), for each head: the attention itself is a factor")
    try:
        score.backward()
    except RuntimeError:
        raise Mistake("the losses still need the graph of the score: retain_graph=True") from None
    word = torch.tensor([1, 2])
    found = soft_mask(maps, word)
    want(found.shape == (2, 5), "a soft mask is (B, P): the row of one word, without the image CLS in column 0")
    want(found.amax(dim=1).min() > 0.99, "each image has a most of its own, 1: (G − min G) / (max G − min G)")
    heat = right.mean(dim=1)[..., 1:]
    own = torch.stack([heat[0, 1], heat[1, 2]])
    want(torch.equal(found.argsort(), own.argsort()), "the row of the word counts, word_index, as the mean over heads")


CHECKS = (check_1, check_2, check_3, check_4, check_5, check_6, check_7, check_8)
