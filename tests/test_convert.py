"""Tables of the shapes that public fashion sets have become folders that `--data jsonl` reads."""

import csv
import io
import json
import os
import sys

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

import data
from data import build_dataset

KAGGLE = """id,gender,masterCategory,subCategory,articleType,baseColour,season,year,usage,productDisplayName
15970,Men,Apparel,Topwear,Shirts,Navy Blue,Fall,2011,Casual,Turtle Check Men Navy Blue Shirt
39386,Men,Apparel,Bottomwear,Jeans,Blue,Summer,2012,Casual,"Peter England ""Party"" Jeans, Blue"
59263,Women,Accessories,Watches,Watches,Silver,Winter,2016,Casual,Titan Women Silver Watch
21379,Men,Apparel,Bottomwear,Track Pants,Black,Fall,2011,Casual,Manchester, United Track Pants
53759,Men,Apparel,Topwear,Tshirts,Grey,Summer,2012,Casual,
12345,Men,Apparel,Topwear,Tshirts,Grey,Summer,2012,Casual,Puma Men Grey T-shirt
"""
SIMPLE = ["--image", "{image}", "--caption", "{caption}"]


def draw(path, number=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 32), (number * 37 % 256, number * 91 % 256, 60)).save(path)


def jpeg(number, kind="JPEG"):
    file = io.BytesIO()
    Image.new("RGB", (24, 32), (number * 37 % 256, number * 91 % 256, 60)).save(file, kind)
    return file.getvalue()


def records(folder):
    return [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]


def convert(folder, *flags):
    """Convert a table to the folder `out`, and open it. -> its records, its data set"""
    data.main(["convert", *map(str, flags), "--out", str(folder / "out")])
    dataset = build_dataset("jsonl", folder / "out", "train", 32)
    assert len(dataset) and all("image" in dataset[row] for row in range(len(dataset)))
    assert not dataset.problems
    return records(folder / "out"), dataset


def refused(*flags):
    """-> the line with which a conversion ends"""
    with pytest.raises(SystemExit) as caught:
        data.main(["convert", *map(str, flags)])
    message = str(caught.value.code)
    assert message.startswith("data.py: ") and "\n" not in message
    return message


def test_a_table_of_one_line_and_a_table_that_begins_with_a_blank_line(tmp_path):
    draw(tmp_path / "a.png")
    row = {"image": "a.png", "caption": "red dress", "no": 7}
    (tmp_path / "one.jsonl").write_text(json.dumps(row) + "\n")
    flags = [*SIMPLE, "--product", "{no}"]
    (tmp_path / "blank.csv").write_text("\nimage;caption;no\na.png;red, long dress;7\n")
    captions = []
    for table in ("--json one.jsonl", "--csv blank.csv"):
        flag, name = table.split()
        data.main(["convert", flag, str(tmp_path / name), *flags, "--out", str(tmp_path / flag)])
        captions += [record["caption"] for record in records(tmp_path / flag)]
    assert captions == ["red dress", "red, long dress"]


def test_kaggles_product_images(tmp_path, capsys):
    (tmp_path / "styles.csv").write_text(KAGGLE)
    for number in (15970, 39386, 59263, 21379, 53759):
        draw(tmp_path / f"images/{number}.jpg", number)
    flags = ["--image", "images/{id}.jpg", "--caption", "{productDisplayName}", "--product", "{id}"]
    flags += ["--category", "{masterCategory}", "--subcategory", "{articleType}", "--season", "{season} {year}"]
    found, dataset = convert(tmp_path, "--csv", tmp_path / "styles.csv", *flags)
    assert len(found) == 3
    assert found[1] == {
        "image": "images/39386.jpg",
        "caption": 'Peter England "Party" Jeans, Blue',
        "product_id": "39386",
        "category": "Apparel",
        "subcategory": "Jeans",
        "season": "Summer 2012",
    }
    assert dataset.categories.count("Accessories") + dataset.categories.count("Apparel") == len(dataset)
    left_out = (tmp_path / "out/left_out.txt").read_text().splitlines()
    assert left_out == [
        "line 5: 11 values, the header has 10",
        "line 6: the caption is empty",
        "line 7: image images/12345.jpg is missing",
    ]
    printed = capsys.readouterr().out
    assert "out/train.jsonl: 3 images of 3 products, 3 left out (line 5: 11 values" in printed
    assert f"next: python train.py --data jsonl --root {tmp_path}/out" in printed


