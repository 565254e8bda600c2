"""Compare conditions over seeds: mean ± standard deviation, and differences to the first condition, paired by seed.

python experiments/ablate.py --grid masks --seeds 3 --steps 1360        random, synchronized and oracle masks
python experiments/ablate.py --grid recipes                             the four recipes
python experiments/ablate.py --grid negatives                           random, hard and semi-hard batches and negatives

Other flags are passed to train.py. Finished runs are not repeated, so the same command continues where it was stopped.
"""

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np

from engine.flags import ConfigError, OneLineParser, in_one_line
from engine.log import final_metrics
from evaluation.validation import METRIC_TITLES, unit_of

TRAIN_SCRIPT = Path(__file__).resolve().parent.parent / "train.py"
GRIDS = {  # grid -> condition -> flags of train.py
    "masks": {
        "random": ["--patch-mask", "random", "--word-mask", "random"],
        "synchronized": ["--patch-mask", "sync", "--word-mask", "sync"],
        "oracle": ["--patch-mask", "oracle", "--word-mask", "oracle"],
        "oracle words": ["--patch-mask", "random", "--word-mask", "oracle"],
        "oracle patches": ["--patch-mask", "oracle", "--word-mask", "random"],
    },
    "recipes": {
        "albef": ["--recipe", "albef"],
        "syncmask": ["--recipe", "syncmask"],
        "softmask": ["--recipe", "softmask"],
        "fashionfine": ["--recipe", "fashionfine"],
    },
    "negatives": {
        "random": ["--negatives", "random"],
        "hard": ["--negatives", "hard"],
        "semihard": ["--negatives", "semihard"],
    },
}


def run_condition(out: Path, flags: list[str]) -> dict:
    """Train in a process of its own, unless the run has finished. -> its final line of metrics

    out: folder of the run
    flags: of train.py
    Raises ConfigError where the folder holds a run with other flags, or where the run does not finish.
    """
    flags_file = out / "flags.txt"
    used_flags = flags_file.read_text() if flags_file.exists() else None
    if (out / "metrics.jsonl").exists() and used_flags != " ".join(flags):
        raise ConfigError(f"{out} holds a run with other flags; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    flags_file.write_text(" ".join(flags))
    if not final_metrics(out):
        if (out / "last.pt").exists():
            flags = ["--resume"]
        run_to_its_end([sys.executable, str(TRAIN_SCRIPT), "--out", str(out), *flags])
    metrics = final_metrics(out)
    if not metrics:
        raise ConfigError(f"{out}: the run did not finish; run the same command again to continue it")
    return metrics


def run_to_its_end(command: list[str]) -> None:
    """Run a command. Ctrl-C reaches it as well: wait until it has saved, then raise KeyboardInterrupt."""
    process = subprocess.Popen(command)
    try:
        process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise


def mean_and_deviation(values: np.ndarray) -> str:
    """Format the mean ± standard deviation (ddof 1) over seeds, or the value of a single seed. values (seeds,)"""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"


def comparison_table(metrics: dict[str, list[dict]]) -> str:
    """Format a Markdown table of the conditions, and of their differences to the first condition, paired by seed.

    metrics: condition -> final metrics, one entry per seed; columns are the METRIC_TITLES that all of them have
    """
    keys = list(METRIC_TITLES)
    for runs in metrics.values():
        for final in runs:
            keys = [key for key in keys if key in final]
    values = {}  # condition -> (keys, seeds), percent
    for condition, runs in metrics.items():
        values[condition] = 100 * np.array([[final[key] for final in runs] for key in keys])
    baseline, *others = values

    titles = [f"{METRIC_TITLES[key]}, {unit_of(key)}" for key in keys]
    rows = [["condition", *titles], ["---"] * (1 + len(keys))]
    for condition in values:
        rows.append([condition] + [mean_and_deviation(by_seed) for by_seed in values[condition]])
    for condition in others:
        differences = values[condition] - values[baseline]
        rows.append([f"{condition} − {baseline}"] + [mean_and_deviation(by_seed) for by_seed in differences])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Errors end the process with one line."""
    parser = OneLineParser(
        "ablate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--grid", choices=GRIDS, default="masks", help="conditions to compare (default masks)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="conditions of the grid to run (default all)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, counted from 0 (default 3)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/ablate"), help="folder of the runs (default runs/ablate)"
    )
    args, flags = parser.parse_known_args(argv)
    conditions = GRIDS[args.grid]
    for name in args.only or []:
        if name not in conditions:
            parser.error(f"--only {name}: no such condition; choose {', '.join(conditions)}")
    try:
        metrics = {name: [] for name in args.only or conditions}
        for seed in range(args.seeds):
            for name, runs in metrics.items():
                out = args.out / args.grid / f"{name.replace(' ', '-')}-{seed}"
                runs.append(run_condition(out, [*conditions[name], *flags, "--seed", str(seed)]))
    except (ConfigError, OSError) as error:
        sys.exit(f"ablate.py: {in_one_line(error)}")
    except KeyboardInterrupt:
        sys.exit("ablate.py: stopped; the same command continues")
    print(comparison_table(metrics))


if __name__ == "__main__":
    main()
