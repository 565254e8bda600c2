"""FashionGen, jsonl and FashionIQ files, whole and damaged; image files; prompts; triplets; subsets."""

import json
import pickle

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from small import PUBLISHED, export_fashiongen, write_fashioniq

import data
from data import Collate, build_dataset, build_tokenizer
from readers.dataset import DataError
from readers.fashiongen import FILES
from readers.files import open_image
from readers.prompts import category_symbol, prompt_text
from readers.synthetic import Synthetic
from readers.triplets import synthetic_triplets
from readers.wardrobe import GARMENTS


@pytest.fixture
def fashiongen(tmp_path):
    export_fashiongen(tmp_path, 6)
    return tmp_path


def open_fashiongen(folder, size=32):
    return build_dataset("fashiongen", folder, "train", size)


def test_fashiongen_as_distributed(fashiongen):
    dataset, drawn = open_fashiongen(fashiongen), Synthetic("train", 6, 32, progress=False)
    assert dataset.captions == drawn.captions and dataset.categories == drawn.categories
    assert dataset.product_ids.tolist() == drawn.product_ids.tolist()
    assert torch.equal(dataset[3]["image"], drawn[3]["image"])
    assert open_fashiongen(fashiongen, 64)[3]["image"].shape == (3, 64, 64)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[3]["image"], drawn[3]["image"])  # as sent to a worker


def test_fashiongen_reads_latin_1_and_counts_empty_descriptions(fashiongen):
    with h5py.File(fashiongen / FILES["train"], "r+") as file:
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
        (lambda p: p.write_bytes(p.read_bytes()[:5_000]), "not a whole HDF5 file"),
        (lambda p: replace_key(p, "input_description", None), "'input_description' doesn't exist"),
        (lambda p: replace_key(p, "input_productID", np.zeros((3, 1), np.int32)), "key input_productID: 3 rows"),
        (lambda p: replace_key(p, "input_description", np.full(len(open_fashiongen(p.parent)), b" ")), "every row"),
    ],
)
def test_damaged_fashiongen_is_one_clear_line(fashiongen, damage, message):
    damage(fashiongen / FILES["train"])
    with pytest.raises(DataError, match=message) as caught:
        open_fashiongen(fashiongen)
    assert "fashiongen_256_256_train.h5" in str(caught.value) and "\n" not in str(caught.value)


def write_jsonl(folder, lines, name="train.jsonl"):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / name).write_text("\n".join(texts) + "\n", encoding="utf-8")


@pytest.fixture
def shop(tmp_path):
    rng = np.random.default_rng(0)
    lines = []
    for i in range(40):
        size = (48, 64) if i % 2 else (100, 30)
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(tmp_path / f"{i}.png")
        product = {"caption": f"Item number {i // 2}", "product_id": f"p{i // 2}", "category": "A"}
        lines.append({"image": f"{i}.png"} | product)
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
    assert train[0]["image"].shape == (3, 32, 32) and train.categories[0] == "A" and train.subcategories[0] == ""
    write_jsonl(folder, lines[:4], "val.jsonl")
    assert len(open_jsonl(folder)) == 40 and len(open_jsonl(folder, "val")) == 4


