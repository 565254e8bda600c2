"""Search: the most similar images for words, for an image, or for an image that words change."""

import hashlib
import re
import unicodedata
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from data import normalise, to_device, tokenize
from engine.batches import (
    compose_queries,
    distinct_image_rows,
    image_features,
    score_pairs_with_itm,
    text_features,
)
from engine.checkpoints import load_weights, read_tokenizer, write_atomically
from engine.finetune_config import SEARCH_RESULTS, FinetuneConfig, caption_prefix, open_data
from engine.flags import ConfigError
from engine.run import Run, autocast, build_run
from evaluation.pictures import ExampleQuery, RetrievedImage, draw_retrieved
from readers.dataset import DataError, PairDataset, pad_to_square, printable
from readers.files import explain_failure, open_image


def search(config: FinetuneConfig, source: dict) -> list[tuple[int, float]]:
    """Find the most similar images for a query, print them and draw them on a sheet.

    source: parts of the checkpoint
    -> row and score of each image, the best first; a cosine, or with --rerank the ITM head's probability of a match
    Raises DataError for a query, or data, that cannot be read.
    Raises ConfigError for weights, or an index, that do not fit.
    """
    tokenizer = read_tokenizer(source)
    query_image = open_query_image(config)
    if config.query:
        check_query_words(tokenizer, config.query)
    dataset = open_data(config, config.split)
    print(f"{config.split}: {dataset.report()}")
    if dataset.several_captions:
        dataset = dataset.subset(distinct_image_rows(dataset))
    run = build_run(config, dataset, tokenizer)
    load_weights(run, source, config.checkpoint)
    run.model.eval()

    rows, image_feat = search_index(run, dataset)
    is_fused = config.checkpoint_task == "tgir"
    query_feat = query_feature(run, caption_prefix(config), config.query, query_image, is_fused)
    count = min(len(rows), max(SEARCH_RESULTS, config.rerank))
    scores, best = (image_feat @ query_feat).topk(count)
    if config.rerank:
        captions = [(caption_prefix(config), config.query)]
        pairs = torch.stack([best.cpu(), torch.zeros(len(best), dtype=torch.long)], dim=1)
        logits, order = score_pairs_with_itm(run, dataset.subset(rows), captions, pairs).sort(descending=True)
        scores, best = logits.sigmoid(), best[order]

    results = []
    for index, score in zip(best[:SEARCH_RESULTS].tolist(), scores[:SEARCH_RESULTS].tolist(), strict=True):
        row = int(rows[index])
        results.append((row, score))
        print(f"  {score:.3f}  {printable(dataset.name_of(row))}  {dataset.captions[row]}")
    print(f"see {draw_results(config, dataset, query_image, results)}")
    return results


def draw_results(
    config: FinetuneConfig,
    dataset: PairDataset,
    query_image: Image.Image | None,
    results: list[tuple[int, float]],
) -> Path:
    """Draw the results of a search in two lines. -> the file, named after the query

    results: row and score of each image
    """
    title = f"found {config.query or ''} {Path(config.image or '').stem}".lower()
    name = "-".join(re.findall(r"\w+", title))[:60]
    path = Path(config.out) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    retrieved = [RetrievedImage(row, f"{score:.2f}", is_positive=False) for row, score in results]
    first_line = ExampleQuery(config.query or "", query_image, retrieved[:5])
    second_line = ExampleQuery("", None, retrieved[5:])
    draw_retrieved(dataset, [first_line, second_line], path)
    return path


def open_query_image(config: FinetuneConfig) -> Image.Image | None:
    """Open --image, padded to a square of the model's image size. -> None without --image

    Raises DataError where it cannot be read.
    """
    if not config.image:
        return None
    size = config.model.image_size
    try:
        return pad_to_square(open_image(Path(config.image), size), size)
    except OSError as error:
        raise DataError(f"--image {config.image}: {error}") from None


def check_query_words(tokenizer: Tokenizer, query: str) -> None:
    """Print the words of a query that the vocabulary does not have.

    Words are as the tokenizer splits them: each ideograph is one.
    Raises DataError where the query is not UTF-8, or the vocabulary has none of the words.
    """
    if any(unicodedata.category(letter) == "Cs" for letter in query):  # what Python makes of undecodable bytes
        raise DataError(f"--query {query!r}: not UTF-8 text; let your terminal send UTF-8")
    words = {}  # -> whether the vocabulary has it
    for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(query)):
        categories = {unicodedata.category(letter) for letter in word}
        if all(category[0] in "PZ" or category in ("Sc", "Sk", "Sm") for category in categories):
            continue  # punctuation
        encoding = tokenizer.encode(word, add_special_tokens=False)
        pieces = sum(encoding.attention_mask)  # without padding
        is_spelt = pieces == len(word) > 1  # a piece for each letter
        words[word] = not is_spelt and "[UNK]" not in encoding.tokens
    unknown = [word for word, is_known in words.items() if not is_known]
    if len(unknown) == len(words):
        raise DataError(f"--query {query!r}: no word of it is in the model's vocabulary; use words of the captions")
    if unknown:
        print(f"not in the vocabulary, so encoded letter by letter: {', '.join(unknown)}")


@torch.no_grad()
def query_feature(run: Run, prefix: str, words: str | None, image: Image.Image | None, fused: bool) -> Tensor:
    """Encode words, an image, or both to a unit-length feature (E,).

    prefix: words before a caption
    words, image: at least one of them
    fused: how words and image become one query, see `compose_queries`
    """
    if image is None:
        return text_features(run, [(prefix, words)])[0]
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(run.device)  # (1, 3, S, S)
    with autocast(run):
        image_embeds = run.model.vision(normalise(pixels))
        if not words:
            return run.model.image_feature(image_embeds)[0]
        batch = to_device(tokenize(run.tokenizer, [(prefix, words)]), run.device)
        return compose_queries(run, batch, image_embeds, fused)[0]


def search_index(run: Run, dataset: PairDataset) -> tuple[np.ndarray, Tensor]:
    """Read the features of all images from --index, or encode the images and write them there.

    -> rows of the images that can be read (n,), features (n, E)
    Raises ConfigError for an index that is damaged, or does not belong to this checkpoint and data set.
    Raises DataError where no image can be read, and OSError where the index cannot be written.
    """
    if not run.config.index:
        return image_features(run, dataset)
    path = Path(run.config.index)
    checkpoint = Path(run.config.checkpoint)
    weights = checkpoint / "model.safetensors" if checkpoint.is_dir() else checkpoint
    with open(weights, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    names = [dataset.name_of(row) for row in range(len(dataset))]
    key = [digest, names, dataset.captions]
    if not path.exists():
        rows, image_feat = image_features(run, dataset)
        write_atomically({"key": key, "rows": torch.from_numpy(rows), "features": image_feat.cpu()}, path)
        return rows, image_feat
    try:
        saved = torch.load(path, map_location=run.device, weights_only=True)
        fits = saved["key"] == key
    except Exception as error:  # torch raises many kinds of errors for other files
        damage = "damaged, or not an index; delete it, and it is written anew"
        raise ConfigError(f"--index {path}: {explain_failure(path, error, damage)}") from None
    if not fits:
        raise ConfigError(f"--index {path}: of another checkpoint or data set; delete it, or give another file")
    return saved["rows"].cpu().numpy(), saved["features"]
