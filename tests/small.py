"""Small runs and files that several tests share."""

import importlib
import json
import re
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image

import data
import train
from engine.checkpoints import load_checkpoint
from engine.config import parse_config
from engine.run import build_run
from readers.fashiongen import FILES
from readers.synthetic import Synthetic

PUBLISHED = {"dress": (2017, 3817, 2628), "shirt": (2038, 6346, 3089), "toptee": (1961, 5373, 2902)}


def write_fashioniq(folder, split, sizes, draw_image=None):
    """Write files in FashionIQ's layout.

    sizes: subset -> numbers of pairs, of images of the split, of images that occur in pairs
    draw_image: makes the image of a number; without it image files are empty
    """
    for name in ("captions", "image_splits", "images"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for subset, (pair_count, split_size, union) in sizes.items():
        ids = [f"{subset}{i:05}" for i in range(split_size)]
        pairs = [{"candidate": ids[(2 * i + 1) % union], "target": ids[(2 * i) % union]} for i in range(pair_count)]
        for i, pair in enumerate(pairs):
            pair["captions"] = [f"is colour {i % 7} ", "has sleeves"]
        if split == "test":
            pairs = [{k: v for k, v in pair.items() if k != "target"} for pair in pairs]
        (folder / "captions" / f"cap.{subset}.{split}.json").write_text(json.dumps(pairs))
        (folder / "image_splits" / f"split.{subset}.{split}.json").write_text(json.dumps(ids))
        for number, name in enumerate(ids):
            path = folder / "images" / f"{name}.{'jpg' if number % 2 else 'png'}"
            if draw_image:
                draw_image(number).save(path)
            else:
                path.touch()


def export_fashiongen(folder, train_products, image_size=32):
    """Write synthetic products in FashionGen's HDF5 layout, at least 8 of them for validation."""
    folder.mkdir(exist_ok=True)
    for split, products in (("train", train_products), ("val", max(8, train_products // 10))):
        dataset = Synthetic(split, products, image_size, progress=False)
        texts = {
            "category": dataset.categories,
            "subcategory": dataset.subcategories,
            "description": dataset.captions,
            "gender": [["Men", "Women"][i % 2] for i in dataset.product_ids],
            "season": ["SS2018"] * len(dataset),
        }
        with h5py.File(folder / FILES[split], "w") as file:
            images = np.stack([np.asarray(image) for image in dataset.images])
            file.create_dataset("input_image", data=images, chunks=(1, *images.shape[1:]))
            first_id = 0 if split == "train" else 1_000_000  # no id is in both files
            file["input_productID"] = first_id + dataset.product_ids.astype(np.int32)[:, None]
            for key, values in texts.items():
                file[f"input_{key}"] = np.array([text.encode("iso-8859-1") for text in values])[:, None]


def write_snlive(folder, lines, images, split="dev"):
    """Write files in SNLI-VE's layout. lines: (image, statement, label) · images: names of those that are there"""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name in images:
        Image.new("RGB", (32, 24), (int(name) * 20 % 256, 90, 90)).save(folder / "images" / f"{name}.jpg")
    records = [
        {"Flickr30K_ID": image, "sentence2": text, "gold_label": label, "pairID": "x"} for image, text, label in lines
    ]
    (folder / f"snli_ve_{split}.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")


def write_karpathy(folder, name, images):
    """Write files in the layout of Karpathy's splits. images: (split, filepath or None, captions)"""
    records = []
    for number, (split, filepath, captions) in enumerate(images):
        path = folder / (filepath or "images") / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 24), (number * 37 % 256, number * 91 % 256, 60)).save(path)
        record = {"filename": path.name, "split": split, "imgid": number, "sentences": [{"raw": c} for c in captions]}
        if filepath:
            record["filepath"] = filepath
        records.append(record)
    (folder / f"dataset_{name}.json").write_text(json.dumps({"images": records, "dataset": name}))


def write_jsonl(folder, **splits):
    """Write the records of each split, and an image in a colour of its own for every record whose image is missing."""
    folder.mkdir(exist_ok=True)
    for split, records in splits.items():
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, records)))
        for number, record in enumerate(records):
            colour = number * 20 % 256, 255 - number * 9 % 256, number * 37 % 256
            if not (folder / record["image"]).exists():
                Image.new("RGB", (32, 40), colour).save(folder / record["image"])


SIZES = "--image-size 32 --width 32 --heads 2 --vision-layers 2 --text-layers 1 --fusion-layers 1 --vocab-size 300"
SCHEDULE = "--batch-size 8 --val-products 10 --warmup 2 --itm-hard-warmup 2 --dropout 0.1 --precision fp32"
OF_FILES = [*SIZES.split(), *SCHEDULE.split()]
FAST = [*OF_FILES, "--num-products", "12"]
# soft masks read the gradient in a layer before the last
FAST_FOR = {"softmask": ["--fusion-layers", "2"], "syncmask": [], "fashionfine": [], "albef": []}


def built(*flags, products=8):
    """Build a small run before its first step. flags: strings of one or several flags -> run, data set"""
    config, _ = parse_config([*FAST, *" ".join(flags).split()])
    dataset = Synthetic("train", products, 32, progress=False)
    dataset.prompts = config.prompts
    tokenizer = data.build_tokenizer(dataset.captions, 300, config.model.max_length, prompts=config.prompts)
    return build_run(config, dataset, tokenizer), dataset


def batch_of(state, dataset, rows):
    return state.collate([dataset[row] for row in rows])


def run(out, *flags, stop_at=None):
    config, given = parse_config([*FAST, "--out", str(out), *flags])
    return train.train(config, given, stop_at)


def run_files(out, folder, *flags, stop_at=None):
    """Train a small run on the images of a folder."""
    config, given = parse_config([*OF_FILES, "--data", "jsonl", "--root", str(folder), "--out", str(out), *flags])
    return train.train(config, given, stop_at)


def resume(out, *flags, stop_at=None):
    config, given = parse_config(["--resume", "--out", str(out), *flags])
    return train.train(config, given, stop_at)


def checkpoint(out):
    return load_checkpoint(Path(out) / "last.pt")


def lines(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def same_state(a, b):
    """Assert that two checkpoints are equal."""
    for part in ("model", "momentum"):
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part] | b[part]), part
    assert all(map(torch.equal, a["queue"], b["queue"]))
    for moments_a, moments_b in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(moments_a[name], moments_b[name]) for name in moments_a)
    assert str(a["sampler"]) == str(b["sampler"]) and a["step"] == b["step"]


ROOT = Path(__file__).parent.parent


def unresolved(page):
    """Find the `file.py:name` and `file.py:Class.name` in a page's text that are not in the code.

    -> these names, the number of all names
    """
    references = re.findall(r"`([\w/]+)\.py:([\w.]+)`", page)
    missing = []
    for file, path in references:
        owner = importlib.import_module(file.replace("/", "."))
        for name in path.split("."):
            if not hasattr(owner, name) and name not in getattr(owner, "__dataclass_fields__", {}):
                missing.append(f"{file}.py:{path}")
                break
            owner = getattr(owner, name, None)
    return missing, len(references)
