"""Compare the final metrics of two pretraining runs.

python tutorial/exercises/compare.py runs/A runs/B                      # all metrics that both runs have
python tutorial/exercises/compare.py runs/A runs/B image_gain_fine      # these metrics alone
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engine.flags import OneLineParser, in_one_line
from engine.log import final_metrics


def read_final_metrics(folder: Path) -> dict[str, float]:
    """Read the last line of a run's metrics.jsonl. Exits with a message where there is none."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        sys.exit(f"compare.py: {path}: no such file; give the folder of a run, its --out")
    try:
        metrics = final_metrics(folder)
    except OSError as error:
        sys.exit(f"compare.py: {in_one_line(error)}")
    if not metrics:
        sys.exit(f"compare.py: {path}: the run is not finished; continue it with train.py --resume --out {folder}")
    return {key: value for key, value in metrics.items() if key != "final"}


def main(argv: list[str] | None = None) -> None:
    """Run the command line: print a Markdown table with the metrics of both runs, and B minus A."""
    parser = OneLineParser("compare.py", description=__doc__.split("\n")[0])
    parser.add_argument("run_a", type=Path, help="folder of the first run")
    parser.add_argument("run_b", type=Path, help="folder of the second run")
    parser.add_argument("metrics", nargs="*", help="metrics to print (default: all that both runs have)")
    args = parser.parse_args(argv)
    metrics_a = read_final_metrics(args.run_a)
    metrics_b = read_final_metrics(args.run_b)
    common = [key for key in metrics_a if key in metrics_b]
    print(f"| metric | {args.run_a.name} | {args.run_b.name} | difference |\n|---|---|---|---|")
    for key in args.metrics or common:
        if key not in common:
            sys.exit(f"compare.py: {key}: not among the metrics of both runs; both have {', '.join(common)}")
        a = metrics_a[key]
        b = metrics_b[key]
        print(f"| {key} | {a:.4g} | {b:.4g} | {b - a:+.4g} |")


if __name__ == "__main__":
    main()
