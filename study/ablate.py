"""Ablations: every condition with several seeds, as mean ± standard deviation.

python study/ablate.py                             {random, sync} masks × {random, hard, semihard} batches
python study/ablate.py --grid ceiling              random, synchronized and true masks: what share of the way is gone?
python study/ablate.py --grid recipes              the four recipes side by side, as many steps each
python study/ablate.py --grid parts                softmask and fashionfine, each without one of its parts

All on the synthetic photos; recipes and parts also on files (--data jsonl --root DIR), without the columns that need
the truth. Category % is study/probe.py's, of the last checkpoint; seconds a step are for as many threads as the line
above the table says.

It may be stopped at any time; the same command goes on where it stopped, and ends with the table, which it also writes
to --file. Flags that it does not know go to train.py: --steps, --products, --batch-size, … They must be the same when
going on, and so should --jobs, which share the threads.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from tqdm import tqdm

from harness.checkpoints import config_from_dict
from harness.config import FREE_ON_RESUME, TrainConfig, parse_config
from harness.flags import ConfigError, flag_of
from harness.precision import fitting_precision
from measures.truth import skill
from photos.dataset import DataError
from photos.wardrobe import KINDS
from study.probe import category_accuracy

TRAIN = str(Path(__file__).resolve().parent.parent / "train.py")
masks = lambda kind: ["--patch-mask", kind, "--word-mask", kind]
batches = lambda kind: ["--sampler", kind, "--itm-negatives", kind]
GRIDS = {
    "method": {f"{m} masks, {b} batches": masks(m) + batches(b)
               for m in ("random", "sync") for b in ("random", "hard", "semihard")},
    # the base, and the same recipe with masks from worst to best
    "ceiling": {
        "albef": ["--recipe", "albef"],
        "random": masks("random"),
        "synchronized": masks("sync"),
        "true words": ["--word-mask", "true", "--patch-mask", "random"],
        "true patches": ["--word-mask", "random", "--patch-mask", "true"],
        "true": masks("true"),
    },
    "recipes": {
        "albef": ["--recipe", "albef"],
        "albef, texts with prompts": ["--recipe", "albef", "--prompts", "--max-length", "96"],
        **{recipe: ["--recipe", recipe] for recipe in ("syncmask", "softmask", "fashionfine")},
    },
    "parts": {
        f"{recipe}{change}": ["--recipe", recipe, *flags]
        for recipe, parts in {
            "softmask": {
                "": [],
                ", no soft mask": ["--no-soft-mask"],
                ", plain ITC": ["--focal-gamma", "0"],
                ", masked text for MLM alone": ["--no-mask-text"],
                ", no distortion": ["--distort", "0"],
            },
            "fashionfine": {
                "": [],
                ", no local tokens": ["--local-image", "0", "--local-text", "0"],
                ", plain ITC": ["--focal-gamma", "0", "--itc-weight", "1"],
                ", no alignment": ["--no-alignment"],
                ", no replaced words": ["--no-detector"],
                ", no frames, no alignment": ["--no-prompts", "--no-alignment"],
            },
        }.items()
        for change, flags in parts.items()
    },
}  # fmt: skip
percent = lambda key: lambda f: 100 * f[key]
Columns = list[tuple[str, Callable[[dict], float], int]]  # title, figure from the final line of a run, decimals
HELD_OUT: Columns = [
    ("R@1 i2t %", percent("val_i2t_r1"), 1),
    ("R@1 t2i %", percent("val_t2i_r1"), 1),
    ("ITM %", percent("val_itm_accuracy"), 1),
    ("MLM %", percent("val_mlm_accuracy"), 1),
]
TRUTH: Columns = [
    ("patch skill", lambda f: skill(f, "patch_cooccurrence"), 2),
    ("word skill", lambda f: skill(f, "word_cooccurrence"), 2),
    ("pointing × chance", lambda f: f["pointing"] / f["pointing_random"], 1),
]
COLUMNS: Columns = [
    *HELD_OUT,
    ("visible words %", percent("visible_word_accuracy"), 1),
    *TRUTH,
    ("false negatives %", percent("false_negative_rate"), 2),
    ("their similarity", lambda f: f["negative_similarity"], 2),
]
CEILING_COLUMNS: Columns = [
    ("photo adds %", percent("photo_gain"), 1),
    ("to details %", percent("photo_gain_detail"), 1),
    ("to the rest %", percent("photo_gain_whole"), 1),
    ("visible words %", percent("visible_word_accuracy"), 1),
    ("unseen words %", percent("unseen_word_accuracy"), 1),
    ("details chosen %", percent("detail_choice"), 1),
    ("by the matching head %", percent("detail_choice_matching"), 1),
    ("by restoring words %", percent("detail_choice_restoring"), 1),
    ("R@1 i2t %", percent("val_i2t_r1"), 1),
    ("R@1 t2i %", percent("val_t2i_r1"), 1),
    ("ITM %", percent("val_itm_accuracy"), 1),
    ("category %", percent("category"), 1),
]
# what the photo adds to words of each kind
KIND_COLUMNS: Columns = [(f"{kind} %", percent(f"photo_gain_{kind}"), 1) for kind in KINDS[:-1]]
RECIPE_COLUMNS: Columns = [
    *HELD_OUT,
    ("category %", percent("category"), 1),
    *TRUTH,
    ("seconds a step", lambda f: f["seconds"] / f["step"], 2),
]


def final_line(out: Path) -> dict | None:
    """The last line of a finished run's metrics."""
    metrics = out / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return json.loads(lines[-1]) if lines and '"final": true' in lines[-1] else None