def test_images_are_linked_or_copied_and_never_decoded(tmp_path):
    (tmp_path / "a.csv").write_text("image,caption\nphotos/1.jpg,red\n")
    source = tmp_path / "photos/1.jpg"
    source.parent.mkdir()
    source.write_bytes(b"not an image")
    for out, flags, linked in (("linked", [], True), ("copied", ["--copy"], False)):
        data.main(["convert", "--csv", str(tmp_path / "a.csv"), *SIMPLE, "--out", str(tmp_path / out), *flags])
        target = tmp_path / out / "photos/1.jpg"
        assert target.samefile(source) == linked and target.read_bytes() == b"not an image"


def test_a_symbolic_link_is_followed(tmp_path):
    """Downloads of Hugging Face are links relative to their folder, which lead nowhere from another one."""
    (tmp_path / "a.csv").write_text("image,caption\nlinks/1.jpg,red\nlinks/2.jpg,blue\n")
    (tmp_path / "links").mkdir()
    for number in (1, 2):
        draw(tmp_path / f"blobs/{number}.png")
        (tmp_path / f"links/{number}.jpg").symlink_to(f"../blobs/{number}.png")
    convert(tmp_path, "--csv", tmp_path / "a.csv", *SIMPLE)
    assert not (tmp_path / "out/links/1.jpg").is_symlink()


def test_where_no_link_is_possible_images_are_copied(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", fail)
    (tmp_path / "a.csv").write_text("image,caption\n1.jpg,red\n2.jpg,blue\n")
    draw(tmp_path / "1.jpg"), draw(tmp_path / "2.jpg")
    convert(tmp_path, "--csv", tmp_path / "a.csv", *SIMPLE)
    assert not (tmp_path / "out/1.jpg").samefile(tmp_path / "1.jpg")


def test_the_table_s_own_folder_can_be_converted_in_place(tmp_path):
    (tmp_path / "a.csv").write_text("image,caption\nimages/1.jpg,red\n")
    draw(tmp_path / "images/1.jpg")
    before = sorted(tmp_path.rglob("*"))
    data.main(["convert", "--csv", str(tmp_path / "a.csv"), *SIMPLE, "--out", str(tmp_path)])
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "train.jsonl"])
    assert "train.jsonl exists already" in refused("--csv", tmp_path / "a.csv", *SIMPLE, "--out", tmp_path)


def test_deepfashion_multimodals_captions_and_views(tmp_path):
    """One JSON object: the name of a view -> its caption. What views share stands in their names."""
    captions = {}
    for product in ("MEN-Denim-id_00000080-01", "WOMEN-Tees_Tanks-id_00000001-02"):
        for view in ("7_additional", "4_full", "1_front"):
            captions[f"{product}_{view}.jpg"] = f"The upper clothing of {product} has long sleeves."
            draw(tmp_path / f"images/{product}_{view}.jpg", len(captions))
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    flags = ["--image", "images/{key}", "--caption", "{value}", "--product", r"{key:~id_\d{8}-\d+}"]
    flags += ["--category", "{key:~^(\\w+)-}", "--subcategory", "{key:~-(.+?)-}"]
    found, dataset = convert(tmp_path, "--json", tmp_path / "captions.json", *flags)
    products = [record["product_id"] for record in found]
    assert products == ["id_00000080-01"] * 3 + ["id_00000001-02"] * 3
    assert {(record["category"], record["subcategory"]) for record in found} == {
        ("MEN", "Denim"),
        ("WOMEN", "Tees_Tanks"),
    }
    assert len(dataset) == 3  # the other product is held out


