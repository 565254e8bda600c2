"""Synthetic products: images, captions, ground truth, siblings, families."""

from dataclasses import replace
from difflib import SequenceMatcher

import numpy as np
import pytest
import torch

from readers.camera import shade
from readers.dataset import DataError
from readers.synthetic import Synthetic
from readers.triplets import FAMILY_SIZE, synthetic_triplets
from readers.wardrobe import COLOURS, LOOKS, STYLE_COLOURS, Detail, Product


def test_synthetic_is_deterministic_and_seeded_and_splits_share_no_style(wardrobe):
    again = Synthetic("train", 5, 64, seed=0, progress=False)  # fewer products: the same first ones
    other = Synthetic("train", 5, 64, seed=1, progress=False)
    assert again.captions == wardrobe.captions[: len(again)] and other.captions != again.captions
    for row in range(len(again)):
        assert np.array_equal(again.images[row], wardrobe.images[row])
    val = Synthetic("val", 48, 96, seed=0, progress=False)
    assert not {p.style for p in wardrobe.products} & {p.style for p in val.products}
    assert (
        val[0]["image"].shape == (3, 96, 96) and val[0]["image"].dtype == torch.uint8 and "ground_truth" not in val[0]
    )
    val.with_ground_truth = True
    truth = val[0]["ground_truth"]
    assert truth.spans == val.ground_truth(0).spans
    assert all(truth.region(key).shape == (96, 96) and truth.region(key).dtype == bool for key in truth.regions)


def test_synthetic_is_varied(wardrobe):
    assert len(set(wardrobe.categories)) >= 10 and len(set(wardrobe.subcategories)) >= 14
    assert {product.colour for product in wardrobe.products} == set(COLOURS)
    assert set(np.bincount(wardrobe.product_ids)) == {3, 4} and len(set(wardrobe.captions)) == len(wardrobe.products)
    assert set(wardrobe.views) == {"front", "back", "close-up", "half"}
    assert 15 < np.mean([len(c.split()) for c in wardrobe.captions]) < 35
    shares = []  # of the attribute words, those that name something that the image shows
    for row in range(len(wardrobe)):
        truth = wardrobe.ground_truth(row)
        shares.append(np.mean([key in truth.regions for _, _, key, _ in truth.spans]))
    assert 0.25 < np.mean(shares) < 0.5 and max(shares) < 0.8


def test_a_style_comes_in_three_colours_beside_a_sibling_style(wardrobe):
    family_size = 2 * STYLE_COLOURS
    kinds = set()
    for first in range(0, len(wardrobe.products), family_size):
        family = wardrobe.products[first : first + family_size]
        style, sibling_style = family[0::2], family[1::2]
        for products in (style, sibling_style):
            assert len({product.colour for product in products}) == STYLE_COLOURS == 3
            assert len({product.style for product in products}) == 1
            assert len({repr((product.invisible, product.details["inside"])) for product in products}) > 1
        for product, other in zip(style, sibling_style, strict=True):
            assert product.colour == other.colour
            (kind,) = [kind for kind, _, sibling in product.siblings() if sibling.style == other.style]
            kinds.add(kind)
    assert "colour" not in kinds and len(kinds) >= 4


def changed_keys(product, other):
    """List the attributes in which two products differ."""
    before, after = product.attributes(), other.attributes()
    return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


