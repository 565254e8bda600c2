"""Synthetic photos and their truth, FashionGen and jsonl files good and bad, tokenizer, augmentation."""

import json
import pickle
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertTokenizerFast

import data
from data import COLOURS, Collate, DataError, FashionGen, Synthetic, augment, build_dataset, build_tokenizer, normalise


@pytest.fixture(scope="module")
def wardrobe():
    return Synthetic("train", 150, 64, seed=0, progress=False)


# ------------------------------------------------------------------------------------------- synthetic


def test_synthetic_is_deterministic_and_seeded(wardrobe):
    again = Synthetic("train", 5, 64, seed=0, progress=False)  # fewer products: the same first ones
    other = Synthetic("train", 5, 64, seed=1, progress=False)
    assert again.captions == wardrobe.captions[: len(again)] and other.captions != again.captions
    for row in range(len(again)):
        assert np.array_equal(again.photos[row], wardrobe.photos[row])


def test_splits_share_no_product(wardrobe):
    attributes = lambda p: (p.garment, p.colour, p.pattern, p.sleeve, p.neck, p.details)
    val = Synthetic("val", 100, 32, seed=0, progress=False)
    assert not {attributes(p) for p in wardrobe.products} & {attributes(p) for p in val.products}


def test_synthetic_is_varied(wardrobe):
    assert len(set(wardrobe.categories)) >= 10 and len(set(wardrobe.subcategories)) >= 18 and len(COLOURS) >= 12
    photos_of = np.bincount(wardrobe.product_ids)
    assert set(photos_of) == {3, 4}
    assert len(set(wardrobe.captions)) == len(wardrobe.products)
    assert {view for _, view in wardrobe.rows} == {"front", "back", "close-up", "half"}
    assert 15 < np.mean([len(c.split()) for c in wardrobe.captions]) < 35


def test_any_image_size_and_patch_grid():
    dataset = Synthetic("val", 2, 96, progress=False)
    assert dataset[0]["image"].shape == (3, 96, 96) and dataset[0]["image"].dtype == torch.uint8
    for grid in (4, 8, 16):
        assert all(region.shape == (grid * grid,) for region in dataset.truth(0, grid)[1].values())


def test_truth_spans_name_their_attributes(wardrobe):
    for row in range(0, len(wardrobe), 7):
        product, caption = wardrobe.products[wardrobe.rows[row][0]], wardrobe.captions[row]
        spans, _ = wardrobe.truth(row, 8)
        named = {}
        for start, end, key in spans:
            named[key] = named.get(key, "") + " " + caption[start:end].lower()
        assert product.garment in named["garment"] and product.colour in named["colour"] and "unseen" in named
        assert {key for key, _, _ in product.details} <= named.keys()
        for key, colour, _ in product.details:
            if key in ("logo", "belt", "hem", "cuffs", "graphic", "badge"):
                assert colour in named[key] or key == "cuffs"


def test_truth_regions_follow_the_view(wardrobe):
    """A front detail is not on the back; what has no region is never visible; the whole garment always is."""
    for row, (index, view) in enumerate(wardrobe.rows[:200]):
        regions = wardrobe.truth(row, 8)[1]
        assert "unseen" not in regions and regions["garment"].any()
        for key, _, _ in wardrobe.products[index].details:
            shown_on = data.DETAILS[key][1]
            if view in ("front", "back"):
                assert (key in regions) == (view in shown_on), (view, key, wardrobe.captions[row])
            elif "front" not in shown_on:
                assert key not in regions


def test_word_truth_is_the_truth_token_by_token(wardrobe):
    tokenizer = data.build_tokenizer(wardrobe.captions, 400, 64)
    rows = list(range(12))
    known = data.word_truth(wardrobe, rows, tokenizer, 8)
    encodings = tokenizer.encode_batch([wardrobe.captions[row] for row in rows])
    assert known.attribute.shape == (12, len(encodings[0].ids)) and known.regions.shape == (*known.attribute.shape, 64)
    hidden = 0
    for b, row in enumerate(rows):
        spans, regions = wardrobe.truth(row, 8)
        for i, ((start, end), special) in enumerate(zip(encodings[b].offsets, encodings[b].special_tokens_mask)):
            keys = [key for first, last, key in spans if first <= start and end <= last and not special]
            assert known.attribute[b, i] == bool(keys)
            shown = [key for key in keys if key in regions]
            assert known.visible[b, i] == bool(shown)
            if shown:
                assert torch.equal(known.regions[b, i], torch.from_numpy(regions[shown[0]]))
            assert known.detail[b, i] == bool(keys and keys[0] not in ("garment", "colour", "pattern"))
            hidden += bool(keys) and not shown
    assert hidden > 10 and not (known.visible & ~known.attribute).any()