def test_jsonl_pads_to_a_white_square_and_honours_transparency(tmp_path):
    Image.new("RGBA", (10, 20), (0, 0, 0, 0)).save(tmp_path / "a.png")
    Image.new("RGB", (40, 20), (255, 0, 0)).save(tmp_path / "b.png")
    write_jsonl(tmp_path, [{"image": f"{x}.png", "caption": x, "product_id": i} for i, x in enumerate("ab")])
    write_jsonl(tmp_path, [], "val.jsonl")
    dataset = open_jsonl(tmp_path)
    assert (dataset[0]["image"] == 255).all()
    wide = dataset[1]["image"]
    assert wide[:, 16, 16].tolist() == [255, 0, 0] and wide[:, 1, 16].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    "line, message",
    [
        (b"{broken", "line 1: not JSON"),
        (b"\xff\xfe\x00", "line 1: not UTF-8 text"),
        (b"[1]", "item 1: expected a JSON object"),
        (b'{"image": "0.png", "caption": ["x"], "product_id": 1}', "field caption"),
        (b'{"image": "0.png", "caption": "x"}', "field product_id"),
        (b'{"image": "0.png", "caption": "x", "product_id": 1}', "train split; it has too few products"),
        (None, "No such file"),
    ],
)
def test_malformed_jsonl_is_one_clear_line(shop, line, message):
    folder, _ = shop
    (folder / "train.jsonl").unlink()
    if line is not None:
        (folder / "train.jsonl").write_bytes(line)
    with pytest.raises((DataError, OSError), match=message) as caught:
        open_jsonl(folder)
    assert "train.jsonl" in str(caught.value) and "\n" not in str(caught.value)


def test_jsonl_captions_may_hold_any_separator_and_small_sets_get_a_validation_product(shop):
    folder, lines = shop
    write_jsonl(folder, [json.dumps(line | {"caption": "one\u2028two"}, ensure_ascii=False) for line in lines[:6]])
    train, val = open_jsonl(folder), open_jsonl(folder, "val")
    assert len(train) == 4 and len(val) == 2


def test_what_cannot_be_used_is_left_out_and_reported(shop):
    folder, lines = shop
    write_jsonl(folder, lines[:1], "val.jsonl")
    write_jsonl(folder, [*lines, lines[3] | {"image": "gone.png"}, lines[5] | {"caption": " "}])
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:200])
    (folder / "4.png").write_text("not an image")
    dataset = open_jsonl(folder)
    assert dataset.problems == ["line 41: image gone.png is missing", "line 42: the caption is empty"]
    assert "2 left out" in dataset.report() and len(dataset) == 40
    collate = Collate(build_tokenizer(dataset.captions, 100, 16))
    batch = collate([dataset[i] for i in range(6)])
    assert batch["rows"].tolist() == [0, 1, 3, 5] and len(batch["images"]) == len(batch["token_ids"]) == 4
    assert batch["unreadable"][0].startswith("2.png: ")
    assert batch["unreadable"][1].startswith("4.png: cannot be decoded: cannot identify image file")
    assert collate([dataset[4]]) == {"rows": pytest.approx([]), "unreadable": [batch["unreadable"][1]]}


SYMBOLS = {
    "tops": ["SHIRTS", "SWEATSHIRTS", "TANK TOPS & CAMISOLES", "DRESS SHIRTS"],
    "pants": ["JEANS"],
    "skirts": ["SKIRTS"],
    "dresses": ["SUITS & BLAZERS"],
    "coats": ["JACKETS & COATS"],
    "shoes": ["BOAT SHOES & MOCCASINS", "LACE UPS", "Footwear"],
    "bags": ["DUFFLE & TOP HANDLE BAGS", "POUCHES & DOCUMENT HOLDERS"],
    "accessories": ["BAG ACCESSORIES", "POCKET SQUARES & TIE BARS", "FINE JEWELRY"],
    "others": ["SWIMWEAR", "UNDERWEAR & LOUNGEWEAR", "Laptops", ""],
}


def test_symbol_of_a_category():
    for symbol, categories in SYMBOLS.items():
        for category in categories:
            assert category_symbol(category) == symbol, category
    assert category_symbol("Bottomwear", "Skirts") == "skirts" and category_symbol("DRESS SHIRTS", "COATS") == "tops"
    assert "others" not in {category_symbol(garment.category) for garment in GARMENTS.values()}


def prompts_of(text):
    """List the prompts of a text: name -> value."""
    prompts = zip(text[2::2], text[3::2], strict=True)
    return {frame.removeprefix("[SEP] ").removeprefix("the image ").removesuffix(" is"): v for frame, v in prompts}