def test_siblings_differ_in_one_value_and_are_worded_alike(wardrobe):
    kinds = set()
    for product in wardrobe.products[:120:5]:
        attributes, words = product.attributes(), product.caption_and_spans()[0].lower().split()
        siblings = list(product.siblings())
        assert len({repr(sibling) for _, _, sibling in siblings} | {repr(product)}) == len(siblings) + 1
        for kind, key, sibling in siblings:
            sibling_attributes = sibling.attributes()
            changed = changed_keys(product, sibling)
            if kind == "place":  # the same detail at another place
                (new_place,) = changed - {key}
                assert key in changed and attributes[key] == sibling_attributes[new_place]
                assert new_place not in attributes and key not in sibling_attributes
            else:
                assert changed == {key} and "inside" not in changed
            if kind == "look":
                assert attributes[key].noun == sibling_attributes[key].noun
            if kind == "noun":
                assert attributes[key].look == sibling_attributes[key].look
            sibling_words = sibling.caption_and_spans()[0].lower().split()
            blocks = SequenceMatcher(None, words, sibling_words, autojunk=False).get_opcodes()
            ((_, a, b, c, d),) = [block for block in blocks if block[0] != "equal"]  # one stretch, of few words
            assert max(b - a, d - c) <= 2, (words, sibling_words)
            kinds.add(kind)
    assert kinds == {"garment", "colour", "pattern", "sleeve", "neck", "closure", "look", "noun", "place"}


def test_spans_name_all_attributes_and_nothing_else(wardrobe):
    for row in range(0, len(wardrobe), 7):
        product, caption = wardrobe.product(row), wardrobe.captions[row]
        named = {}
        for start, end, key, kind in wardrobe.ground_truth(row).spans:
            word = caption[start:end].lower()
            named.setdefault(key, set()).add(word)
            if key in product.details:
                assert kind == "place" if word == key else word == getattr(product.details[key], kind)
            else:
                assert kind == key
        expected = {"invisible": set(product.invisible.values())}
        for key, value in product.attributes().items():
            if isinstance(value, Detail):
                expected[key] = {value.look, value.noun} | ({key} if key not in ("back", "inside") else set())
            elif key not in product.invisible:
                expected[key] = {value}
        assert named == expected


def test_regions_follow_the_view(wardrobe):
    """A detail at the front is not on the back. What is inside or covered is not visible; the garment always is."""
    for row, view in enumerate(wardrobe.views):
        truth, product = wardrobe.ground_truth(row), wardrobe.product(row)
        regions = truth.regions
        assert not {"invisible", "inside"} & regions.keys() and truth.region("garment").any()
        assert truth.region("garment").shape == (64, 64) and np.array_equal(regions["garment"], regions["colour"])
        for key in product.details:
            if view in ("front", "back"):
                assert (key in regions) == (key != "inside" and (key == "back") == (view == "back"))
            elif key == "back":
                assert key not in regions
        if view == "back":
            assert "closure" not in regions and (product.neck in ("hooded", "high")) == ("neck" in regions)
        # bands overlap, collars and closures lie on them; all lie on the pattern, inside the garment
        on_top = {"pattern", "neck", "closure", *product.details} & regions.keys()
        assert sum((truth.region(key).astype(int) for key in on_top), np.zeros((64, 64), int)).max() <= 1
        for key in regions.keys() & product.details.keys():
            assert not (truth.region(key) & ~truth.region("garment")).any()


def test_a_caption_matches_an_image_that_does_not_contradict_it():
    """A shirt seen from the front and from behind, against captions that differ in one thing each."""
    stripes, pleats, eyelets = Detail("light", "stripes"), Detail("dark", "pleats"), Detail("narrow", "eyelets")
    places = {"chest": stripes, "back": pleats, "inside": eyelets}
    shirt = Product("shirt", "blue", None, "long", "collared", "buttoned", places, {"fabric": "wool"})
    others = {
        "itself": (shirt, [True, True]),
        "another colour": (replace(shirt, colour="red"), [False, False]),
        "another garment": (replace(shirt, garment="coat"), [False, False]),
        "striped": (replace(shirt, pattern="striped"), [False, False]),
        "another neck": (replace(shirt, neck="v"), [False, True]),  # a collar is not seen from behind
        "another look": (replace(shirt, details=places | {"chest": Detail("dark", "stripes")}), [False, True]),
        "another place": (replace(shirt, details={"hem": stripes, "back": pleats, "inside": eyelets}), [False, True]),
        "one more": (replace(shirt, details=places | {"hem": stripes}), [False, True]),
        "nothing at the chest": (replace(shirt, details={"back": pleats}), [True, True]),  # true; it only says less
        "another back": (replace(shirt, details=places | {"back": stripes}), [True, False]),
        "another inside": (replace(shirt, details=places | {"inside": stripes}), [True, True]),
        "another fabric": (replace(shirt, invisible={"fabric": "silk"}), [True, True]),
    }
    dataset = Synthetic("train", 1, 64, progress=False)
    dataset.products = [product for product, _ in others.values()]
    dataset.product_ids = np.array([0, 0])
    dataset.views = ["front", "back"]
    for number, (name, (_, expected)) in enumerate(others.items()):
        assert [dataset.caption_matches(number, 0), dataset.caption_matches(number, 1)] == expected, name


