"""Files as people have them: encodings, byte order marks, Git LFS pointers, odd names, other scripts, damaged parts."""

import codecs
import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import unicodedata
import warnings
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from small import PUBLISHED, export_fashiongen, write_fashioniq, write_karpathy, write_snlive

import data
import finetune
from data import build_dataset, build_statements, build_tokenizer, build_triplets
from engine.checkpoints import load_checkpoint
from engine.sizes import read_sizes
from engine.weights import load_pretrained
from evaluation import pictures
from evaluation.search import check_query_words
from readers.dataset import DataError, PairDataset, pad_to_square
from readers.fashiongen import FILES
from readers.files import open_image

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
INVISIBLE = [
    "",
    "  ",
    "\u200b",
    "\u200e\u200f \ufeff",
    "\u2060\u00ad",
    "\u2800",
    "\u3164",
    "\ufe0f",
    "&nbsp;",
    "<br/>",
    "\x07",
    "\ufffc",
    "<![CDATA[ ]]>",
]


@pytest.fixture(autouse=True)
def at_most_twenty_seconds():
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("took more than 20 seconds"))
    signal.alarm(20)  # a pipe that nobody writes to would be waited for
    yield
    signal.alarm(0)


def write_shop(folder, records, split="train", image="a.png"):
    """Write the records as lines, with the fields that they do not name; and a single image."""
    Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    whole = [{"image": image, "caption": f"Tee {i}", "product_id": i} | record for i, record in enumerate(records)]
    (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, whole)), encoding="utf-8")


def open_shop(folder, split="train"):
    if not (folder / "val.jsonl").exists():
        write_shop(folder, [{"product_id": "held out"}], "val")
    return build_dataset("jsonl", folder, split, 16)


def in_one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message and message.isprintable(), message
    for part in parts:
        assert part in message, message


@pytest.fixture
def hdf5(tmp_path):
    """Write a FashionGen file whose columns the test may replace. -> function (key, values, dtype) -> data set"""
    export_fashiongen(tmp_path, 2)

    def replace(key, values, dtype=None):
        with h5py.File(tmp_path / FILES["train"], "r+") as file:
            rows = len(file["input_image"])
            del file[key]
            if isinstance(values, list):
                column = file.create_dataset(key, (rows,), dtype)
                for row in range(rows):
                    column[row] = values[row % len(values)]
            elif values is not None:
                file[key] = values
        return build_dataset("fashiongen", tmp_path, "train", 16)

    return replace


# ---------------------------------------------------------------- product ids


@pytest.mark.parametrize(
    "first, second",
    [
        ("7 ", "7"),
        ("\t7\n", 7),
        ("\u00a07", "7"),
        ("\u200e7\u200b", "7"),
        ("\ufeff7", 7),
        (7.0, "7"),
        (7.0, 7),
        (1e15, 10**15),
    ],
)
def test_product_ids_are_compared_without_blanks_and_as_whole_numbers(tmp_path, first, second):
    write_shop(tmp_path, [{"product_id": first}, {"product_id": second}, {"product_id": "8"}])
    assert open_shop(tmp_path).product_ids.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    "product", ["", " ", "\t", "\u200b", "\ufeff", None, 7.5, float("nan"), float("inf"), [7], {"a": 1}]
)
def test_an_empty_product_id_is_refused_by_line(tmp_path, product):
    write_shop(tmp_path, [{}, {"product_id": product}])
    with pytest.raises(DataError) as error:
        open_shop(tmp_path)
    in_one_line(error, "train.jsonl line 2", "product_id")


@pytest.mark.parametrize("text", [b"7 ", b"\xa07", b"7\0"])
def test_product_ids_of_hdf5_may_be_text_or_floats(hdf5, text):
    assert hdf5("input_productID", [b"7", text], "S4").product_ids.max() == 0
    assert hdf5("input_productID", [17.0, 18.0], "f8").product_ids.max() == 1


