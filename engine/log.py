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
    unreadable                  photos left out so far because they could not be decoded
    conflicts                   photos that share a batch of this epoch with one of their product or caption
    samples_per_second          photos trained on a second since the last line

Validation, every --val-every steps, on held-out photos
    val_i2t_r1 … val_t2i_r10    retrieval recall, photo to text and text to photo, by product
    val_mlm_accuracy            masked words restored (the run's ratio of random words, of those that may be masked)
    val_photo_gain              that, minus the same with another product's photo: what the photo adds; needs no truth
    val_itm_accuracy            pairs told from random wrong ones; chance is 0.5
    val_unreadable              photos left out because they could not be decoded
    val_mean                    mean of the six recalls (retrieval), of R@10 and R@50 (tgir); best.pt is by it
    val_r1, val_r10, val_r50    tgir
    val_accuracy, val_macro_f1  recognition; best.pt is by accuracy

On synthetic photos also the truth: of masks, each with its value for random masks (or a random patch) beside it as
…_random; of ITM negatives, with …_random and …_hard for random and the hardest batches and negatives
    word_cooccurrence           of the masked words that name an attribute, the share of which this photo shows it
    patch_cooccurrence          of the masked patches, the share on the region of an attribute that the text names
    pointing                    the pointing game: of the words that name a detail which this photo shows, the share
                                whose most attended patch lies on that detail
    photo_gain                  of the words that name what the photo shows, each masked once with a third of the
                                others, the share predicted, minus the same with the photo of another product (no
                                …_random)
    photo_gain_whole            the same of words for garment, colour, pattern and sleeve
    photo_gain_detail           the same of all other words
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

import json
import os
import signal
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from engine.host import peak_memory_mib
from engine.run import LOSSES, Run
from engine.writer import whole_file


class Metrics:
    """metrics.jsonl: one JSON object a line. A resumed run drops the lines after its checkpoint."""

    def __init__(self, path: Path, resumed_step: int | None = None):
        lines = []
        if resumed_step is not None and path.exists():
            lines = [line for line in map(_json_or_none, path.read_text().splitlines()) if line]
            lines = [line for line in lines if line["step"] <= resumed_step and not line.get("final")]
        self.path, self.lines = path, lines
        if path != Path(os.devnull):
            with whole_file(path) as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines).encode())

    def validation(self, step: int) -> dict[str, float]:
        """The held-out figures written for `step`, or nothing."""
        found = [line for line in self.lines if line["step"] == step and any(key.startswith("val_") for key in line)]
        return {key: value for line in found for key, value in line.items() if key != "step"}

    def line(self, **figures) -> dict:
        """Figures as they are written, to six digits."""
        return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in figures.items()}

    def write(self, **figures) -> None:
        line = self.line(**figures)
        self.lines.append(line)
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


def _json_or_none(line: str) -> dict | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # a line that a killed run left half written
        return None


class Progress:
    """The bar, the photos that are left out, and the training lines of metrics.jsonl."""

    def __init__(self, run: Run, metrics: Metrics):
        self.run, self.metrics, self.seen, self.took = run, metrics, 0, 0.0
        self.bar = tqdm(total=run.total_steps, initial=run.step, unit=" steps", dynamic_ncols=True, smoothing=0.1)
        self.say = self.bar.write

    def left_out(self, reasons: list[str]) -> None:
        """Name photos that cannot be decoded, each once."""
        for reason in set(reasons) - self.run.unreadable:
            self.say(f"left out: {reason}")
        self.run.unreadable |= set(reasons)

    def count(self, photos: int, seconds: float) -> None:
        """A step has taken so long for so many photos."""
        self.bar.update()
        self.run.seconds += seconds
        self.seen, self.took = self.seen + photos, self.took + seconds

    def write(self, values: dict[str, Tensor], lr: float) -> None:
        """A line about the step: its values, averaged over the ranks; photos a second since the last line."""
        run, means = self.run, self.run.ranks.average(values)
        rate = self.seen / self.took
        self.metrics.write(step=run.step, epoch=run.step / run.epoch_steps, **means, lr=lr, temp=run.model.temp.item(),
                           unreadable=len(run.unreadable), conflicts=run.sampler.conflicts,
                           samples_per_second=rate)  # fmt: skip
        shown = [key for key in means if key in LOSSES]
        self.bar.set_postfix({key: f"{means[key]:.2f}" for key in shown} | {"photos/s": f"{rate:.0f}"})
        self.seen, self.took = 0, 0.0

    def stop(self, why: str) -> None:
        """Say that the run was stopped before its end."""
        self.bar.close()
        last = f"{self.run.config.out}/last.pt"
        print(f"stopped at step {self.run.step} ({why}); saved in {last}, go on with --resume")

    def finish(self) -> dict:
        """The final line: the last validation, and what training has cost."""
        self.bar.close()
        run = self.run
        cost = {"seconds": run.seconds, "peak_memory_mib": peak_memory_mib(run.device)}
        final = {"step": run.step, "final": True, **self.metrics.validation(run.step), **cost}
        self.metrics.write(**final)
        print(f"done at step {run.step}, {run.seconds / 60:.1f} min of training; see {run.config.out}/curves.png")
        return final


class StopSignals:
    """Ctrl-C and SIGTERM ask for a stop after the step under way; a second one stops at once, unless torchrun is there:
    it may pass on a signal that has already come."""

    def __init__(self, second_stops: bool):
        self.second_stops = second_stops

    def __enter__(self) -> "StopSignals":
        self.caught: str | None = None
        self._before = {number: signal.signal(number, self._catch) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _catch(self, number: int, _frame) -> None:
        self.caught = signal.Signals(number).name
        if self.second_stops:
            signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