def check_done(out: Path, config: TrainConfig) -> None:
    """Raise ConfigError when the folder holds a run with other settings than `config`."""
    if (out / "config.json").exists():
        try:
            saved = config_from_dict(json.loads((out / "config.json").read_text()))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{out}/config.json cannot be read ({error}); remove the folder") from None
        free = {name: getattr(config, name) for name in FREE_ON_RESUME}
        if config.precision == "auto":
            config = replace(config, precision=fitting_precision(torch.device(config.device))[0])
        if replace(saved, **free, model=replace(saved.model, vocab_size=config.model.vocab_size)) != config:
            raise ConfigError(f"{out} holds a run with other flags; give the same ones, or another --out")


def run_once(out: Path, flags: list[str], threads: int, children: list[subprocess.Popen]) -> dict | None:
    """Train, go on, or read what is done already; output goes to a log beside. -> final line, None when stopped."""
    if final := final_line(out):
        return final
    out.parent.mkdir(parents=True, exist_ok=True)
    (out / "probe.json").unlink(missing_ok=True)  # of weights that are gone
    resume = ["--resume"] if (out / "last.pt").exists() else []
    command = [sys.executable, TRAIN, *flags, *resume, "--out", str(out)]
    log = out.with_name(out.name + ".log")
    with open(log, "a") as file:
        # a session of its own: Ctrl-C reaches it through `main` only, once
        children.append(child := subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True,
                                                  env=os.environ | {"OMP_NUM_THREADS": str(threads)}))  # fmt: skip
    if status := child.wait():
        said = log.read_text().strip().splitlines() or ["nothing said"]
        raise RuntimeError(f"{log}: status {status}, {said[-1]}")
    return final_line(out)


def run_and_probe(out: Path, flags: list[str], threads: int, children: list[subprocess.Popen]) -> dict | None:
    """`run_once`, and into its final line the category probe of its last checkpoint, made once and kept beside it."""
    final, kept = run_once(out, flags, threads, children), out / "probe.json"
    if final and not kept.exists():
        torch.set_num_threads(threads)
        share = category_accuracy(out / "last.pt", parse_config(flags)[0].root)
        kept.write_text(json.dumps({} if share is None else {"category": share}))
    return final and final | json.loads(kept.read_text())