@pytest.mark.parametrize(
    "key, values, dtype",
    [
        ("input_productID", [[1, 2], [3]], h5py.vlen_dtype(np.int64)),
        ("input_productID", [(1, 2)], np.dtype([("a", "i4"), ("b", "i4")])),
        ("input_productID", [b"7", b" "], "S4"),
        ("input_productID", [7, np.nan], "f8"),
        ("input_productID", 3, None),
        ("input_productID", h5py.Empty("f"), None),
        ("input_description", [[1, 2]], h5py.vlen_dtype(np.int64)),
        ("input_description", h5py.Empty("f"), None),
    ],
)
def test_columns_of_another_kind_are_refused(hdf5, key, values, dtype):
    with pytest.raises(DataError) as error:
        hdf5(key, values, dtype)
    in_one_line(error, FILES["train"], key)


def test_a_group_in_place_of_a_column_is_refused(hdf5, tmp_path):
    with h5py.File(tmp_path / FILES["train"], "r+") as file:
        del file["input_description"]
        file.create_group("input_description")
    with pytest.raises(DataError) as error:
        build_dataset("fashiongen", tmp_path, "train", 16)
    in_one_line(error, "input_description")


def test_products_in_both_files_are_reported(tmp_path):
    write_shop(tmp_path, [{"product_id": " 1"}, {"product_id": 2}, {"product_id": 2}])
    write_shop(tmp_path, [{"product_id": 2.0}, {"product_id": "1"}, {"product_id": 3}], "val")
    assert "2 of these products are in train.jsonl too (2, 1)" in open_shop(tmp_path, "val").report()
    assert "too" not in open_shop(tmp_path).report()
    (tmp_path / "train.jsonl").write_text("{")
    assert "too" not in open_shop(tmp_path, "val").report()

    export_fashiongen(tmp_path, 8)
    assert "too" not in build_dataset("fashiongen", tmp_path, "val", 16).report()
    with h5py.File(tmp_path / FILES["val"], "r+") as file, h5py.File(tmp_path / FILES["train"]) as train_file:
        file["input_productID"][:2] = train_file["input_productID"][:2]
    report = build_dataset("fashiongen", tmp_path, "val", 16).report()
    assert f"1 of these products are in {FILES['train']} too" in report
    (tmp_path / FILES["train"]).unlink()
    assert "too" not in build_dataset("fashiongen", tmp_path, "val", 16).report()


# ---------------------------------------------------------------- texts


@pytest.mark.parametrize(
    "values, dtype",
    [
        (["Robe d’été – “soie”".encode()], h5py.string_dtype("utf-8")),
        (["Robe d’été – “soie”".encode()], h5py.string_dtype("utf-8", 40)),
        (["Robe d’été – “soie”".encode()], "S40"),
        (["Robe d’été – “soie”".encode("cp1252")], "S40"),
        (["Robe d’été – “soie”".encode("cp1252")], h5py.string_dtype("utf-8")),
        (["Robe d’été\x0b–\x0c“soie”".encode("cp1252")], h5py.string_dtype("ascii")),
        ([b"Robe d\x92\xe9t\xe9\x81\x96 \x93soie\x94"], "S40"),
        (["Robe d’été – “soie” à".encode()], "S30"),  # cut within the last letter
        ([b"\xff" + "Robe d’été – “soie”".encode()], h5py.string_dtype("utf-8")),
    ],
)
def test_text_in_hdf5(hdf5, values, dtype):
    assert hdf5("input_description", values, dtype).captions[0] == "Robe d’été – “soie”"
    assert hdf5("input_category", values, dtype).categories[0] == "Robe d’été – “soie”"


def test_cp1252_contains_what_latin_1_prints(hdf5):
    printed = bytes(range(0xA1, 0x100)).replace(b"\xad", b"")
    assert hdf5("input_description", [printed], "S100").captions[0] == printed.decode("latin-1")


HTML = {
    "Men&#39;s tee &amp; shorts<br>": "Men's tee & shorts",
    "<p class='x'>Red</p><p>dress</p>": "Red dress",
    "Silk&nbsp;&ndash;&#160;caf&eacute;<BR/>new": "Silk – café new",
    "&lt;b&gt;Red&lt;/b&gt; dress": "Red dress",
    "red<!-- old > new -->dress": "red dress",
    "<![CDATA[Red <b>dress</b>]]>": "Red dress",
    "size <5 and > 3, I <3 it": "size <5 and > 3, I <3 it",
    "H&M jeans; R&D": "H&M jeans; R&D",
}