def test_a_description_fits_a_photo_that_shows_nothing_against_it():
    """A shirt seen from the front and from behind, against descriptions that differ in one thing each."""
    said = "{logo|Red logo} at front. {graphic|Pink star print} at back"
    shirt = data.Product(
        "shirt", "navy", None, "long", "spread", (("logo", "red", ""), ("graphic", "pink", "star")), said
    )
    others = {
        "itself": shirt,
        "another colour": replace(shirt, colour="teal"),
        "another garment": replace(shirt, garment="polo"),
        "another sleeve": replace(shirt, sleeve="short"),
        "another logo": replace(
            shirt,
            details=(("logo", "white", ""), ("graphic", "pink", "star")),
            marked_caption=said.replace("Red", "White"),
        ),
        "no logo": replace(shirt, details=(("graphic", "pink", "star"),)),
        "another graphic": replace(
            shirt,
            details=(("logo", "red", ""), ("graphic", "pink", "heart")),
            marked_caption=said.replace("star", "heart"),
        ),
        "a belt more": replace(shirt, details=(*shirt.details, ("belt", "white", ""))),
        "striped": replace(shirt, pattern=("striped", "white")),
    }
    dataset = data.Synthetic("train", 1, 64, progress=False)
    dataset.products, dataset.rows = list(others.values()), [(0, "front"), (0, "back")]
    fits = {name: [dataset.describes(i, row) for row in (0, 1)] for i, name in enumerate(others)}
    assert fits == {
        "itself": [True, True],
        "another colour": [False, False],
        "another garment": [False, False],
        "another sleeve": [False, False],
        "another logo": [False, True],  # logos are at the front
        "no logo": [True, True],  # what it says is true; it only says less
        "another graphic": [True, False],  # graphics are at the back
        "a belt more": [False, False],
        "striped": [False, False],
    }
    # buttons whose colour the text does not say: it fits buttons of any colour; and where it says it, only those
    plain, named = "{buttons|Button closure} at front", "{buttons|Buttons} in {buttons|red} at front"
    coats = [replace(shirt, details=(("buttons", ink, ""),), marked_caption=text)
             for ink, text in (("pink", plain), ("pink", named), ("red", plain), ("red", named))]  # fmt: skip
    dataset.products, dataset.rows = coats, [(i, "front") for i in range(4)]
    assert [dataset.describes(2, row) for row in range(4)] == [True, True, True, True]
    assert [dataset.describes(3, row) for row in range(4)] == [False, False, True, True]


def test_truth_regions_are_where_the_colour_is():
    """On the photo, the patches of a coloured graphic or belt hold that colour, and the others do not."""
    found = []
    dataset = Synthetic("train", 120, 64, seed=5, progress=False)
    for row, (index, _) in enumerate(dataset.rows):
        product, (_, regions) = dataset.products[index], dataset.truth(row, 16)
        for key, colour, _ in product.details:
            vivid = colour in ("red", "green", "blue", "purple", "yellow", "orange")  # unlike any background
            if key not in ("graphic", "belt", "badge") or key not in regions or product.pattern or not vivid:
                continue
            pixels = np.asarray(dataset.photos[row], float)
            near = np.abs(pixels - COLOURS[colour]).max(-1) < 45
            share = near.reshape(16, 4, 16, 4).mean((1, 3)).ravel()
            others = [d[1] for d in product.details if d[0] != key]
            if colour in others or np.abs(np.subtract(COLOURS[colour], COLOURS[product.colour])).max() < 90:
                continue
            inside, outside = share[regions[key]].mean(), share[~regions[key]].mean()
            found.append(inside > 0.25 and inside > 5 * outside)
    assert len(found) > 15 and np.mean(found) > 0.9  # slivers at the edge of a photo are all rim


# ------------------------------------------------------------------------------------------ FashionGen


@pytest.fixture
def fashiongen(tmp_path):
    data.main(["export-fashiongen", str(tmp_path), "--items", "6"])
    return tmp_path


def open_fashiongen(folder, size=64):
    return build_dataset("fashiongen", folder, "train", size)


