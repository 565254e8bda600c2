"""Checks for typical mistakes, each with a message for the student. The project's own tests then check the rest.

Each check takes the functions of an exercise and raises Mistake.
"""

from itertools import product

import torch
from torch import Tensor

from masking import first_pieces, patch_count, word_counts
from tutorial.exercises.catalogue import Functions, Mistake

MASKABLE = torch.tensor(
    [
        [0, 2, 3, 3, 0, 6, 7, 0, 0, 0, 0, 0, 0, 0, 0],  # [CLS] long zip ##per of black silk [SEP]; "of" must stay
        [0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],  # a caption of one word
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],  # a caption without a word
        [0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 0],  # 13 words, so that rounding matters
    ]
)
RATIOS = (0.0, 0.2, 0.35, 0.5, 1.0)
SEEDS = range(20)


def check(number: int, functions: Functions) -> None:
    """Check the functions of an exercise. Raises Mistake, also where a function is still a stub."""
    try:
        CHECKS[number - 1](*functions.values())
    except NotImplementedError:
        names = ", ".join(functions)
        raise Mistake(f"exercise {number} is not written yet: {names}; replace `raise NotImplementedError`") from None


def seeded(seed: int = 0) -> torch.Generator:
    """Return a generator with this seed."""
    return torch.Generator().manual_seed(seed)


def require(condition: bool | Tensor, message: str) -> None:
    """Raise Mistake with the message if the condition is false."""
    if not condition:
        raise Mistake(message)


def check_word_mask(mask: Tensor, maskable: Tensor, ratio: float) -> None:
    """Check a word mask (B, L): only words, whole words, exact counts. Raises Mistake."""
    require(mask.dtype == torch.bool, "a word mask must be boolean, True = masked")
    require(mask.shape == maskable.shape, "a word mask must have the shape (B, L)")
    special = "some masked tokens may not be masked; leave tokens where `maskable` is 0: [CLS], [SEP], [PAD]"
    require(not mask[maskable == 0].any(), special)
    first_is_masked = mask.gather(1, (maskable - 1).clamp(min=0))  # (B, L): of the word that a token belongs to
    is_whole = torch.equal(mask, first_is_masked & (maskable > 0))
    require(is_whole, "one piece of a word is masked and another is not, which gives the word away; mask all pieces")
    masked_words = (mask & first_pieces(maskable)).sum(dim=1).tolist()
    counts = word_counts(maskable, ratio).flatten().tolist()
    rule = f"mask exactly word_counts(maskable, {ratio}) words"
    advice = "count words, not tokens, and toss no coin; a rank needs argsort twice"
    require(masked_words == counts, f"{masked_words} words are masked instead of {counts}; {rule}: {advice}")


def check_1(random_word_mask) -> None:
    """Check that counts are exact, words are whole, and each row has its own draw."""
    for ratio in RATIOS:
        for seed in SEEDS:
            check_word_mask(random_word_mask(MASKABLE, ratio, seeded(seed)), MASKABLE, ratio)
    mask = random_word_mask(MASKABLE, 0.5, seeded())
    again = random_word_mask(MASKABLE, 0.5, seeded())
    require(torch.equal(mask, again), "the same seed gives other masks; pass `generator` to every draw")
    same_caption = MASKABLE[:1].expand(9, -1)
    masks = random_word_mask(same_caption, 0.5, seeded()).unique(dim=0)
    require(len(masks) > 1, "all captions get the same random numbers; draw (B, L) numbers, not (L,)")