@pytest.mark.parametrize("raw", HTML)
def test_html_in_captions(tmp_path, hdf5, raw):
    text = HTML[raw]
    write_shop(tmp_path, [{"caption": raw, "category": raw}])
    shop = open_shop(tmp_path)
    assert shop.captions == [text] and shop.categories == [text] and shop.subset(np.array([0])).captions == [text]
    assert hdf5("input_description", [raw.encode()], "S60").captions[0] == text
    write_karpathy(tmp_path, "coco", [("val", "val2014", [raw])])
    assert build_dataset("coco", tmp_path, "val", 16).captions == [text]
    write_snlive(tmp_path, [("1", raw, "neutral")], ["1"])
    assert build_statements("snlive", tmp_path, "val", 16).captions == [text]
    assert fashioniq_with(tmp_path, [raw, " "]).captions[0] == text


def fashioniq_with(folder, captions):
    """Open FashionIQ files whose first pair has these captions."""
    if not (folder / "captions").exists():
        write_fashioniq(folder, "val", dict.fromkeys(PUBLISHED, (2, 4, 4)))
    path = folder / "captions" / "cap.dress.val.json"
    pairs = json.loads(path.read_text())
    pairs[0]["captions"] = captions
    path.write_text(json.dumps(pairs))
    return build_triplets("fashioniq", folder, "val", 16)


@pytest.mark.parametrize("text", INVISIBLE)
def test_texts_without_a_visible_character_are_left_out_and_counted(tmp_path, hdf5, text):
    write_shop(tmp_path, [{"caption": text}, {}])
    shop = open_shop(tmp_path)
    assert len(shop) == 1 and shop.problems == ["line 1: the caption is empty"]
    opened = hdf5("input_description", [text.encode(), b"Tee"], h5py.string_dtype("utf-8"))
    assert opened.problems[0] == "row 0: empty input_description" and set(opened.captions) == {"Tee"}
    write_karpathy(tmp_path, "coco", [("val", "val2014", [text, "A dog"])])
    opened = build_dataset("coco", tmp_path, "val", 16)
    assert opened.captions == ["A dog"] and "empty captions: 1" in opened.report()
    write_snlive(tmp_path, [("1", text, "neutral"), ("1", "A dog", "neutral")], ["1"])
    opened = build_statements("snlive", tmp_path, "val", 16)
    assert opened.captions == ["A dog"] and "statements without words: 1" in opened.report()
    opened = fashioniq_with(tmp_path, [text, text])
    assert len(opened) == 5 and "pairs without a caption: 1" in opened.report()
    assert fashioniq_with(tmp_path, [text, "is red"]).captions[0] == "is red"


@pytest.mark.parametrize("text", ["!", "👗", "€", "7", "संयुक्त", "👩‍👧", "\u0627\u200c\u0628", "٪"])
def test_texts_with_a_visible_character_stay(tmp_path, text):
    write_shop(tmp_path, [{"caption": text}])
    assert open_shop(tmp_path).captions == [text]


@pytest.mark.parametrize("text", ["lone \ud800 surrogate", "\udcff"])
def test_lone_surrogates_neither_reach_the_tokenizer_nor_the_terminal(tmp_path, text):
    write_shop(tmp_path, [{"caption": text, "category": text, "image": f"{text}.png"}, {"caption": text}, {}])
    opened = open_shop(tmp_path)
    opened.report().encode()
    build_tokenizer(opened.captions, 100, 16).encode_batch(opened.captions)


@pytest.mark.parametrize(
    "first, second",
    [
        ("バッグ", "ハック"),
        ("हिन्दी", "हनद"),
        ("कुर्ता", "करता"),
        ("สีแดง", "สแดง"),
        ("für", "fur"),
        ("한", "하"),
        ("कि", "की"),
    ],
)
def test_marks_of_other_scripts_are_kept_in_a_vocabulary_of_the_captions(first, second):
    tokenizer = build_tokenizer([first, second] * 3, 200, 16)
    one, other = (tokenizer.encode(text).ids for text in (first, second))
    assert one != other and tokenizer.token_to_id("[UNK]") not in one + other
    decomposed = unicodedata.normalize("NFD", first)
    assert tokenizer.encode(decomposed).ids == one


def test_accents_are_stripped_for_a_vocabulary_that_is_given(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*data.SPECIAL_TOKENS, "ete"]))
    tokenizer = build_tokenizer([], 0, 16, vocab=tmp_path / "vocab.txt")
    assert tokenizer.encode("Été").tokens[1] == "ete"