def test_known_attributes_have_a_prompt_and_unknown_ones_have_none(wardrobe, monkeypatch):
    plain = {row: wardrobe.text(row) for row in range(40)}
    monkeypatch.setattr(wardrobe, "prompts", True)
    orders = set()
    for row in range(40):
        product, text = wardrobe.product(row), wardrobe.text(row)
        assert plain[row] == ("", wardrobe.captions[row]) and text == wardrobe.text(row)
        symbol = category_symbol(wardrobe.categories[row])
        assert text[:2] == (f"[{symbol}] the image description is", wardrobe.captions[row])
        assert [frame.startswith("[SEP]") for frame in text[2::2]] == [True] + [False] * (len(text[2::2]) - 1)
        values = {"category": GARMENTS[product.garment].category, "sub category": product.garment.upper()}
        values |= {name: getattr(product, name) for name in ("colour", "sleeve", "neck", "pattern")}
        assert prompts_of(text) == {name: value for name, value in values.items() if value}
        orders.add(tuple(prompts_of(text)))
    assert len(orders) > 20
    subset = wardrobe.subset(np.array([7, 3]))
    assert subset.text(0)[:2] == wardrobe.text(7)[:2] and prompts_of(subset.text(0)) == prompts_of(wardrobe.text(7))
    alone = prompt_text("a", "bags", {"category": ""}, np.random.default_rng(0))
    assert alone == ("[bags] the image description is", "a")


def test_prompts_of_files(fashiongen, tmp_path):
    dataset = open_fashiongen(fashiongen)
    dataset.prompts = True
    prompts = prompts_of(dataset.text(0))
    assert prompts["season"] == "spring summer 2018" and prompts["gender"] == "Men" and "composition" not in prompts

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    line = {"image": "a.png", "caption": "A coat", "category": "Coats"}
    more = {"title": "Coat 5", "season": "Fall", "gender": None, "usage": "Casual", "colour": 7, "neck": "  "}
    others = {
        "name": "Coat 6",
        "composition": ["wool"],
        "gender": True,
        "season": float("nan"),
        "subcategory": {"no": "label"},
    }
    write_jsonl(tmp_path, [line | {"product_id": 1} | more, line | {"product_id": 2} | others])
    write_jsonl(tmp_path, [line | {"product_id": 3}], "val.jsonl")
    opened = open_jsonl(tmp_path)
    opened.prompts = True
    assert prompts_of(opened.text(0)) == {"category": "Coats", "name": "Coat 5", "season": "Fall", "colour": "7"}
    assert prompts_of(opened.text(1)) == {"category": "Coats", "name": "Coat 6"}
    before = opened.fingerprint()
    opened.attributes["season"][0] = "Spring"
    assert opened.fingerprint() != before


@pytest.fixture(scope="module")
def triplets():
    return synthetic_triplets("train", 60, 32, seed=0)


def test_triplets_give_reference_and_target(triplets):
    image_set, item = triplets.image_set, triplets[3]
    assert torch.equal(item["image"], image_set[triplets.references[3]]["image"])
    assert torch.equal(item["target_image"], image_set[triplets.targets[3]]["image"])
    some = triplets.subset(np.array([3, 8]))
    assert torch.equal(some[0]["target_image"], item["target_image"]) and some.captions[0] == triplets.captions[3]
    pairs = {*some.references.tolist(), *some.targets.tolist()}
    assert set(some.galleries["synthetic"]["union"].tolist()) == pairs
    tokenizer = build_tokenizer(triplets.captions, 300, 64)
    batch = Collate(tokenizer)([triplets[0], triplets[1]])
    assert batch["images"].shape == batch["target_images"].shape == (2, 3, 32, 32)


def test_a_subset_is_some_rows_numbered_anew(wardrobe):
    subset = wardrobe.subset(np.array([40, 0, 1]))
    assert len(subset) == 3 and subset.captions[0] == wardrobe.captions[40] and subset.product_ids.tolist() == [0, 1, 1]
    assert torch.equal(subset[0]["image"], wardrobe[40]["image"]) and subset[0]["row"] == 0
    assert subset.name_of(0) == "row 40"
    assert subset.categories == [wardrobe.categories[row] for row in (40, 0, 1)]