def check_2(corrupt_words) -> None:
    """Check the shares of 80, 10 and 10 %, and labels where a token is masked."""
    ids = torch.randint(5, 1000, (100, 100), generator=seeded())
    clean = ids.clone()
    mask = torch.rand(ids.shape, generator=seeded(1)) < 0.5
    allowed = torch.arange(500, 1000)
    corrupted, labels = corrupt_words(ids, mask, 4, allowed, seeded())
    unchanged = torch.equal(ids, clean)
    require(unchanged, "token_ids is changed in place; return a new tensor, since ITC and ITM read the clean caption")
    require((labels[~mask] == -100).all(), "words that are not masked have labels; their label must be −100")
    new_ids = corrupted[mask]
    old_ids = clean[mask]
    require(torch.equal(labels[mask], old_ids), "the labels of masked words are wrong; they must be the original ids")
    mask_share = (new_ids == 4).float().mean()
    kept_share = (new_ids == old_ids).float().mean()
    shares = f"{mask_share:.0%} of the masked words become [MASK] and {kept_share:.0%} stay, instead of 80 and 10 %"
    is_close = abs(mask_share - 0.8) < 0.03 and abs(kept_share - 0.1) < 0.03
    require(is_close, f"{shares}; cut one random draw into three ranges")
    random_ids = new_ids[(new_ids != 4) & (new_ids != old_ids)]
    is_allowed = torch.isin(random_ids, allowed).all()
    require(is_allowed, "some random words are not among replacement_ids; draw from these, which lack special tokens")
    again, _ = corrupt_words(ids, mask, 4, allowed, seeded())
    require(torch.equal(corrupted, again), "the same seed gives other words; pass `generator` to every draw")


def check_3(mask_precision, pointing_game) -> None:
    """Check counts and chances worked out by hand."""
    mask = torch.tensor([[True, True, True, False, False]])
    candidates = torch.tensor([[True, True, False, True, False]])
    shared = torch.tensor([[True, False, True, False, True]])
    counts = mask_precision(mask, candidates, shared)
    is_tuple = isinstance(counts, tuple)
    require(is_tuple, "mask_precision must return two counts, hits and total; shares cannot be added over batches")
    hits, total = counts
    require(total == 2, f"mask_precision has a total of {total} instead of 2; only masked candidates count")
    require(hits == 1, f"mask_precision has {hits} hits instead of 1; a hit is masked, a candidate and shared")

    attention = torch.tensor([[0.1, 0.7, 0.1, 0.1], [0.5, 0.3, 0.2, 0.0]])
    regions = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 0]]).bool()
    words = torch.tensor([True, True])
    hits, expected, _ = pointing_game(attention[None], regions[None], words[None])
    require(hits == 1, f"pointing_game has {hits} hits instead of 1; a hit has its most attended patch in its region")
    number = f"pointing_game expects {expected:.2f} hits of random patches instead of 1 (3/4 + 1/4)"
    require(abs(expected - 1) < 1e-6, f"{number}; the chance of a word is its region's share of the patches")


def check_4(positive_pairs, itc_targets) -> None:
    """Check positives by product and by caption, and rows that sum to 1."""
    products = torch.tensor([7, 8])
    captions = torch.tensor([3, 4])
    key_products = torch.tensor([7, 8, 7, 9])
    key_captions = torch.tensor([3, 4, 5, 4])
    positives = positive_pairs(products, captions, key_products, key_captions)
    require(positives[0, 2], "the second image of a product is no positive; compare product ids, not positions")
    require(positives[1, 3], "a key with the same caption is no positive; compare caption ids, too")
    sim_m = torch.tensor([[0.0, 0, 0, 0], [0, 9, 0, 0]])
    total = itc_targets(positives, sim_m, 0.0)[0].sum()
    is_one = abs(total - 1) < 1e-5
    require(is_one, f"the targets of a row with two positives sum to {total:.1f} instead of 1; divide by their number")
    _, negative, second_positive, _ = itc_targets(positives, sim_m, 0.4)[0]
    require(abs(negative - 0.1) < 1e-5, "the weights are wrong; alpha weighs softmax(sim_m), 1 − alpha the positives")
    is_even = abs(second_positive - 0.4) < 1e-5
    require(is_even, "the second positive of a row has a wrong target; all positives share 1 − alpha evenly")