def test_regions_are_where_the_colour_is(wardrobe):
    """On plain cloth the pixels of a detail are nearer to one of its colours, the pixels around to the garment's."""
    matches = []
    for row in range(len(wardrobe)):
        product, truth = wardrobe.product(row), wardrobe.ground_truth(row)
        if product.pattern:
            continue
        around = truth.region("garment")
        for key in truth.regions.keys() - {"garment", "colour", "sleeve"}:
            around &= ~truth.region(key)
        pixels = np.asarray(wardrobe.images[row], float)
        colour = COLOURS[product.colour]
        for key, detail in product.details.items():
            if key not in truth.regions or not around.any():
                continue
            look = LOOKS[detail.look]
            far_from_ground = np.abs(pixels - shade(colour, look.ground_shade)).sum(-1)
            far_from_ink = np.abs(pixels - shade(colour, look.texture_shade)).sum(-1)
            nearer = np.minimum(far_from_ground, far_from_ink) < np.abs(pixels - colour).sum(-1)
            matches.append(nearer[truth.region(key)].mean() > 0.6 and nearer[around].mean() < 0.35)
    assert len(matches) > 100 and np.mean(matches) > 0.95


@pytest.fixture(scope="module")
def triplets():
    return synthetic_triplets("train", 100, 32, seed=0)


def test_synthetic_triplets_differ_in_one_or_two_things_that_the_text_names(triplets):
    products = triplets.image_set.products
    for row in range(len(triplets)):
        before = products[triplets.references[row]]
        after = products[triplets.targets[row]]
        text = triplets.captions[row]
        changed = changed_keys(before, after)
        for key in changed:
            value = after.attributes().get(key)
            if value is None:  # what moves is named where it was and where it is
                detail = before.details[key]
                assert f"has no {detail.look} {detail.noun} at {key}" in text
            elif isinstance(value, Detail):
                assert f"has {value.look} {value.noun} at {key}" in text
            elif key == "colour" or value == "sleeveless":
                assert f"is {value}" in text
            else:
                assert f"has {value}" in text
        assert changed and text.count(" and ") + 1 == len(changed) and not {"garment", "back", "inside"} & changed
        siblings = [sibling for _, _, sibling in before.siblings()]
        of_siblings = [sibling for product in siblings for _, _, sibling in product.siblings()]
        assert after in siblings or after in of_siblings


def test_synthetic_families_have_no_equal_products_and_belong_to_one_split(triplets):
    def attributes(dataset):
        return [str(sorted(product.attributes().items(), key=str)) for product in dataset.products]

    train = attributes(triplets.image_set)
    for first in range(0, len(train), FAMILY_SIZE):
        assert len(set(train[first : first + FAMILY_SIZE])) == FAMILY_SIZE
    val = synthetic_triplets("val", 60, 32, seed=0)
    pretraining = attributes(Synthetic("train", 120, 32, progress=False))
    assert not set(attributes(val.image_set)) & {*train, *pretraining}
    assert {name: len(rows) for name, rows in val.galleries["synthetic"].items()} == {"union": 48, "original": 60}
    assert len(val) == 6 * 12 and set(val.families) == set(range(12))
    with pytest.raises(DataError, match="a family of triplets has 5 products; give more"):
        synthetic_triplets("val", 4, 32)
