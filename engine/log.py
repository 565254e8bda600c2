"""What a run writes down while it goes on, and how it is asked to stop.

metrics.jsonl: one JSON object a line. Every key, by the kind of line:

Training, every --log-every steps, of that step's batch
    step, epoch                 optimiser steps done; passes over the training photos
    loss, itc, itm, mlm, mim    the objective and its parts; itc and mim times their weights
    rtd, align                  parts of recipe fashionfine: replaced-token detection; category alignment (C-CmA)
    class                       the objective of recognition
    lr, temp, grad_norm         learning rate; contrastive temperature; gradient norm before clipping
    itm_accuracy, mlm_accuracy  pairs rightly told to match or not; masked words restored
    accuracy                    recognition: right labels; tgir: targets told from the batch's others
    replaced_recall             of the replaced words, the share that was detected (fashionfine)
    unreadable                  photos so far that could not be decoded; others took their places
    conflicts                   photos that share a batch of this epoch with one of their product or caption
    samples_per_second          photos trained on a second since the last line

Validation, every --val-every steps, on held-out photos
    val_i2t_r1 … val_t2i_r10    retrieval recall, photo to text and text to photo, by product
    val_mlm_accuracy            masked words restored (the run's ratio of random words, of those that may be masked)
    val_image_gain              that, minus the same with another product's photo: what the photo adds; needs no truth
    val_itm_accuracy            pairs told from random wrong ones; chance is 0.5
    val_unreadable              photos left out because they could not be decoded
    val_mean                    mean of the six recalls (retrieval), of R@10 and R@50 (tgir); best.pt is by it
    val_r1, val_r10, val_r50    tgir
    val_accuracy, val_macro_f1  recognition; best.pt is by accuracy

On synthetic photos also the truth: of masks, each with its value for random masks (or a random patch) beside it as
…_random; of ITM negatives, with …_random and …_hard for random and the hardest batches and negatives
    word_precision           of the masked words that name an attribute, the share of which this photo shows it
    patch_precision          of the masked patches, the share on the region of an attribute that the text names
    pointing_game               of the words that name a detail which this photo shows, the share
                                whose most attended patch lies on that detail
    image_gain                  of the words that name what the photo shows, each masked once with a third of the
                                others, the share predicted, minus the same with the photo of another product (no
                                …_random)
    image_gain_coarse            the same of words for garment, colour, pattern and sleeve
    image_gain_fine           the same of all other words
    choice_coarse, choice_fine  of photos with their own text and one in which one value that the photo shows is wrong:
                                the share whose own text has the higher similarity; mean over garment, colour, pattern
                                and sleeve, and over all other kinds; chance is 0.5 (no …_random)
    choice_coarse_itm, choice_fine_itm   the same by the ITM head
    false_negative_rate         share of the chosen ITM negatives whose text in fact describes the photo

The last line, with the last validation
    final                       true
    seconds                     training time over all resumes, validation excluded
    peak_memory_mib             peak memory, of the first process
"""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None


def read_metrics(path: Path) -> list[dict]:
    """The lines of metrics.jsonl; a line that a killed run left half written is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def final_metrics(out: Path) -> dict | None:
    """The last line of the metrics.jsonl in a run's folder; None where the run has not finished."""
    lines = read_metrics(out / "metrics.jsonl")
    return lines[-1] if lines and lines[-1].get("final") else None


def trim_metrics(path: Path, step: int) -> None:
    """Drop the lines after a step, which a resumed run writes again; at step 0 all lines."""
    lines = [line for line in read_metrics(path) if line["step"] <= step and not line.get("final") and step]
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(scratch, path)


def write_metrics(path: Path, **metrics) -> None:
    """Append a line to metrics.jsonl, numbers to six digits."""
    line = {}
    for key, value in metrics.items():
        line[key] = float(f"{value:.6g}") if isinstance(value, float) else value
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


@contextlib.contextmanager
def stop_signals(second_stops: bool) -> Iterator[list[str]]:
    """Ctrl-C and SIGTERM ask for a stop after the step under way; a second one stops at once, unless torchrun is there:
    it may pass on a signal that has already come. -> the names of the signals that came"""
    caught = []

    def note(number: int, _frame) -> None:
        caught.append(signal.Signals(number).name)
        if second_stops:
            signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def own_session(_worker: int) -> None:
    """Ctrl-C and signals to the process group reach the main process only, which then ends its loader workers."""
    if hasattr(os, "setsid"):
        os.setsid()
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def peak_memory_mib(device: torch.device) -> float | None:
    """Most memory this process held: on the GPU if it trains there, otherwise resident; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