def check_5(pick_negatives) -> None:
    """Check that a negative is never a positive, also at low temperatures."""
    products = torch.tensor([0, 0, 1, 1])
    positives = products[:, None] == products
    positives[3] = True
    sim = torch.tensor(
        [
            [-1.0, -2, -8, -9],
            [-2.0, -1, -9, -8],
            [-9.0, -10, -1, -4],
            [-9.0, -8, -7, -1],
        ]
    )

    def draw_with_each_seed(mode: str, scale: int) -> Tensor:
        """Pick negatives with each seed. Returns (seeds, 4). Raises Mistake."""
        logits = sim * scale
        try:
            draws = [pick_negatives(logits, positives, mode=mode, generator=seeded(seed)) for seed in SEEDS]
        except RuntimeError as error:
            if "prob" not in str(error):  # the message of torch.multinomial
                raise
            reason = "no column has a probability above 0: at a low temperature the softmax is 0 but for the own pair"
            advice = "Mask the logits before the softmax. Keep the logits finite where every column is a positive"
            raise Mistake(f"{mode}: {reason}. {advice}") from None
        is_unchanged = torch.equal(logits, sim * scale)
        require(is_unchanged, f"{mode}: sim is changed in place; use masked_fill, since sim is needed later")
        return torch.stack(draws)

    for mode, scale in product(("hard", "random", "similar"), (1, 1000)):
        drawn = draw_with_each_seed(mode, scale)
        is_positive = positives[:3].gather(1, drawn[:, :3].T)
        require(not is_positive.any(), f"{mode}: the own pair or another positive is picked; give positives −∞")
        require((drawn[:, 3] == -1).all(), f"{mode}: a row that has only positives must give −1")
        again = draw_with_each_seed(mode, scale)
        require(torch.equal(drawn, again), f"{mode}: one seed gives two results; pass generator to torch.multinomial")
    most_similar = torch.tensor([2, 3, 0])
    is_certain = (draw_with_each_seed("similar", 1000)[:, :3] == most_similar).all()
    require(is_certain, "similar: the draw is not ∝ exp(sim), which makes the most similar negative certain here")
    first_row = draw_with_each_seed("random", 1000)[:, 0]
    require(len(first_row.unique()) > 1, "random: the pick is always the same; it must not depend on sim")


def check_6(pick_negatives) -> None:
    """Check that the negative is the most similar one below the own pair by the margin."""

    def pick_semihard(own: float, margin: float) -> int:
        sim = torch.tensor([[own, 0.9, 0.75, 0.5, 0.1]]).expand(5, 5)
        positives = torch.eye(5).bool()
        return pick_negatives(sim, positives, mode="semihard", margin=margin)[0].item()

    column = pick_semihard(own=0.8, margin=0.0)
    require(column > 1, "the pick is the own pair or more similar; it must be less similar than the own pair")
    require(column == 2, "the pick is the least similar negative below the own pair; take the most similar one")
    column = pick_semihard(own=0.8, margin=0.2)
    require(column == 3, "with an own pair of 0.8 and a margin of 0.2 the pick must be below 0.6; subtract the margin")
    column = pick_semihard(own=0.0, margin=0.0)
    require(column == 4, "where no negative is below the own pair, the pick must be the least similar negative")


