"""Statements about photos, and photos with several captions: the truth of the drawn ones, and files as distributed."""

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from small import write_karpathy, write_snlive

import data
from engine.batches import distinct_image_rows, texts_to_search
from evaluation.scores import full_rankings, recalls_of
from readers.dataset import DataError
from readers.statements import LABELS, synthetic_statements
from readers.synthetic import Synthetic
from readers.wardrobe import COLOURS, Detail


@pytest.fixture(scope="module")
def photos():
    return Synthetic("train", 60, 64, progress=False)


@pytest.fixture(scope="module")
def statements():
    return synthetic_statements("train", 60, 64)


def claimed(words):
    """The key of a clause and its value."""
    said = words.split()
    match said:
        case ["is", value]:
            return ("colour", value) if value in COLOURS else ("sleeve", value)
        case ["has", look, noun, "at", place]:
            return place, Detail(look, noun)
        case ["has", value, noun]:
            return {"pattern": "pattern", "sleeves": "sleeve", "neckline": "neck", "front": "closure"}[noun], value


def test_labels_are_what_the_photos_show(statements, photos):
    for row in range(len(statements)):
        photo, label = statements.source[row], statements.categories[row]
        product, shown = photos.products[photos.rows[photo][0]], photos.regions[photo]
        verdicts = []
        for words in statements.captions[row].split(" and "):
            key, value = claimed(words)
            true = product.attributes().get(key) == value
            if key in shown:
                verdicts.append("entailment" if true else "contradiction")
            elif true:
                verdicts.append("neutral")
            else:  # nothing is there; it tells only where what is claimed would be seen
                details = product.details | {key: value} if isinstance(value, Detail) else product.details
                parts = {key: value} if key in ("neck", "closure", "sleeve") else {}
                other = replace(product, details=details, **parts)
                verdicts.append("contradiction" if key in photos.would_show(other, photo) else "neutral")
        worst = max(verdicts, key=LABELS.index)
        assert worst == label, (statements.captions[row], photos.rows[photo], verdicts)
        assert verdicts.count("contradiction") == (label == "contradiction")


def test_neither_photo_nor_statement_alone_tells(statements):
    by_photo, by_kind, by_words = defaultdict(Counter), defaultdict(Counter), defaultdict(Counter)
    for row, label in enumerate(statements.categories):
        by_photo[statements.source[row]][label] += 1
        by_kind[statements.subcategories[row]][label] += 1
    for counts in (*by_photo.values(), *by_kind.values()):
        assert len(set(counts.values())) == 1 and set(counts) == set(LABELS)
    assert {"colour", "look", "noun", "place"} <= by_kind.keys()
    held_out = synthetic_statements("val", 90, 64)
    more = synthetic_statements("train", 300, 64)
    for row, label in enumerate(more.categories):
        for words in more.captions[row].split(" and "):
            by_words[words][label] += 1
    told = []
    for row, label in enumerate(held_out.categories):  # naive Bayes over clauses
        scores = [sum(np.log(1 + by_words[w][a]) for w in held_out.captions[row].split(" and ")) for a in LABELS]
        told.append(LABELS[int(np.argmax(scores))] == label)
    assert np.mean(told) < 0.42  # chance 0.33


def test_statements_are_deterministic(statements, photos):
    again = synthetic_statements("train", 60, 64)
    assert again.captions == statements.captions and again.categories == statements.categories
    assert torch.equal(statements[7]["image"], photos[statements.source[7]]["image"])


def test_snlive_counts_what_it_leaves_out(tmp_path):
    lines = [("1", "A dog runs.", "entailment"), ("1", "A cat.", "contradiction"), ("2", "It is hot.", "neutral")]
    lines += [("2", "Nobody agreed.", "-"), ("3", "Gone.", "neutral"), ("3", "Also.", "neutral")]
    write_snlive(tmp_path, lines, "12")
    found = data.build_statements("snlive", tmp_path, "val", 32)
    assert found.categories == ["entailment", "contradiction", "neutral"] and found.product_ids.tolist() == [0, 0, 1]
    assert found.problems == ["no photo 3.jpg"]
    assert found.report().startswith("3 statements of 2 photos, 1 left out (no photo 3.jpg)")
    for count in ("2 of photos that are not there", "1 without a gold label"):
        assert count in found.report()
    assert found[2]["image"].shape == (3, 32, 32) and found[2]["text"] == ("", "It is hot.")


def test_karpathy_splits_have_several_captions_a_photo(tmp_path):
    images = [("train", "train2014", ["a", "b"]), ("restval", "val2014", ["c"]), ("val", "val2014", ["d", "e", " "])]
    images += [("test", "val2014", ["f"] * 5), ("train", "train2014", ["g"])]
    write_karpathy(tmp_path, "coco", images)
    (tmp_path / "train2014" / "4.jpg").unlink()
    train, val, test = (data.build_dataset("coco", tmp_path, split, 32) for split in ("train", "val", "test"))
    assert train.captions == ["a", "b", "c"] and train.product_ids.tolist() == [0, 0, 1]
    assert train.report() == "3 captions of 2 photos, 1 left out (no photo train2014/4.jpg)"
    assert val.report() == "2 captions of 1 photos" and len(test) == 5
    assert distinct_image_rows(train).tolist() == [0, 2]
    assert distinct_image_rows(train.subset(np.array([1, 2]))).tolist() == [0, 1]
    texts, of_photo, of_text = texts_to_search(train, np.array([2]))
    assert texts == [("", "c")] and of_photo.tolist() == of_text.tolist() == [0]


PHOTO = '{"images": [{"split": "val", "filename": "x.jpg", "sentences": []}]}'
STATEMENT = '{"Flickr30K_ID": "3", "sentence2": "x", "gold_label": "neutral"}'


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("snli_ve_dev.jsonl", "{", "snli_ve_dev.jsonl line 1: not JSON"),
        ("snli_ve_dev.jsonl", '{"Flickr30K_ID": 3}', "line 1: expected Flickr30K_ID, sentence2 and gold_label"),
        ("snli_ve_dev.jsonl", STATEMENT, "no usable statement of the val split; no photo 3.jpg"),
        ("dataset_coco.json", "[]", "dataset_coco.json: expected images with filename, split"),
        ("dataset_coco.json", PHOTO, "no usable photo of the val split; no photo images/x.jpg"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, name, content, complaint):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=complaint) as error:
        if name.startswith("snli"):
            data.build_statements("snlive", tmp_path, "val", 32)
        else:
            data.build_dataset("coco", tmp_path, "val", 32)
    assert "\n" not in str(error.value)


def test_recall_with_several_captions_agrees_with_a_slow_definition():
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(n, 6, generator=generator), dim=1) for n in (20, 70))
    of_text = torch.cat([torch.arange(20), torch.randint(0, 20, (50,), generator=generator)])
    texts[60:] = texts[50:60]  # captions that read alike tie, also across photos
    figures = recalls_of([*full_rankings(images, texts, torch.arange(20), of_text)])
    sim = images @ texts.T
    for k in (1, 5, 10):
        i2t, t2i = [], []
        for photo in range(20):
            best = max(sim[photo, t] for t in range(70) if of_text[t] == photo)
            i2t.append(sum(sim[photo, t] >= best for t in range(70) if of_text[t] != photo) < k)
        for t in range(70):
            t2i.append(sum(sim[p, t] >= sim[of_text[t], t] for p in range(20) if p != of_text[t]) < k)
        assert figures[f"full_i2t_r{k}"] == pytest.approx(np.mean(i2t))
        assert figures[f"full_t2i_r{k}"] == pytest.approx(np.mean(t2i))