@pytest.mark.parametrize("text", ["バッグ", "हिन्दी", "une robe d’été brodée"])
def test_a_vocabulary_of_captions_is_read_back_with_its_accents(tmp_path, text):
    trained = build_tokenizer([text, f"{text} neu"], 200, 16)
    words = sorted(trained.get_vocab(), key=trained.token_to_id)
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    trained.save(str(tmp_path / "tokenizer.json"))
    for name in ("vocab.txt", "tokenizer.json"):
        read = build_tokenizer([], 0, 16, vocab=tmp_path / name)
        assert read.encode(text).ids == trained.encode(text).ids


QUERIES = [
    "红色连衣裙",
    "赤いドレス",
    "红色dress",
    "𠀀裙",
    "赤",
    "ドレス",
    "लाल",
    "빨간 드레스",
    "红色，裙！",
    "👗",
    "robe d’été",
]


@pytest.mark.parametrize("query", QUERIES)
def test_queries_whose_tokens_are_in_the_vocabulary(query, capsys):
    check_query_words(build_tokenizer([*QUERIES, *(f"neu {text}" for text in QUERIES)], 500, 16), query)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("query", ["紫", "gown", "!!", "\u200b", "紫 gown", "\udcff", "robe d'\udce9t\udce9"])
def test_queries_without_a_word_of_the_vocabulary_or_no_utf8_are_refused(query):
    with pytest.raises(DataError) as error:
        check_query_words(build_tokenizer(["红色裙", "dress", "wogn", "robe"] * 2, 500, 16), query)
    in_one_line(error, "--query")


# ---------------------------------------------------------------- text files

ENCODINGS = ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
MARKS = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}