def test_hms_articles_in_nested_folders(tmp_path):
    header = "article_id,product_code,prod_name,product_type_name,product_group_name,detail_desc\n"
    rows = "0108775015,0108775,Strap top,Vest top,Garment Upper body,Jersey top with narrow shoulder straps.\n"
    rows += "0110065001,0110065,OP T-shirt (Idro),Bra,Underwear,\n"
    rows += "0108775044,0108775,Strap top,Vest top,Garment Upper body,Jersey top with narrow shoulder straps.\n"
    (tmp_path / "articles.csv").write_text(header + rows)
    draw(tmp_path / "images/010/0108775015.jpg", 1)
    draw(tmp_path / "images/011/0110065001.jpg", 2)
    draw(tmp_path / "images/010/0108775044.jpg", 3)
    flags = ["--image", "images/{article_id:.3}/{article_id}.jpg", "--caption", "{prod_name}. {detail_desc}"]
    flags += ["--product", "{product_code}", "--category", "{product_group_name}"]
    found, _ = convert(tmp_path, "--csv", tmp_path / "articles.csv", *flags)
    assert [record["image"][7:] for record in found] == [
        "010/0108775015.jpg",
        "011/0110065001.jpg",
        "010/0108775044.jpg",
    ]
    assert [record["product_id"] for record in found] == ["0108775", "0110065", "0108775"]
    assert found[1]["caption"] == "OP T-shirt (Idro)."
    # a program that read the numbers has dropped their zeros
    (tmp_path / "articles.csv").write_text((header + rows).replace("\n0", "\n"))
    flags[1] = "images/0{article_id:.2}/{article_id:0>10}.jpg"
    (tmp_path / "out/train.jsonl").unlink()
    assert len(convert(tmp_path, "--csv", tmp_path / "articles.csv", *flags)[0]) == 3


def test_a_star_gives_a_product_several_views(tmp_path):
    (tmp_path / "a.csv").write_text("id,name\n1,Red dress\n12,Blue shirt\n[3]*,Green hat\n4,Grey belt\n")
    for name in ("1_front.jpg", "1_back.jpg", "12_front.jpg", "[3]*_a.jpg", ".1_front.jpg", "3_b.jpg"):
        draw(tmp_path / "images" / name)
    (tmp_path / "images/1_folder.jpg").mkdir()
    flags = ["--csv", tmp_path / "a.csv", "--caption", "{name}", "--product", "{id}", "--image"]
    found, _ = convert(tmp_path, *flags, "images/{id}_*.jpg")
    images = [(record["product_id"], record["image"]) for record in found]
    assert images == [
        ("1", "images/1_back.jpg"),
        ("1", "images/1_front.jpg"),
        ("12", "images/12_front.jpg"),
        ("[3]*", "images/[3]*_a.jpg"),
    ]
    assert (tmp_path / "out/left_out.txt").read_text() == "line 5: image images/4_*.jpg is missing\n"


@pytest.mark.parametrize("pattern", ["photos/*/{id}.jpg", "{folder}/{id}/*.jpg", "photos/*/{id}/*.jpg"])
def test_a_star_stands_for_folders_too(tmp_path, pattern):
    (tmp_path / "a.csv").write_text("id,folder,name\n1,photos/x,Red dress\n2,photos/y,Blue shirt\n")
    inner = "{}/1.jpg" if pattern.endswith("*.jpg") else "{}.jpg"
    draw(tmp_path / "photos/x" / inner.format(1), 1)
    draw(tmp_path / "photos/y" / inner.format(2), 2)
    draw(tmp_path / "photos/y" / inner.format(3), 3)
    found, _ = convert(tmp_path, "--csv", tmp_path / "a.csv", "--caption", "{name}", "--image", pattern)
    assert [record["image"] for record in found] == [f"photos/x/{inner.format(1)}", f"photos/y/{inner.format(2)}"]
    assert [record["product_id"] for record in found] == ["line 2", "line 3"]


