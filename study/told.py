"""Could it be read at all? The ViT of `tiny`, told what synthetic photos show: the first thing to ask of a data set.

python study/told.py                  as many steps as the default run, with its batch size and its schedule

In pretraining words are all there is to learn from. Here they are labels: for every attribute that a photo shows, of
details for every place, a linear head on CLS says which of its values it has. What is not read by then, masks will
hardly teach in that time.
"""

import argparse
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import augment, build_dataset, normalise, random_crops
from harness.config import TrainConfig, learning_rate, parse_config
from harness.flags import ConfigError, check_ranges
from harness.precision import fitting_precision
from harness.run import build_optimizer, check_memory
from model import VisionLanguageModel
from photos.synthetic import Synthetic
from photos.wardrobe import KINDS, Detail

Question = tuple[str, str]  # what is asked of a photo: a kind, and the attribute; they differ in details alone


def shown(dataset: Synthetic, row: int) -> dict[Question, str]:
    """What the photo of a row shows; of a detail, whose attribute is its place, the look and the noun."""
    facts, found = dataset.products[dataset.rows[row][0]].attributes(), {}
    for key in dataset.regions[row].keys() & facts.keys():
        value = facts[key]
        if isinstance(value, Detail):
            found |= {("look", key): value.look, ("noun", key): value.noun}
        else:
            found[key, key] = value
    return found


def labels(dataset: Synthetic, options: dict[Question, list[str]]) -> dict[Question, Tensor]:
    """For each question the number of its answer, of every photo (rows,); −100 where the photo does not show it."""
    answers = [shown(dataset, row) for row in range(len(dataset))]
    number = lambda question, said: options[question].index(said[question]) if question in said else -100
    return {question: torch.tensor([number(question, said) for said in answers]) for question in options}


def all_photos(dataset: Synthetic) -> Tensor:
    """All of them, uint8 (rows, 3, S, S)."""
    return torch.stack([torch.from_numpy(np.array(photo)).permute(2, 0, 1) for photo in dataset.photos])


def by_question(logits: Tensor, options: dict[Question, list[str]]) -> tuple[Tensor, ...]:
    """Logits of all questions, side by side, as those of each, in the order of `options`."""
    return logits.split([len(values) for values in options.values()], dim=1)


def train(config: TrainConfig, dataset: Synthetic, options: dict[Question, list[str]]) -> tuple[nn.Module, nn.Linear]:
    """The vision encoder, and one head for all questions, whose logits lie side by side."""
    vision = VisionLanguageModel(config.model).vision
    head = nn.Linear(config.model.width, sum(map(len, options.values())))
    optimizer = build_optimizer(nn.ModuleList([vision, head]), config)
    images, known = all_photos(dataset), labels(dataset, options)
    generator = torch.Generator().manual_seed(config.seed)
    for step in tqdm(range(config.steps), "telling", unit=" steps", disable=None):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config, config.steps)
        rows = torch.randint(len(images), (config.batch_size,), generator=generator)
        batch = augment(images[rows], random_crops(len(rows), config.crop_scale, generator), generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            cls = vision(batch)[:, 0].float()
        loss = sum(
            F.cross_entropy(scores, answers[rows], ignore_index=-100, reduction="sum")
            for scores, answers in zip(by_question(head(cls), options), known.values(), strict=True)
        ) / len(rows)  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*vision.parameters(), *head.parameters()], config.clip)
        optimizer.step()
    return vision.eval(), head


def read(
    logits: Tensor, known: dict[Question, Tensor], options: dict[Question, list[str]]
) -> dict[str, tuple[float, float, int]]:
    """By kind: the share rightly read, that of the answer which is most often right, how many were asked.

    logits (rows, options of all questions) · known: what `labels` gives; −100 is not asked."""
    sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(3, dtype=int))
    for (kind, attribute), scores in zip(options, by_question(logits, options), strict=True):
        answers = known[kind, attribute]
        if len(asked := answers[answers >= 0]):
            right = (scores[answers >= 0].argmax(dim=1) == asked).sum().item()
            sums[kind] += [right, asked.bincount().max().item(), len(asked)]
    return {kind: (right / asked, most / asked, asked) for kind in KINDS if kind in sums
            for right, most, asked in [sums[kind].tolist()]}  # fmt: skip


@torch.no_grad()
def answer(vision: nn.Module, head: nn.Linear, dataset: Synthetic) -> Tensor:
    """Logits of all photos, neither cropped nor flipped. -> (rows, options of all questions)"""
    return head(torch.cat([vision(normalise(part))[:, 0] for part in all_photos(dataset).split(128)]))


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("told.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    default = parse_config([])[0]
    for name, help in {"steps": "of training", "products": "to train on", "seed": "of everything random"}.items():
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name), help=help + " (default %(default)s)")
    given = vars(parser.parse_args(argv))
    config = replace(default, **given, device="cpu", precision=fitting_precision(torch.device("cpu"))[0])
    try:
        check_ranges(config)
        check_memory(config)
    except ConfigError as error:
        parser.error(str(error))
    torch.manual_seed(config.seed)
    where = config.model.image_size, config.seed, config.products
    train_set, val_set = (build_dataset(config.data, config.root, split, *where) for split in ("train", "val"))
    values: dict[Question, set[str]] = defaultdict(set)
    for dataset in (train_set, val_set):
        for row in range(len(dataset)):
            for question, value in shown(dataset, row).items():
                values[question].add(value)
    options = {question: sorted(values[question]) for question in sorted(values)}
    found = read(answer(*train(config, train_set, options), val_set), labels(val_set, options), options)
    print(
        f"told what {len(train_set):,} photos show for {config.steps} steps, asked about {len(val_set):,} held-out ones"
    )
    print("| | read % | most frequent % | asked |\n|---|---|---|---|")
    for kind, (right, most, asked) in found.items():
        print(f"| {kind} | {100 * right:.1f} | {100 * most:.1f} | {asked:,} |")


if __name__ == "__main__":
    main()