def check_7(sync_mask) -> None:
    """Check that words go by their scores, patches by the weighted attention of the masked tokens, and exact counts."""
    maskable = torch.tensor([[0, 2, 2, 2, 5, 6, 0]])  # [CLS], a word of three pieces, two words, [SEP]
    scores = torch.tensor([[99.0, 3, 3, 3, 1, 2, 99]])
    best = [0.0, 0.1, 0.6, 0.0]
    other = [9.0, 9.0, 0.0, 0.0]
    special = [9.0, 9.0, 0.0, 9.0]
    attention = torch.tensor([[special, best, best, best, other, other, special]])
    patch_mask, word_mask = sync_mask(attention, scores, maskable, 0.25, 0.34)
    check_word_mask(word_mask, maskable, 0.34)
    require(not word_mask[0, 4], "the word with the lowest score is masked; mask the words with the highest scores")
    rule = "mask those to which the masked tokens attend most, without other words, [CLS] and [SEP]"
    check_patch_mask(patch_mask, 4, 0.25)
    require(patch_mask[0, 2], f"the wrong patches are masked; {rule}")

    piece = [0.2, 0.0, 0.0, 0.0]
    other = [0.0, 0.9, 0.0, 0.0]
    attention = torch.tensor([[special, piece, piece, piece, other, other, special]])
    patch_mask, word_mask = sync_mask(attention, scores, maskable, 0.25, 0.67)
    check_word_mask(word_mask, maskable, 0.67)
    check_patch_mask(patch_mask, 4, 0.25)
    require(patch_mask[0, 0], "weigh the masked tokens, each piece of a word, by the softmax of their scores")

    attention = torch.rand(*MASKABLE.shape, 9, generator=seeded())
    scores = torch.rand(MASKABLE.shape, generator=seeded(1))
    for ratio in RATIOS:
        patch_mask, word_mask = sync_mask(attention, scores, MASKABLE, 1 - ratio, ratio)
        check_word_mask(word_mask, MASKABLE, ratio)
        check_patch_mask(patch_mask, 9, 1 - ratio)
        expected = (scores[3] >= scores[3][word_mask[3]].min()) & (MASKABLE[3] > 0)
        is_highest = torch.equal(word_mask[3], expected)
        require(is_highest, "other words than those with the highest scores are masked; rank words by `scores`")


def check_patch_mask(mask: Tensor, patches: int, ratio: float) -> None:
    """Check the shape and the exact counts of a patch mask (B, P). Raises Mistake."""
    require(mask.dtype == torch.bool, "a patch mask must be boolean, True = masked")
    require(mask.ndim == 2 and mask.shape[1] == patches, "a patch mask must have the shape (B, P)")
    counts = mask.sum(dim=1).tolist()
    count = patch_count(patches, ratio)
    advice = f"mask exactly patch_count({patches}, {ratio}) patches, also where a caption has no word"
    require(counts == [count] * len(mask), f"{counts} patches are masked in the images instead of {count}; {advice}")


def check_8(grad_cam, soft_mask) -> None:
    """Check Grad-CAM, and its row of one word, scaled to [0, 1]."""
    attention = torch.rand(2, 2, 4, 6, generator=seeded()) + 0.1
    attention.requires_grad_()
    gradient = torch.randn(attention.shape, generator=seeded(1))
    score = (attention * gradient).sum()
    maps = grad_cam(attention, score)
    require(not maps.requires_grad, "the maps have a gradient; detach them, since soft masks are not trained")
    require((maps >= 0).all(), "some maps are negative; take max(0, ∂s/∂A) first, the ReLU of Grad-CAM")
    expected = (attention * gradient.clamp(min=0)).detach()
    is_equal = torch.allclose(maps, expected)
    require(is_equal, "the maps are not A · max(0, ∂s/∂A) of each head; multiply by the attention itself")
    try:
        score.backward()
    except RuntimeError:
        raise Mistake("the graph of the score is freed, but the losses need it; give retain_graph=True") from None
    mask = soft_mask(maps, torch.tensor([1, 2]))
    require(mask.shape == (2, 5), "a soft mask must have the shape (B, P); leave out column 0, the image's [CLS]")
    is_scaled = mask.amax(dim=1).min() > 0.99
    require(is_scaled, "a soft mask must reach 1 in each image; take min G and max G of each row")
    heat = expected.mean(dim=1)[..., 1:]
    word_heat = torch.stack([heat[0, 1], heat[1, 2]])
    is_word = torch.equal(mask.argsort(), word_heat.argsort())
    require(is_word, "a soft mask must come from the row of word_index, as the mean over heads")


CHECKS = (check_1, check_2, check_3, check_4, check_5, check_6, check_7, check_8)