def test_exported_fashiongen_has_the_published_layout_and_reads_back(fashiongen):
    with h5py.File(fashiongen / FashionGen.FILES["train"]) as file:
        keys = "index index_2 input_brand input_category input_composition input_concat_description input_department input_description input_gender input_image input_msrpUSD input_name input_pose input_productID input_season input_subcategory"
        assert sorted(file) == keys.split()
        assert file["input_image"].shape[1:] == (256, 256, 3) and file["input_productID"].dtype == np.int32
        assert file["input_description"].shape == (len(file["input_image"]), 1)
    dataset, drawn = open_fashiongen(fashiongen, 256), Synthetic("train", 6, 256, progress=False)
    assert dataset.captions == drawn.captions and dataset.categories == drawn.categories
    assert dataset.product_ids.tolist() == drawn.product_ids.tolist()
    assert torch.equal(dataset[3]["image"], drawn[3]["image"])
    assert open_fashiongen(fashiongen)[3]["image"].shape == (3, 64, 64)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[3]["image"], drawn[3]["image"])  # as sent to a worker


def test_fashiongen_reads_latin_1_and_counts_empty_descriptions(fashiongen):
    with h5py.File(fashiongen / FashionGen.FILES["train"], "r+") as file:
        file["input_description"][0] = "Robe d'été".encode("latin-1")
        file["input_description"][4] = b"  "
    dataset = open_fashiongen(fashiongen)
    assert dataset.captions[0] == "Robe d'été"
    assert dataset.problems == ["row 4: empty input_description"] and "1 left out (row 4" in dataset.report()
    assert dataset[4]["row"] == 4 and dataset.name_of(4).endswith("row 5")


def replace_key(path, key, values):
    with h5py.File(path, "r+") as file:
        del file[key]
        if values is not None:
            file[key] = values


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: p.unlink(), "no such file"),
        (lambda p: p.write_bytes(p.read_bytes()[:50_000]), "not a whole HDF5 file"),
        (lambda p: p.write_text("hello"), "not a whole HDF5 file"),
        (lambda p: replace_key(p, "input_description", None), "no key input_description"),
        (lambda p: replace_key(p, "input_image", np.zeros((4, 8, 8), np.uint8)), "key input_image: expected"),
        (lambda p: replace_key(p, "input_image", np.zeros((0, 8, 8, 3), np.uint8)), "zero rows"),
        (lambda p: replace_key(p, "input_productID", np.zeros((3, 1), np.int32)), "key input_productID: shape"),
        (lambda p: replace_key(p, "input_category", np.zeros((21, 1))), "key input_category"),
    ],
)
def test_damaged_fashiongen_is_one_clear_line(fashiongen, damage, message):
    damage(fashiongen / FashionGen.FILES["train"])
    with pytest.raises(DataError, match=message) as caught:
        open_fashiongen(fashiongen)
    assert "fashiongen_256_256_train.h5" in str(caught.value) and "\n" not in str(caught.value)


def test_fashiongen_without_any_description_is_refused(fashiongen):
    path = fashiongen / FashionGen.FILES["train"]
    with h5py.File(path, "r+") as file:
        file["input_description"][:] = b""
    with pytest.raises(DataError, match="every row is empty"):
        open_fashiongen(fashiongen)


def test_export_does_not_overwrite(fashiongen):
    with pytest.raises(SystemExit, match="exists"):
        data.main(["export-fashiongen", str(fashiongen), "--items", "2"])


def test_absent_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such folder; say with --root"):
        build_dataset("jsonl", tmp_path / "nowhere", "train", 64)


# ----------------------------------------------------------------------------------------------- jsonl


def write_jsonl(folder, lines, name="train.jsonl"):
    (folder / name).write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")


@pytest.fixture
def shop(tmp_path):
    rng = np.random.default_rng(0)
    lines = []
    for i in range(40):
        size = (48, 64) if i % 2 else (100, 30)
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(tmp_path / f"{i}.png")
        lines.append(
            {"image": f"{i}.png", "caption": f"Item number {i // 2}", "product_id": f"p{i // 2}", "category": "A"}
        )
    write_jsonl(tmp_path, lines)
    return tmp_path, lines


def open_jsonl(folder, split="train", seed=0):
    return build_dataset("jsonl", folder, split, 32, seed)


def test_jsonl_splits_by_product_or_reads_val(shop):
    folder, lines = shop
    train, val = open_jsonl(folder), open_jsonl(folder, "val")
    assert len(train) + len(val) == 40 and len(val) > 0
    assert not set(train.captions) & set(val.captions)
    assert open_jsonl(folder, seed=1).captions != train.captions
    write_jsonl(folder, lines[:4], "val.jsonl")
    assert len(open_jsonl(folder)) == 40 and len(open_jsonl(folder, "val")) == 4
    assert train[0]["image"].shape == (3, 32, 32) and train.categories[0] == "A" and train.subcategories[0] == ""