def recode(path, encoding, newline="\r\n"):
    text = path.read_text(encoding="utf-8").replace("\n", newline)
    path.write_bytes(MARKS.get(encoding, b"") + text.encode(encoding))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_byte_order_marks(tmp_path, encoding):
    write_shop(tmp_path, [{"caption": "café"}, {}])
    write_shop(tmp_path, [{}, {}], "val")
    write_karpathy(tmp_path, "coco", [("val", "val2014", ["A café"])])
    write_snlive(tmp_path, [("1", "A café", "neutral"), ("1", "A dog", "neutral")], ["1"])
    write_fashioniq(tmp_path, "val", dict.fromkeys(PUBLISHED, (2, 4, 4)))
    (tmp_path / "vocab.txt").write_text("\n".join([*data.SPECIAL_TOKENS, "tee", "é"]), encoding="utf-8")
    for path in [*tmp_path.glob("*.json*"), *tmp_path.glob("*/*.json"), tmp_path / "vocab.txt"]:
        recode(path, encoding)
    assert open_shop(tmp_path).captions[0] == "café" and len(open_shop(tmp_path, "val")) == 2
    assert build_dataset("coco", tmp_path, "val", 16).captions == ["A café"]
    assert len(build_statements("snlive", tmp_path, "val", 16)) == 2
    assert len(build_triplets("fashioniq", tmp_path, "val", 16)) == 6
    tokenizer = build_tokenizer([], 0, 16, vocab=tmp_path / "vocab.txt")
    assert tokenizer.get_vocab_size() == 7 and tokenizer.token_to_id("[PAD]") == 0


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16-le"])
def test_text_in_another_encoding_is_refused_by_line(tmp_path, encoding):
    write_shop(tmp_path, [{}])
    with open(tmp_path / "train.jsonl", "ab") as file:
        file.write('\n{"image": "a.png", "caption": "café ł", "product_id": 3}'.encode(encoding, "replace") + b"\xff")
    with pytest.raises(DataError) as error:
        open_shop(tmp_path)
    in_one_line(error, "train.jsonl line 2", "UTF-8")


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_list_in_place_of_lines(tmp_path, indent):
    write_shop(tmp_path, [{}, {"image": "gone.png"}, {}])
    write_snlive(tmp_path, [("1", "A dog", "neutral"), ("1", "A cat", "neutral")], ["1"])
    for path in (tmp_path / "train.jsonl", tmp_path / "snli_ve_dev.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("\ufeff \n" + json.dumps(records, indent=indent), encoding="utf-8")
    opened = open_shop(tmp_path)
    assert opened.captions == ["Tee 0", "Tee 2"] and opened.problems == ["item 2: image gone.png is missing"]
    assert build_statements("snlive", tmp_path, "val", 16).captions == ["A dog", "A cat"]


@pytest.mark.parametrize(
    "content, place",
    [
        ("[1]", "item 1"),
        ("[{}, [2]]", "item 1"),
        ("[[1]]\n{}", "train.jsonl"),
        ("[", "train.jsonl"),
        ("[]", "train.jsonl"),
    ],
)
def test_a_json_list_of_something_else_is_refused(tmp_path, content, place):
    write_shop(tmp_path, [{}])
    (tmp_path / "train.jsonl").write_text(content)
    with pytest.raises(DataError) as error:
        open_shop(tmp_path)
    in_one_line(error, place)


@pytest.mark.parametrize("depth", [300, 900, 1_200, 5_000, 100_000])
@pytest.mark.parametrize("brackets", ["[]", '{"a":0}'])
def test_a_category_nested_hundreds_deep(tmp_path, depth, brackets):
    write_shop(tmp_path, [{"category": "nested"}, {}])
    start, end = brackets.replace("0", " ").split(" ") if "0" in brackets else brackets
    nested = start * depth + "0" + end * depth
    path = tmp_path / "train.jsonl"
    path.write_text(path.read_text().replace('"nested"', nested))
    try:
        opened = open_shop(tmp_path)
    except DataError as error:
        assert "train.jsonl line 1" in str(error) and "\n" not in str(error)
    else:
        assert opened.categories == ["", ""]


ID_LISTS = [["a"], {"a": "b"}, None, 1.5]


@pytest.mark.parametrize("name", ID_LISTS)
def test_names_that_are_lists_are_refused(tmp_path, name):
    write_snlive(tmp_path, [("1", "A dog", "neutral")], ["1"])
    path = tmp_path / "snli_ve_dev.jsonl"
    path.write_text(path.read_text().replace('"1"', json.dumps(name)))
    with pytest.raises(DataError) as error:
        build_statements("snlive", tmp_path, "val", 16)
    in_one_line(error, "line 1")
    write_fashioniq(tmp_path, "val", dict.fromkeys(PUBLISHED, (2, 4, 4)))
    for path, old in (
        ("captions/cap.dress.val.json", '"dress00001"'),
        ("image_splits/split.shirt.val.json", '"shirt00001"'),
    ):
        before = (tmp_path / path).read_text()
        (tmp_path / path).write_text(before.replace(old, json.dumps(name)))
        with pytest.raises(DataError) as error:
            build_triplets("fashioniq", tmp_path, "val", 16)
        in_one_line(error, path)
        (tmp_path / path).write_text(before)
    write_karpathy(tmp_path, "coco", [("val", "val2014", ["A dog"])])
    path = tmp_path / "dataset_coco.json"
    path.write_text(path.read_text().replace('"0.jpg"', json.dumps(name)))
    with pytest.raises(DataError) as error:
        build_dataset("coco", tmp_path, "val", 16)
    in_one_line(error, "dataset_coco.json")


# ---------------------------------------------------------------- Git LFS, locks


def test_git_lfs_pointers_in_place_of_any_file(tmp_path):
    write_shop(tmp_path, [{}, {}])
    write_shop(tmp_path, [{}], "val")
    export_fashiongen(tmp_path, 2)
    write_karpathy(tmp_path, "coco", [("val", "val2014", ["A dog"])])
    write_snlive(tmp_path, [("1", "A dog", "neutral")], ["1"])
    write_fashioniq(tmp_path, "val", dict.fromkeys(PUBLISHED, (2, 4, 4)))
    opened = open_shop(tmp_path)
    files = {
        "a.png": lambda path: open_image(path, 16),
        "train.jsonl": lambda path: open_shop(tmp_path),
        FILES["train"]: lambda path: build_dataset("fashiongen", tmp_path, "train", 16),
        "dataset_coco.json": lambda path: build_dataset("coco", tmp_path, "val", 16),
        "snli_ve_dev.jsonl": lambda path: build_statements("snlive", tmp_path, "val", 16),
        "captions/cap.shirt.val.json": lambda path: build_triplets("fashioniq", tmp_path, "val", 16),
        "image_splits/split.dress.val.json": lambda path: build_triplets("fashioniq", tmp_path, "val", 16),
        "vocab.txt": lambda path: build_tokenizer([], 0, 16, vocab=path),
        "config.json": lambda path: read_sizes(path),
        "last.pt": load_checkpoint,
        "vit.safetensors": lambda path: load_pretrained(torch.nn.Linear(1, 1), [path]),
        "vit.pth": lambda path: load_pretrained(torch.nn.Linear(1, 1), [path]),
    }
    for name, read in files.items():
        path = tmp_path / name
        path.write_bytes(POINTER)
        with pytest.raises((DataError, OSError), match="Git LFS pointer.*git lfs pull") as error:
            read(path)
        in_one_line(error, *([] if name == "a.png" else [name]))
        path.unlink()
    (tmp_path / "a.png").write_bytes(POINTER)
    assert "a.png: a Git LFS pointer" in opened[0].reason


def test_a_locked_hdf5_file(tmp_path):
    export_fashiongen(tmp_path, 2)
    program = (
        "import sys; sys.path[:0] = ['.', 'tests']\n"
        "from data import build_dataset\n"
        "from readers.dataset import DataError\n"
        f"try: print(len(build_dataset('fashiongen', {str(tmp_path)!r}, 'train', 16)))\n"
        "except DataError as error: print(error)\n"
    )
    with open(tmp_path / FILES["train"], "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as HDF5 does
        outputs = []
        for locking in ("TRUE", "FALSE"):
            environment = os.environ | {"HDF5_USE_FILE_LOCKING": locking}
            outputs.append(
                subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True).stdout
            )
    assert (
        "HDF5_USE_FILE_LOCKING=FALSE" in outputs[0]
        and "copy it again" not in outputs[0]
        and outputs[0].count("\n") == 1
    )
    assert int(outputs[1]) > 0


# ---------------------------------------------------------------- names of image files

NAMES = [
    "Screen Shot 2024 at 9.41.00\u202fAM.png",
    "a\u00a0b.png",
    "👩‍👧.png",
    "so\u00adft.png",
    "é.png",
    "e\u0301.png",
    "e\u0301/é.png",
    "バッグ/ハ.png",
    "~ $x.png",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", [None, "NFC", "NFD"])
def test_names_of_images(tmp_path, name, form):
    image = Image.new("RGB", (8, 8), "red")
    in_file = unicodedata.normalize(form, name) if form else name
    (tmp_path / name).parent.mkdir(exist_ok=True)
    image.save(tmp_path / name)
    write_shop(tmp_path, [{}], image=in_file)
    opened = open_shop(tmp_path)
    assert len(opened) == 1 and opened[0]["image"].shape == (3, 16, 16), opened.report()

    write_karpathy(tmp_path, "coco", [("val", "val2014", ["A dog"])])
    (tmp_path / "val2014" / name).parent.mkdir(exist_ok=True)
    image.save(tmp_path / "val2014" / name)
    path = tmp_path / "dataset_coco.json"
    path.write_text(path.read_text().replace('"0.jpg"', json.dumps(in_file)))
    assert len(build_dataset("coco", tmp_path, "val", 16)) == 1

    (tmp_path / "images" / name).parent.mkdir(exist_ok=True, parents=True)
    image.save(tmp_path / "images" / name)
    stem = in_file.split("/")[-1].removesuffix(".png")
    write_snlive(tmp_path, [("1", "A dog", "neutral")], ["1"])
    path = tmp_path / "snli_ve_dev.jsonl"
    path.write_text(path.read_text().replace('"1"', json.dumps(stem)))
    assert len(build_statements("snlive", tmp_path, "val", 16)) == 1
    write_fashioniq(tmp_path, "val", dict.fromkeys(PUBLISHED, (2, 4, 4)))
    for path in ("captions/cap.dress.val.json", "image_splits/split.dress.val.json"):
        text = (tmp_path / path).read_text()
        (tmp_path / path).write_text(text.replace('"dress00001"', json.dumps(stem)))
    assert len(build_triplets("fashioniq", tmp_path, "val", 16)) == 6


@pytest.mark.parametrize(
    "name", ["x" * 252 + ".png", "é" * 130 + ".png", "d/" * 3000 + "a.png", "\ud800.png", "a.png/b.png", "", "."]
)
def test_a_name_that_the_system_refuses_leaves_out_its_line(tmp_path, name):
    write_shop(tmp_path, [{}, {"image": name}])
    opened = open_shop(tmp_path)
    assert len(opened) == 1 and opened.problems[0].startswith("line 2: image "), opened.problems
    opened.report().encode()


@pytest.mark.parametrize("name", ["a\0.png", "a\n.png", "\x1b[2J.png", "a\x85.png"])
def test_a_name_with_control_characters_is_refused_by_line(tmp_path, name):
    write_shop(tmp_path, [{}, {"image": name}])
    with pytest.raises(DataError) as error:
        open_shop(tmp_path)
    in_one_line(error, "train.jsonl line 2", "image")


@pytest.mark.parametrize("place", ["{}.JPG", "{}.jpeg", "{}.Png", "{}.webp", "dress/{}.jpg", "a/b/{}.JPEG"])
def test_files_of_fashioniq_and_snlive_may_have_other_endings_and_lie_in_folders(tmp_path, place):
    write_snlive(tmp_path, [("17", "A dog", "neutral"), (18, "A cat", "neutral")], ["17", "18"])
    sizes = dict.fromkeys(PUBLISHED, (2, 4, 4))
    write_fashioniq(tmp_path, "val", sizes, lambda number: Image.new("RGB", (9, 9), (number, 0, 0)))
    for path in [*(tmp_path / "images").iterdir()]:
        target = tmp_path / "images" / place.format(path.stem)
        target.parent.mkdir(exist_ok=True, parents=True)
        path.rename(target)
    (tmp_path / "images" / "note.txt").touch()
    opened = build_statements("snlive", tmp_path, "val", 16)
    assert len(opened) == 2 and not opened.problems and opened[0]["image"].shape == (3, 16, 16)
    opened = build_triplets("fashioniq", tmp_path, "val", 16)
    assert len(opened) == 6 and not opened.problems and opened[0]["target_image"].shape == (3, 16, 16)


def test_a_pipe_in_place_of_an_image(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("pipe.jpg", "folder.jpg", "nothing.jpg"):
        with pytest.raises(OSError, match="file"):
            open_image(tmp_path / name, 16)
    write_shop(tmp_path, [{}, {"image": "pipe.jpg"}, {"image": "folder.jpg"}])
    assert len(open_shop(tmp_path)) == 1
    write_snlive(tmp_path, [("1", "A dog", "neutral"), ("2", "A cat", "neutral")], ["1"])
    os.mkfifo(tmp_path / "images" / "2.jpg")
    assert len(build_statements("snlive", tmp_path, "val", 16)) == 1


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("size", [(6000, 1), (1, 6000), (400, 3), (3, 400), (33, 1)])
@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_images_far_wider_than_high_keep_a_row_of_pixels(tmp_path, size, ending):
    Image.new("RGB", size, "black").save(tmp_path / f"a.{ending}")
    square = np.array(pad_to_square(open_image(tmp_path / f"a.{ending}", 16), 16))
    black = (square == 0).all(axis=2)
    assert square.shape == (16, 16, 3) and black.sum() == 16 and (square[~black] == 255).all()


@pytest.mark.parametrize("size", [(30, 40), (40, 30), (16, 16), (17, 16), (16, 50), (101, 64)])
def test_other_images_are_padded_as_by_pillow(size):
    from PIL import ImageOps

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8))
    by_pillow = ImageOps.pad(image, (16, 16), Image.Resampling.BILINEAR, color=(255, 255, 255))
    assert np.array_equal(np.array(pad_to_square(image, 16)), np.array(by_pillow))


EXIF = {
    "garbage": b"garbage",
    "no header": b"\xff" * 30,
    "cut": b"MM\0*\0\0\0\x08\0\x05",
    "far": b"MM\0*\xff\xff\xff\xf0",
    "types": b"MM\0*\0\0\0\x08\0\x02"
    + struct.pack(">HHLL", 0x0112, 2, 9, 9)
    + struct.pack(">HHLL", 0x8769, 4, 1, 9999),
    "huge": b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHLL", 0x0112, 3, 2**31, 2**31),
    "rational": b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHLL", 0x0112, 5, 1, 4),
    "empty": b"",
    "signed": b"MM\0*\0\0\0\x08\0\x02"
    + struct.pack(">HHLhh", 0x0112, 3, 1, 6, 0)
    + struct.pack(">HHLl", 0x0111, 9, 1, -9),
}


@pytest.mark.parametrize("ending", ["png", "webp", "jpg"])
@pytest.mark.parametrize("kind", EXIF)
def test_broken_exif(tmp_path, ending, kind):
    path = tmp_path / f"a.{ending}"
    prefix = b"Exif\0\0" if ending == "jpg" else b""
    Image.new("RGB", (8, 4), "red").save(path, exif=prefix + EXIF[kind], quality=100)
    image = open_image(path, 16)
    assert image.size in ((8, 4), (4, 8)) and image.mode == "RGB" and image.getpixel((1, 1))[0] > 240


def test_broken_exif_in_a_text_chunk(tmp_path):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Raw profile type exif", "\nexif\n  12\nnot hexadecimal\n")
    Image.new("RGB", (8, 4), "red").save(tmp_path / "a.png", pnginfo=info)
    assert open_image(tmp_path / "a.png", 16).size == (8, 4)


def test_whole_exif_turns_the_image_and_damaged_pixels_are_still_refused(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for ending in ("png", "webp", "jpg"):
        path = tmp_path / f"a.{ending}"
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 80, 3), np.uint8)).save(path, exif=exif)
        width, height = open_image(path, 40).size  # a JPEG is decoded at half of its size
        assert 2 * width == height
        path.write_bytes(path.read_bytes()[:300])
        with pytest.raises(OSError, match="cannot be decoded"):
            open_image(path, 16)