def table(results: dict[str, list[dict]], columns: Columns, over: str | None = None) -> str:
    """Markdown: a condition a row, a figure a column, mean ± standard deviation over the seeds. With `over`, a
    condition: of the differences from the same seed of that, since a seed draws its own photos."""
    cells: dict[str, list[str]] = {}
    for title, figure, decimals in columns:
        with contextlib.suppress(KeyError):  # not every data set has categories, few have the truth
            values = {name: np.array([figure(final) for final in finals]) for name, finals in results.items()}
            base, sign = (values.pop(over), "+") if over else (0, "")
            cells[title] = [
                f"{(v - base).mean():{sign}.{decimals}f}"
                + (f" ± {(v - base).std(ddof=1):.{decimals}f}" if len(v) > 1 else "")
                for v in values.values()
            ]
    names, corner = [name for name in results if name != over], f" over {over}" if over else ""
    rows = [f"|{corner} | " + " | ".join(cells) + " |", "|---" * (len(cells) + 1) + "|"]
    rows += [f"| {' | '.join(row)} |" for row in zip(names, *cells.values(), strict=True)]
    return "\n".join(rows)


def shares_of_the_way(results: dict[str, list[dict]], columns: Columns) -> str:
    """Markdown: (condition − random) / (true − random), of the means, in %; a dash where true masks are not above
    random ones by more than twice what seeds differ in that, so that there is no way to go."""
    between, rows = [name for name in results if name not in ("random", "true", "albef")], {}
    for title, figure, _ in columns:
        with contextlib.suppress(KeyError):
            found = {name: np.array([figure(final) for final in finals]) for name, finals in results.items()}
            ways = found["true"] - found["random"]
            known = len(ways) > 1 and ways.mean() > 2 * ways.std(ddof=1)
            share = lambda name, found=found, ways=ways: (found[name] - found["random"]).mean() / ways.mean()
            rows[title] = [f"{share(name):.0%}" if known else "—" for name in between]
    lines = [f"| share of the way from random to true masks | {' | '.join(rows)} |", "|---" * (len(rows) + 1) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in zip(between, *rows.values(), strict=True)])


CURVES = {
    "photo_gain_whole": "what the photo adds: garment, colour, pattern, sleeve",
    "photo_gain_detail": "what the photo adds: details",
    "unseen_word_accuracy": "restored though not on the photo",
    "detail_choice": "right text by similarity, details",
    "detail_choice_restoring": "right text by restoring words, details",
    "val_i2t_r1": "R@1, photo to text",
}


