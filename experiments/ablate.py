"""Compare conditions over seeds: mean ± standard deviation, and differences to the first condition, paired by seed.

python experiments/ablate.py --grid ceiling --seeds 3 --steps 1360      masks: random, synchronized, made from the truth
python experiments/ablate.py --grid recipes                             the four recipes
python experiments/ablate.py --grid negatives                           random, hard and semi-hard batches and negatives

Other flags go to train.py. Finished runs are not run again, so the same command goes on where it was stopped.
"""

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np

from engine.flags import ConfigError, OneLineParser
from engine.log import final_metrics

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
GRIDS = {
    "ceiling": {
        "random": ["--patch-mask", "random", "--word-mask", "random"],
        "synchronized": ["--patch-mask", "sync", "--word-mask", "sync"],
        "oracle": ["--patch-mask", "oracle", "--word-mask", "oracle"],
        "true words": ["--patch-mask", "random", "--word-mask", "oracle"],
        "true patches": ["--patch-mask", "oracle", "--word-mask", "random"],
    },
    "recipes": {recipe: ["--recipe", recipe] for recipe in ("albef", "syncmask", "softmask", "fashionfine")},
    "negatives": {mode: ["--negatives", mode] for mode in ("random", "hard", "semihard")},
}
COLUMNS = {  # key of the final line of metrics.jsonl -> title; all in percent
    "val_i2t_r1": "R@1 i2t %",
    "val_t2i_r1": "R@1 t2i %",
    "val_itm_accuracy": "ITM %",
    "val_mlm_accuracy": "MLM %",
    "val_image_gain": "image gain, points",
    "image_gain_coarse": "coarse, points",
    "image_gain_fine": "fine, points",
    "choice_fine": "own caption, fine %",
    "choice_fine_itm": "by the ITM head %",
    "word_precision": "word precision %",
    "patch_precision": "patch precision %",
    "false_negative_rate": "false negatives %",
}


def run_condition(out: Path, flags: list[str]) -> dict:
    """Train in a process of its own, unless the run has finished. -> its final metrics. Raises ConfigError."""
    settings = out / "flags.txt"
    if settings.exists() and settings.read_text() != " ".join(flags):
        raise ConfigError(f"{out} holds a run with other flags; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    settings.write_text(" ".join(flags))
    if not final_metrics(out):
        if (out / "last.pt").exists():
            flags = ["--resume"]
        subprocess.run([sys.executable, str(TRAIN), "--out", str(out), *flags])
    metrics = final_metrics(out)
    if not metrics:
        raise ConfigError(f"{out}: the run did not finish; the same command goes on with it")
    return metrics


def spread(values: np.ndarray) -> str:
    """Mean ± standard deviation over seeds; the mean alone of one seed."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"


def table(metrics: dict[str, list[dict]]) -> str:
    """Lay out the metrics of each condition, a list with one entry a seed, then the differences to the first one."""
    keys = [key for key in COLUMNS if all(key in line for lines in metrics.values() for line in lines)]
    values = {}
    for name, lines in metrics.items():
        values[name] = 100 * np.array([[line[key] for line in lines] for key in keys])  # (keys, seeds)
    first, *others = values
    rows = [["condition", *(COLUMNS[key] for key in keys)], ["---"] * (1 + len(keys))]
    for name, found in values.items():
        rows.append([name, *map(spread, found)])
    for name in others:
        rows.append([f"{name} − {first}", *map(spread, values[name] - values[first])])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser("ablate.py", description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--grid", choices=GRIDS, default="ceiling")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some conditions of the grid (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N − 1 (default 3)")
    parser.add_argument("--out", type=Path, default=Path("runs/ablate"), help="folder of the runs")
    args, flags = parser.parse_known_args(argv)
    conditions = GRIDS[args.grid]
    if unknown := set(args.only or []) - set(conditions):
        parser.error(f"--only {unknown.pop()}: the conditions are {', '.join(conditions)}")
    try:
        metrics = {name: [] for name in args.only or conditions}
        for seed in range(args.seeds):
            for name, lines in metrics.items():
                out = args.out / args.grid / f"{name.replace(' ', '-')}-{seed}"
                lines.append(run_condition(out, [*conditions[name], *flags, "--seed", str(seed)]))
    except (ConfigError, OSError) as error:
        sys.exit(f"ablate.py: {error}")
    print(table(metrics))


if __name__ == "__main__":
    main()