# ---------------------------------------------------------------- pictures

LABELS = ["Tops", "ドレス", "कुर्ता", "红色", "👗", "été", "한복"]


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_labels_without_a_font_are_numbered_and_listed(tmp_path, monkeypatch, no_warnings):
    classes = tuple(LABELS)
    labels = torch.arange(len(LABELS) + 1)
    dataset = SimpleNamespace(row_noun="images")
    config = SimpleNamespace(classes=classes, most_frequent=0, task="category", out=str(tmp_path), modality="both")
    monkeypatch.setattr(finetune, "predict", lambda *_: (labels, labels, labels))
    monkeypatch.setattr(pictures, "fontManager", SimpleNamespace(ttflist=[]))
    finetune.evaluate_recognition(SimpleNamespace(config=config), dataset)
    lines = [line.split("\t") for line in (tmp_path / "classes.tsv").read_text(encoding="utf-8").splitlines()]
    legend = {line[0]: line[-1] for line in lines}
    assert legend["class"] == "label in confusion.png" and legend["Tops"] == "Tops" and legend["été"] == "été"
    numbered = [legend[label] for label in ("ドレス", "कुर्ता", "红色", "👗", "한복")]
    assert len(set(legend.values())) == len(legend) and all(label.isascii() for label in numbered)
    assert (tmp_path / "confusion.png").stat().st_size > 1000