def open_fashioniq(folder, split="val"):
    return data.build_triplets("fashioniq", folder, split, 32)


def test_fashioniq_galleries_have_the_published_sizes(tmp_path):
    write_fashioniq(tmp_path, "val", PUBLISHED)
    opened = open_fashioniq(tmp_path)
    for subset, (queries, split_size, union) in PUBLISHED.items():
        assert opened.subsets.count(subset) == queries
        galleries = opened.galleries[subset]
        assert len(galleries["original"]) == split_size and len(galleries["union"]) == union
    assert "dress: 2,017 (images to search: union 2,628, original 3,817)" in opened.report()
    assert opened.captions[0] == "is colour 0 and has sleeves"


def test_fashioniq_names_and_counts_what_is_missing(tmp_path):
    sizes = dict.fromkeys(PUBLISHED, (6, 20, 12))

    def draw(number):
        return Image.new("RGB", (30, 40), (number * 9, 0, 0))

    write_fashioniq(tmp_path, "val", sizes, draw)
    for name in ("dress00000.png", "shirt00015.jpg"):  # the target of one pair; an image of no pair
        (tmp_path / "images" / name).unlink()
    path = tmp_path / "captions" / "cap.dress.val.json"
    path.write_text(path.read_text().replace('"has sleeves"', '"  "'))
    opened = open_fashioniq(tmp_path)
    assert len(opened) == 17 and len(opened.galleries["shirt"]["original"]) == 19
    assert opened.captions[0] == "is colour 1"  # no "and" without a second text
    assert opened.problems == ["image dress00000 is missing", "image shirt00015 is missing"]
    assert opened.report().endswith(
        ", 2 left out (image dress00000 is missing; image shirt00015 is missing), pairs without their images: 1"
    )
    assert opened[0]["target_image"].shape == (3, 32, 32)
    write_fashioniq(tmp_path, "test", sizes, draw)
    without_targets = open_fashioniq(tmp_path, "test")
    assert (without_targets.targets == -1).all() and "target_image" not in without_targets[0]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("[{", "cap.dress.val.json: not JSON"),
        ('[{"candidate": "a", "captions": ["x"]}]', "cap.dress.val.json: expected a list of pairs with candidate"),
        (None, "no val pair has both of its images; put dress00000.jpg or .png"),
    ],
)
def test_bad_fashioniq_files_are_refused_in_one_line(tmp_path, content, complaint):
    write_fashioniq(tmp_path, "val", dict.fromkeys(PUBLISHED, (4, 9, 8)))
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    if content is not None:
        (tmp_path / "captions" / "cap.dress.val.json").write_text(content)
    with pytest.raises(DataError, match=complaint) as error:
        open_fashioniq(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="no such folder; give the folder of the fashioniq files with --root"):
        open_fashioniq(tmp_path / "nowhere")


def test_fashioniq_without_words_is_refused(tmp_path):
    write_fashioniq(tmp_path, "val", dict.fromkeys(PUBLISHED, (4, 9, 8)))
    for path in (tmp_path / "captions").iterdir():
        pairs = [pair | {"captions": ["", " "]} for pair in json.loads(path.read_text())]
        path.write_text(json.dumps(pairs))
    with pytest.raises(DataError, match="captions: all val captions are empty"):
        open_fashioniq(tmp_path)


def test_image_files_that_are_not_decoded(tmp_path):
    Image.fromarray(np.ones((64, 64), np.uint16)).save(tmp_path / "grey.png")
    with pytest.raises(OSError, match="pixels have more than 8 bits"):
        open_image(tmp_path / "grey.png", 64)
    (tmp_path / "photo.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # needs another program
    with pytest.raises(OSError, match="cannot identify image file"):
        open_image(tmp_path / "photo.jpg", 64)
    Image.new("L", (9000, 8000)).save(tmp_path / "large.jpg")
    assert max(open_image(tmp_path / "large.jpg", 64).size) < 2500
