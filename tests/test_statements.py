"""Statements about images, and images with several captions: synthetic statements, and files as distributed."""

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from small import write_karpathy, write_snlive

import data
from engine.batches import distinct_image_rows, retrieval_captions
from evaluation.scores import full_rankings, recalls_of
from readers.dataset import DataError
from readers.statements import LABELS, synthetic_statements
from readers.synthetic import Synthetic
from readers.wardrobe import COLOURS, Detail


@pytest.fixture(scope="module")
def images():
    return Synthetic("train", 60, 64, progress=False)


@pytest.fixture(scope="module")
def statements():
    return synthetic_statements("train", 60, 64)


def parse_clause(clause):
    """Return the key of a clause and its value."""
    match clause.split():
        case ["is", value]:
            return ("colour", value) if value in COLOURS else ("sleeve", value)
        case ["has", look, noun, "at", place]:
            return place, Detail(look, noun)
        case ["has", value, noun]:
            return {"pattern": "pattern", "sleeves": "sleeve", "neckline": "neck", "front": "closure"}[noun], value


def test_labels_are_what_the_images_show(statements, images):
    for row in range(len(statements)):
        image, label = statements.image_index[row], statements.categories[row]
        product, regions = images.product(image), images.regions[image]
        clause_labels = []
        for clause in statements.captions[row].split(" and "):
            key, value = parse_clause(clause)
            true = product.attributes().get(key) == value
            if key in regions:
                clause_labels.append("entailment" if true else "contradiction")
            elif true:
                clause_labels.append("neutral")
            else:  # nothing is there, which is a contradiction where the claimed value would be visible
                details = product.details | {key: value} if isinstance(value, Detail) else product.details
                parts = {key: value} if key in ("neck", "closure", "sleeve") else {}
                other = replace(product, details=details, **parts)
                clause_labels.append("contradiction" if key in images.visible_attributes(other, image) else "neutral")
        worst = max(clause_labels, key=LABELS.index)
        assert worst == label, (statements.captions[row], images.views[image], clause_labels)
        assert clause_labels.count("contradiction") == (label == "contradiction")


def test_neither_image_nor_statement_alone_predicts_the_label(statements):
    by_image, by_kind, by_clause = defaultdict(Counter), defaultdict(Counter), defaultdict(Counter)
    for row, label in enumerate(statements.categories):
        by_image[statements.image_index[row]][label] += 1
        by_kind[statements.subcategories[row]][label] += 1
    for counts in (*by_image.values(), *by_kind.values()):
        assert len(set(counts.values())) == 1 and set(counts) == set(LABELS)
    assert {"colour", "look", "noun", "place"} <= by_kind.keys()
    held_out = synthetic_statements("val", 90, 64)
    more = synthetic_statements("train", 300, 64)
    for row, label in enumerate(more.categories):
        for clause in more.captions[row].split(" and "):
            by_clause[clause][label] += 1
    hits = []
    for row, label in enumerate(held_out.categories):  # naive Bayes over clauses
        clauses = held_out.captions[row].split(" and ")
        scores = [sum(np.log(1 + by_clause[clause][name]) for clause in clauses) for name in LABELS]
        hits.append(LABELS[int(np.argmax(scores))] == label)
    assert np.mean(hits) < 0.42  # chance 0.33


def test_statements_are_deterministic(statements, images):
    again = synthetic_statements("train", 60, 64)
    assert again.captions == statements.captions and again.categories == statements.categories
    assert torch.equal(statements[7]["image"], images[statements.image_index[7]]["image"])


def test_snlive_counts_what_is_left_out(tmp_path):
    lines = [("1", "A dog runs.", "entailment"), ("1", "A cat.", "contradiction"), ("2", "It is hot.", "neutral")]
    lines += [("2", "Nobody agreed.", "-"), ("3", "Gone.", "neutral"), ("3", "Also.", "neutral")]
    write_snlive(tmp_path, lines, "12")
    opened = data.build_statements("snlive", tmp_path, "val", 32)
    assert opened.categories == ["entailment", "contradiction", "neutral"] and opened.product_ids.tolist() == [0, 0, 1]
    assert opened.problems == ["image 3.jpg is missing"]
    assert opened.report().startswith("3 statements of 2 images, 1 left out (image 3.jpg is missing)")
    for count in ("statements without their image: 2", "statements without a gold label: 1"):
        assert count in opened.report()
    assert opened[2]["image"].shape == (3, 32, 32) and opened[2]["text"] == ("", "It is hot.")


def test_karpathy_splits_have_several_captions_an_image(tmp_path):
    images = [("train", "train2014", ["a", "b"]), ("restval", "val2014", ["c"]), ("val", "val2014", ["d", "e", " "])]
    images += [("test", "val2014", ["f"] * 5), ("train", "train2014", ["g"])]
    write_karpathy(tmp_path, "coco", images)
    (tmp_path / "train2014" / "4.jpg").unlink()
    train, val, test = (data.build_dataset("coco", tmp_path, split, 32) for split in ("train", "val", "test"))
    assert train.captions == ["a", "b", "c"] and train.product_ids.tolist() == [0, 0, 1]
    assert train.report() == "3 captions of 2 images, 1 left out (image train2014/4.jpg is missing)"
    assert val.report() == "2 captions of 1 images, empty captions: 1" and len(test) == 5
    assert distinct_image_rows(train).tolist() == [0, 2]
    assert distinct_image_rows(train.subset(np.array([1, 2]))).tolist() == [0, 1]
    captions, image_products, caption_products = retrieval_captions(train, np.array([2]))
    assert captions == [("", "c")] and image_products.tolist() == caption_products.tolist() == [0]


IMAGE = '{"images": [{"split": "val", "filename": "x.jpg", "sentences": []}]}'
STATEMENT = '{"Flickr30K_ID": "3", "sentence2": "x", "gold_label": "neutral"}'


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("snli_ve_dev.jsonl", "{", "snli_ve_dev.jsonl line 1: not JSON"),
        ("snli_ve_dev.jsonl", '{"Flickr30K_ID": 3}', "line 1: expected Flickr30K_ID, sentence2 and gold_label"),
        ("snli_ve_dev.jsonl", STATEMENT, "no usable statement of the val split; image 3.jpg is missing"),
        ("dataset_coco.json", "[]", "dataset_coco.json: expected images with filename, split"),
        ("dataset_coco.json", IMAGE, "no usable image of the val split; image images/x.jpg is missing"),
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
    image_of = torch.cat([torch.arange(20), torch.randint(0, 20, (50,), generator=generator)])
    texts[60:] = texts[50:60]  # equal captions tie, also across images
    metrics = recalls_of([*full_rankings(images, texts, torch.arange(20), image_of)])
    sim = images @ texts.T
    for k in (1, 5, 10):
        i2t, t2i = [], []
        for image in range(20):
            best = max(sim[image, t] for t in range(70) if image_of[t] == image)
            i2t.append(sum(sim[image, t] >= best for t in range(70) if image_of[t] != image) < k)
        for t in range(70):
            t2i.append(sum(sim[p, t] >= sim[image_of[t], t] for p in range(20) if p != image_of[t]) < k)
        assert metrics[f"full_i2t_r{k}"] == pytest.approx(np.mean(i2t))
        assert metrics[f"full_t2i_r{k}"] == pytest.approx(np.mean(t2i))