def test_a_font_of_the_system_is_found(tmp_path, monkeypatch, no_warnings):
    letter = "\u2312"  # in the STIX font that matplotlib brings, not in its DejaVu
    assert pictures.picture_labels([letter, "Tops"]) == [letter, "Tops"]
    pictures.draw_confusion(torch.tensor([0, 1]), torch.tensor([0, 1]), [letter, "Tops"], tmp_path / "confusion.png")
    monkeypatch.setattr(pictures, "fontManager", SimpleNamespace(ttflist=[]))
    pictures.find_font.cache_clear()
    assert pictures.picture_labels([letter, "Tops"]) == ["no. 1", "Tops"]
    pictures.find_font.cache_clear()


def test_sheets_of_other_scripts(tmp_path, monkeypatch, no_warnings, capsys):
    monkeypatch.setattr(pictures, "fontManager", SimpleNamespace(ttflist=[]))
    pictures.find_font.cache_clear()
    images = [Image.new("RGB", (16, 16))]
    dataset = PairDataset(["ドレス"], [0], images, 16)
    found = [pictures.RetrievedImage(0, "0.5", False)]
    queries = [pictures.ExampleQuery(text, None, found) for text in ("ドレス", "red dress", "लाल $x$", "")]
    pictures.draw_retrieved(dataset, queries, tmp_path / "sheet.png")
    printed = capsys.readouterr().out
    assert "ドレス" in printed and "लाल" in printed and "red" not in printed
    pictures.find_font.cache_clear()