def draw_ceiling(folders: dict[str, list[Path]], path: Path) -> None:
    """ceiling.png: each of CURVES over the steps, a line a condition: mean and reach of its seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(15, 7), layout="constrained")
    for axis, (key, title) in zip(axes.flat, CURVES.items(), strict=True):
        for name, runs in folders.items():
            found: dict[int, list[float]] = {}
            for line in (json.loads(line) for run in runs for line in (run / "metrics.jsonl").read_text().splitlines()):
                if key in line and not line.get("final"):
                    found.setdefault(line["step"], []).append(line[key])
            steps, values = sorted(found), [found[step] for step in sorted(found)]
            (drawn,) = axis.plot(steps, list(map(np.mean, values)), marker=".", label=name)
            axis.fill_between(
                steps, *(list(map(end, values)) for end in (min, max)), color=drawn.get_color(), alpha=0.15
            )
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def read_command_line(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """What is ours, and what is train.py's."""
    parser = argparse.ArgumentParser(
        "ablate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--grid", choices=GRIDS, default="method")
    parser.add_argument("--only", nargs="+", metavar="CONDITION", help="some of its conditions (default all)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, with as many threads each as make up the cores"
    )
    parser.add_argument("--out", type=Path, help="folder of the runs (default runs/ablate-GRID)")
    parser.add_argument("--file", type=Path, help="where the table goes (default table.md in that folder)")
    args, flags = parser.parse_known_args(argv)
    if unknown := sorted(set(args.only or ()) - GRIDS[args.grid].keys()):
        parser.error(f"--only {unknown[0]!r}: --grid {args.grid} has {', '.join(GRIDS[args.grid])}")
    if min(args.seeds, args.jobs) < 1:
        parser.error("--seeds and --jobs: at least 1")
    return args, flags


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args, flags = read_command_line(argv)
    out, threads = args.out or Path(f"runs/ablate-{args.grid}"), max(1, os.cpu_count() // args.jobs)
    of_recipes, ceiling = args.grid in ("recipes", "parts"), args.grid == "ceiling"
    work = run_and_probe if of_recipes or ceiling else run_once
    columns = RECIPE_COLUMNS if of_recipes else CEILING_COLUMNS if ceiling else COLUMNS
    grid = {name: condition for name, condition in GRIDS[args.grid].items() if name in (args.only or GRIDS[args.grid])}
    numbers, at_end = list(GRIDS[args.grid]), [] if ceiling else ["--val-every", "1000000"]
    runs = [(name, out / f"{numbers.index(name)}-{seed}", [*condition, *flags, "--seed", str(seed), *at_end])
            for seed in range(args.seeds) for name, condition in grid.items()]  # fmt: skip
    try:
        own = set().union(*(parse_config(condition)[1] for condition in grid.values()))
        if taken := sorted(own & parse_config(flags)[1]):
            raise ConfigError(f"{flag_of(taken[0])} is what the conditions differ in; drop it")
        configs = [parse_config(given)[0] for _, _, given in runs]
        if configs[0].data != "synthetic" and not of_recipes:
            raise ConfigError("--data: only synthetic photos come with the truth that the table is about")
        if len({(config.steps, config.epochs, config.batch_size) for config in configs}) > 1:
            raise ConfigError("the conditions differ in length; give --steps or --epochs")
        for (_, folder, _), config in zip(runs, configs, strict=True):
            check_done(folder, config)
    except ConfigError as error:
        sys.exit(f"ablate.py: {error}")
    results: dict[str, list[dict]] = {name: [] for name in grid}
    children: list[subprocess.Popen] = []
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(work, folder, given, threads, children) for _, folder, given in runs]
        try:
            for (name, _, _), future in zip(runs, tqdm(futures, args.grid, unit=" runs"), strict=True):
                if (final := future.result()) is None:
                    raise KeyboardInterrupt
                results[name].append(final)
        except (KeyboardInterrupt, RuntimeError, OSError, ConfigError, DataError) as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in children:
                if child.poll() is None:
                    child.send_signal(signal.SIGINT)  # saves and ends
            sys.exit(f"ablate.py: {error}" if str(error) else "ablate.py: stopped; the same command goes on")
    signal.signal(signal.SIGTERM, before)
    hours = sum(final["seconds"] for finals in results.values() for final in finals) / 3600
    only = " ".join(f'"{name}"' if " " in name else name for name in args.only or ())
    own = [f"--grid {args.grid}", *([f"--only {only}"] if only else []), f"--seeds {args.seeds}", f"--jobs {args.jobs}"]
    command = " ".join(["python study/ablate.py", *own, *flags])
    machine = f"{configs[0].device}, {os.cpu_count()} cores ({platform.machine()}), threads a run: {threads}"
    took = f"{hours:.1f} hours of training on {machine}; {args.seeds} seeds"
    text = f"`{command}`\n\n{took}\n\n{table(results, columns)}\n"
    if ceiling:
        compared = "random" in grid and len(grid) > 1
        over_random = lambda columns: f"\n{table(results, columns, over='random')}\n" if compared else ""
        text += over_random(columns)
        if {"random", "true"} <= grid.keys() and len(grid) > 2:
            text += f"\n{shares_of_the_way(results, columns)}\n"
        text += f"\nWhat the photo adds, kind by kind:\n\n{table(results, KIND_COLUMNS)}\n{over_random(KIND_COLUMNS)}"
        draw_ceiling({name: [folder for of, folder, _ in runs if of == name] for name in grid}, out / "ceiling.png")
    file = args.file or out / "table.md"
    file.write_text(text)
    print(f"\n{text}\n{file}")


if __name__ == "__main__":
    main()
