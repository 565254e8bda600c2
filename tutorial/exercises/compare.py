"""Compare two pretraining runs: their final metrics and the differences.

python tutorial/exercises/compare.py runs/A runs/B [METRIC …]      only these metrics, for example image_gain_fine
"""

import argparse
import json
import sys
from pathlib import Path


def final_metrics(run: Path) -> dict[str, float]:
    """Read the last line of a run's metrics.jsonl."""
    file = run / "metrics.jsonl"
    if not file.exists():
        sys.exit(f"compare.py: {file}: no such file")
    metrics = json.loads(file.read_text(encoding="utf-8").splitlines()[-1])
    if not metrics.pop("final", False):
        sys.exit(f"compare.py: {file}: the run is not finished; go on with train.py --resume --out {run}")
    return metrics


def main(argv: list[str] | None = None) -> None:
    """Print a Markdown table: metric, both runs, B minus A."""
    parser = argparse.ArgumentParser("compare.py", description=__doc__.split("\n")[0])
    parser.add_argument("run_a", type=Path)
    parser.add_argument("run_b", type=Path)
    parser.add_argument("metrics", nargs="*", help="only these (default: all that both runs have)")
    args = parser.parse_args(argv)
    a, b = final_metrics(args.run_a), final_metrics(args.run_b)
    common = [key for key in a if key in b]
    print(f"| metric | {args.run_a.name} | {args.run_b.name} | difference |\n|---|---|---|---|")
    for key in args.metrics or common:
        if key not in common:
            sys.exit(f"compare.py: {key}: not among the metrics of both runs")
        print(f"| {key} | {a[key]:.4g} | {b[key]:.4g} | {b[key] - a[key]:+.4g} |")


if __name__ == "__main__":
    main()