def test_marqos_parquet_sets(tmp_path):
    """Images are bytes in a column, {"bytes": …, "path": …}; several files."""
    names = ["image", "category1", "category2", "color", "description", "text", "item_ID"]
    for part in range(2):
        rows = []
        for number in range(part * 40, part * 40 + 40):
            image = {"bytes": jpeg(number, "PNG" if number % 2 else "JPEG"), "path": f"{number}.jpg"}
            rows.append(
                [image, "Men", "Denim", None, ["Skinny jeans.", "Five pockets."], "jeans", f"{number // 2}_{number}"]
            )
        rows[3][0] = {"bytes": None, "path": None}
        rows[4][0]["bytes"] = b"GIT-LFS"
        rows[5][4] = None
        table = pyarrow.table({name: [row[i] for row in rows] for i, name in enumerate(names)})
        parquet.write_table(table, tmp_path / f"data-0000{part}.parquet", row_group_size=16)
    flags = ["--image", "{image}", "--caption", "{description}", "--product", "{item_ID:~^\\d+}", "--colour", "{color}"]
    found, dataset = convert(tmp_path, "--parquet", *sorted(tmp_path.glob("*.parquet")), *flags)
    assert len(found) == 80 - 6 and len({record["product_id"] for record in found}) == 38
    assert found[0]["caption"] == "Skinny jeans. Five pockets." and found[0]["colour"] == ""
    assert {record["image"].split(".")[1] for record in found} == {"jpeg", "png"}
    left_out = (tmp_path / "out/left_out.txt").read_text().splitlines()
    assert left_out[:3] == [
        "data-00000.parquet row 4: the image is empty",
        "data-00000.parquet row 5: the image is none of JPEG, PNG, WEBP, BMP, GIF, TIFF",
        "data-00000.parquet row 6: the caption is empty",
    ]
    assert left_out[3].startswith("data-00001.parquet row 4")
    assert (tmp_path / "out" / found[0]["image"]).read_bytes() == jpeg(int(found[0]["product_id"]) * 2)