def test_jsonl_pads_to_a_white_square_and_honours_transparency(tmp_path):
    Image.new("RGBA", (10, 20), (0, 0, 0, 0)).save(tmp_path / "a.png")
    Image.new("RGB", (40, 20), (255, 0, 0)).save(tmp_path / "b.png")
    write_jsonl(tmp_path, [{"image": f"{x}.png", "caption": x, "product_id": i} for i, x in enumerate("ab")])
    write_jsonl(tmp_path, [], "val.jsonl")
    dataset = open_jsonl(tmp_path)
    assert (dataset[0]["image"] == 255).all()
    wide = dataset[1]["image"]
    assert wide[:, 16, 16].tolist() == [255, 0, 0] and wide[:, 1, 16].tolist() == [255, 255, 255]


def test_jsonl_leaves_out_missing_photos_and_empty_captions_by_name(shop):
    folder, lines = shop
    lines[3]["image"], lines[5]["caption"] = "gone.png", " "
    write_jsonl(folder, lines)
    write_jsonl(folder, lines[:1], "val.jsonl")
    dataset = open_jsonl(folder)
    assert dataset.problems == ["line 4: no photo gone.png", "line 6: empty caption"]
    assert "2 left out" in dataset.report() and len(dataset) == 38


@pytest.mark.parametrize(
    "line, message",
    [
        ("{broken", "line 2: not JSON"),
        ("[1]", "line 2: expected an object"),
        ({"caption": "x", "product_id": 1}, "field image"),
        ({"image": "0.png", "caption": 3, "product_id": 1}, "field caption"),
        ({"image": "0.png", "caption": "x"}, "field product_id"),
        ({"image": "0.png", "caption": "x", "product_id": True}, "field product_id"),
        ({"image": "x" * 5000, "caption": "x", "product_id": 1}, "field image is not a path"),
        ('{"image": "0.png", "caption": "\\ud83d", "product_id": 1}', "lone surrogate"),
        ({"image": "/etc/passwd", "caption": "x", "product_id": 1}, "leaves the folder"),
        ({"image": "a/../../x.png", "caption": "x", "product_id": 1}, "leaves the folder"),
    ],
)
def test_malformed_jsonl_is_one_clear_line(shop, line, message):
    folder, lines = shop
    write_jsonl(folder, [lines[0], line])
    with pytest.raises(DataError, match=message) as caught:
        open_jsonl(folder)
    assert "train.jsonl" in str(caught.value) and "\n" not in str(caught.value)


def test_jsonl_captions_may_hold_any_separator_and_small_sets_get_a_validation_product(shop):
    folder, lines = shop
    lines = [line | {"caption": "one\u2028two\u0085three"} for line in lines[:6]]
    (folder / "train.jsonl").write_text(
        "\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8"
    )
    train, val = open_jsonl(folder), open_jsonl(folder, "val")
    assert len(train) == 4 and len(val) == 2
    write_jsonl(folder, lines[:2])
    with pytest.raises(DataError, match="one product cannot be split"):
        open_jsonl(folder)


def test_jsonl_without_a_file_or_a_line_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        open_jsonl(tmp_path)
    write_jsonl(tmp_path, [])
    with pytest.raises(DataError, match="it is empty"):
        open_jsonl(tmp_path)
    (tmp_path / "train.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        open_jsonl(tmp_path)


def test_photos_that_do_not_decode_leave_their_batch_and_are_named(shop):
    folder, _ = shop
    write_jsonl(folder, shop[1][:1], "val.jsonl")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:200])
    (folder / "4.png").write_text("not an image")
    dataset = open_jsonl(folder)
    collate = Collate(build_tokenizer(dataset.captions, 100, 16))
    batch = collate([dataset[i] for i in range(6)])
    assert batch["rows"].tolist() == [0, 1, 3, 5] and len(batch["images"]) == len(batch["token_ids"]) == 4
    assert batch["unreadable"][0].startswith("2.png: ") and batch["unreadable"][1] == "4.png: not an image"
    assert collate([dataset[4]]) == {"rows": pytest.approx([]), "unreadable": ["4.png: not an image"]}


# ------------------------------------------------------------------------------------------- tokenizer

TEXTS = [
    "Long sleeve shirt in navy.",
    "Robe d'été, 100% coton—NEUF!",
    "unseenwordzz 日本 ß ½",
    "",
    "a" * 300,
    "it's  v-neck",
]