def test_parquet_with_file_names_or_with_several_images_a_row(tmp_path):
    draw(tmp_path / "a.jpg"), draw(tmp_path / "b.jpg")
    table = {"image": [{"bytes": None, "path": "a.jpg"}, {"bytes": None, "path": "b.jpg"}], "caption": ["red", "blue"]}
    parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    found, _ = convert(tmp_path, "--parquet", tmp_path / "a.parquet", *SIMPLE)
    assert [record["image"] for record in found] == ["a.jpg", "b.jpg"]
    views = [[{"bytes": jpeg(number), "path": None} for number in (1, 2)]]
    table = {"image": views, "caption": ["red"], "id": [7.0]}
    parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    (tmp_path / "out/train.jsonl").unlink()
    data.main(
        [
            "convert",
            "--parquet",
            str(tmp_path / "a.parquet"),
            *SIMPLE,
            "--product",
            "{id}",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    assert [record["product_id"] for record in records(tmp_path / "out")] == ["7", "7"]


def test_json_lists_lines_and_lists_of_images(tmp_path):
    for number in range(4):
        draw(tmp_path / f"{number}.jpg", number)
    items = [{"image": ["0.jpg", "1.jpg", "9.jpg"], "caption": "Robe d'été", "id": 1}]
    items += [
        {"image": "2.jpg", "caption": " two\n lines ", "id": 2, "more": True},
        {"image": "3.jpg", "caption": None},
    ]
    for text in (json.dumps(items), "\n".join(map(json.dumps, items)), "\ufeff" + json.dumps(items, indent=1)):
        (tmp_path / "a.json").write_text(text, encoding="utf-8")
        found, _ = convert(tmp_path, "--json", tmp_path / "a.json", *SIMPLE, "--product", "{id}")
        assert found == [
            {"image": "0.jpg", "caption": "Robe d'été", "product_id": "1"},
            {"image": "1.jpg", "caption": "Robe d'été", "product_id": "1"},
            {"image": "2.jpg", "caption": "two lines", "product_id": "2"},
        ]
        left_out = (tmp_path / "out/left_out.txt").read_text()
        assert ": image 9.jpg is missing\n" in left_out and " 3: the caption is empty\n" in left_out
        (tmp_path / "out/train.jsonl").unlink()


CAPTIONS = ["Robe d'été", "«Spaß»", 'The "best" coat', "a; b, c\td | e", "two\nlines"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_separators_encodings_and_ends_of_lines(tmp_path, encoding, separator, end, capsys):
    draw(tmp_path / "1.jpg")
    table = io.StringIO()
    writer = csv.writer(table, delimiter=separator, lineterminator=end)
    writer.writerow(["image", "notes, and more", " caption "])
    writer.writerows(["1.jpg", "", caption] for caption in CAPTIONS)
    (tmp_path / "a.csv").write_bytes((table.getvalue() + end).encode(encoding))
    found, _ = convert(tmp_path, "--csv", tmp_path / "a.csv", *SIMPLE)
    assert [record["caption"] for record in found] == [" ".join(caption.split()) for caption in CAPTIONS]
    assert ("read as latin-1" in capsys.readouterr().out) == (encoding == "latin-1")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'image,caption\n1.jpg,"red\n1.jpg,blue\n',
            "a.csv line 2: the row ends in line 3 (unexpected end of data); close the quote",
        ),
        (b'image,caption\n1.jpg,"red\n1.jpg,12" shoe\n', "a.csv line 2: the row ends in line 3"),
        (b"image,caption\n1.jpg,\xe9t\xc3\xa9\n", "a.csv line 2: not UTF-8 text"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a.csv: a Git LFS pointer"),
        (b"image,caption\n1.jpg,\x81\xe9\n", "a.csv line 2: not UTF-8 text"),
        (b"PK\x03\x04\x14\0\x08\xff\n", "a.csv line 1: not UTF-8 text"),
        (b"", "a.csv: no usable row (it has none); check the file"),
        (b"image,caption\n", "a.csv: no usable row (it has none); check the file"),
        (
            b"image,Caption,x\n1.jpg,red,\n",
            "a.csv line 2: there is no column caption; the columns are image, Caption, x",
        ),
        (b"image,caption\nhttps://a.b/1.jpg,red\n", "https://a.b/1.jpg is a web address; download the images"),
        (b"image,caption\n2.jpg,red\n", "a.csv: no usable row (line 2: image 2.jpg is missing"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_in_one_line(tmp_path, content, message):
    draw(tmp_path / "1.jpg")
    (tmp_path / "a.csv").write_bytes(content)
    assert message in refused("--csv", tmp_path / "a.csv", *SIMPLE, "--out", tmp_path / "out")
    assert not (tmp_path / "out/train.jsonl").exists()


def test_values_without_a_visible_letter_are_empty(tmp_path):
    draw(tmp_path / "1.jpg")
    rows = "1.jpg,A1,<p>Red &amp; blue</p>\n1.jpg,A2,<br>&nbsp;\n1.jpg,-,x\n1.jpg,A3,green\n"
    (tmp_path / "a.csv").write_text("image,id,caption\n" + rows)
    found, _ = convert(tmp_path, "--csv", tmp_path / "a.csv", *SIMPLE, "--product", "{id:~A(.)}")
    assert found == [
        {"image": "1.jpg", "caption": "Red & blue", "product_id": "1"},
        {"image": "1.jpg", "caption": "green", "product_id": "3"},
    ]
    left_out = (tmp_path / "out/left_out.txt").read_text()
    assert left_out == "line 3: the caption is empty\nline 4: the product is empty\n"


def test_a_row_with_a_misplaced_quote_is_left_out(tmp_path):
    draw(tmp_path / "1.jpg")
    (tmp_path / "a.tsv").write_text('image\tcaption\n1.jpg\t"Vintage" dress\n1.jpg\t12" boots\n1.jpg\tred\n')
    found, _ = convert(tmp_path, "--csv", tmp_path / "a.tsv", *SIMPLE)
    assert [record["caption"] for record in found] == ['12" boots', "red"]
    assert (tmp_path / "out/left_out.txt").read_text().startswith("line 2: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1, 2]", "a.json item 1: expected a JSON object"),
        (b"[{", "a.json: not JSON"),
        (b'{"image": "1.jpg"}\n{', "a.json line 2: not JSON"),
        (
            b'[{"image": "1.jpg", "caption": {"en": "red"}}]',
            "column caption holds bytes or an object where text is expected",
        ),
    ],
)
def test_json_that_cannot_be_used_is_refused_in_one_line(tmp_path, content, message):
    draw(tmp_path / "1.jpg")
    (tmp_path / "a.json").write_bytes(content)
    assert message in refused("--json", tmp_path / "a.json", *SIMPLE, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--caption", "name"], "template name: names no column; write a column in braces, such as {name}"),
        (
            ["--caption", "{caption} {x"],
            "template {caption} {x: expected '}' before end of string; write a column in braces",
        ),
        (["--product", "{image:~(}"], "template {image:~(}: missing ), unterminated subpattern"),
        (["--product", "{image:.x}"], "template {image:.x}: Format specifier missing precision"),
    ],
)
def test_flags_that_cannot_be_used_are_refused_in_one_line(tmp_path, flags, message):
    draw(tmp_path / "1.jpg")
    (tmp_path / "a.csv").write_text("image,caption\n1.jpg,red\n")
    assert message in refused("--csv", tmp_path / "a.csv", *SIMPLE, *flags, "--out", tmp_path / "out")
    assert not (tmp_path / "out/train.jsonl").exists()


def test_what_is_missing_is_one_line(tmp_path, monkeypatch, capsys):
    assert "nowhere.csv: No such file" in refused("--csv", tmp_path / "nowhere.csv", *SIMPLE)
    file = tmp_path / "a.parquet"
    assert "a.parquet: cannot be read (No such file or directory)" in refused("--parquet", file, *SIMPLE)
    file.write_text("PAR1")
    assert "a.parquet: not a whole Parquet file" in refused("--parquet", file, *SIMPLE)
    file.write_text("version https://git-lfs.github.com/spec/v1")
    assert "a.parquet: a Git LFS pointer" in refused("--parquet", file, *SIMPLE)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "--parquet needs the package pyarrow" in refused("--parquet", tmp_path / "a.parquet", *SIMPLE)
    for flags, message in ((["--csv", "x", "--imge", "{x}"], "did you mean --image?"), ([], "one of the arguments")):
        with pytest.raises(SystemExit):
            data.main(["convert", *flags, *SIMPLE])
        assert message in capsys.readouterr().err


def test_no_file_is_ever_overwritten(tmp_path):
    (tmp_path / "a.csv").write_text("image,caption\n1.jpg,red\n")
    draw(tmp_path / "1.jpg", 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/1.jpg").write_bytes(b"somebody's")
    message = refused("--csv", tmp_path / "a.csv", *SIMPLE, "--out", tmp_path / "out")
    assert "out/1.jpg: exists already and is not" in message
    assert (tmp_path / "out/1.jpg").read_bytes() == b"somebody's"
    (tmp_path / "out/1.jpg").write_bytes((tmp_path / "1.jpg").read_bytes())  # a conversion that was stopped
    data.main(["convert", "--csv", str(tmp_path / "a.csv"), *SIMPLE, "--out", str(tmp_path / "out")])
    assert len(records(tmp_path / "out")) == 1