def test_tokenizer_equals_bert_tokenizer_fast(tmp_path, wardrobe):
    trained = build_tokenizer(wardrobe.captions + TEXTS[:2], 300, 32)
    words = sorted(trained.get_vocab(), key=trained.token_to_id)
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    ours = build_tokenizer([], 0, 32, vocab=tmp_path / "vocab.txt")
    theirs = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"))
    texts = TEXTS + wardrobe.captions[:50]
    expected = theirs(texts, padding=True, truncation=True, max_length=32)
    for tokenizer in (ours, trained, data.Tokenizer.from_str(ours.to_str())):
        encoded = data.tokenize(tokenizer, texts)
        assert encoded["token_ids"].tolist() == expected["input_ids"]
        assert encoded["attention_mask"].tolist() == expected["attention_mask"]
    assert not encoded["words"][3].any() and encoded["words"][0].sum() > 3
    assert not (encoded["words"] & ~encoded["attention_mask"].bool()).any()


def test_trained_vocabulary_is_reproducible_and_bounded(wardrobe):
    one, two = (build_tokenizer(wardrobe.captions, 120, 32) for _ in range(2))
    assert one.to_str() == two.to_str() and one.get_vocab_size() <= 120


def test_a_wrong_vocab_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        build_tokenizer([], 0, 32, vocab=tmp_path / "none.txt")
    (tmp_path / "vocab.txt").write_text("\n".join([*data.SPECIAL_TOKENS, "a", "b", "a"]))
    with pytest.raises(DataError, match="the same word stands on two lines, 'a'"):
        build_tokenizer([], 0, 32, vocab=tmp_path / "vocab.txt")
    (tmp_path / "vocab.txt").write_text("hello\nworld\n")
    with pytest.raises(DataError, match="lacks \\[PAD\\]"):
        build_tokenizer([], 0, 32, vocab=tmp_path / "vocab.txt")


def test_captions_are_padded_to_the_longest_of_the_batch_only(wardrobe):
    tokenizer = build_tokenizer(wardrobe.captions, 300, 64)
    batch = Collate(tokenizer)([wardrobe[i] for i in range(4)])
    assert batch["attention_mask"].sum(1).max() == batch["token_ids"].shape[1] < 64


# ---------------------------------------------------------------------------------------- augmentation


def photos(count=8, size=32):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def test_normalise_is_imagenet_on_unit_range():
    white = normalise(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))
    expected = (1 - torch.tensor(data.IMAGENET_MEAN)) / torch.tensor(data.IMAGENET_STD)
    torch.testing.assert_close(white[0, :, 0, 0], expected)


def test_augment_is_seeded_and_each_photo_gets_its_own_crop():
    batch = photos(1).expand(8, -1, -1, -1)
    draw = lambda seed: augment(batch, 0.5, 0.2, torch.Generator().manual_seed(seed))
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert len({tuple(x.flatten()[:5].tolist()) for x in draw(1)}) == 8


def test_augment_crops_the_share_asked_for_and_flips_half():
    """A photo whose pixel value is its x position: range and direction of a crop can be read off."""
    ramp = torch.arange(256, dtype=torch.uint8).expand(400, 3, 256, 256)
    out = augment(ramp, 0.5, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor(data.IMAGENET_MEAN)[:, None, None], torch.tensor(data.IMAGENET_STD)[:, None, None]
    values = (out * std + mean)[:, 0, 128] * 255
    width = (values[:, -1] - values[:, 0]) / 255
    assert abs((width < 0).float().mean() - 0.5) < 0.1
    whole = augment(ramp[:20], 1.0, generator=torch.Generator().manual_seed(0))
    same = [
        torch.allclose(w, normalise(ramp[:1])[0], atol=0.02)
        or torch.allclose(w.flip(-1), normalise(ramp[:1])[0], atol=0.02)
        for w in whole
    ]
    assert all(same)  # a share of 1 is the whole photo, flipped or not
    assert width.abs().min() > 0.6 and width.abs().max() < 1.01 and width.abs().std() > 0.05
    assert values.min() >= 0 and values.max() <= 255


def test_jitter_is_off_by_default_and_changes_colours_when_on():
    plain = torch.full((4, 3, 16, 16), 100, dtype=torch.uint8)
    off = augment(plain, 0.5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(off, normalise(plain))
    on = augment(plain, 0.5, 0.4, torch.Generator().manual_seed(0))
    assert (on - off).abs().amax((1, 2, 3)).min() > 0.01
