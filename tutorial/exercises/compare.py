"""Compare two pretraining runs: their final metrics and the differences.

python tutorial/exercises/compare.py runs/A runs/B [METRIC …]      only these metrics, for example photo_gain_detail
"""

import argparse
import json
import sys
from pathlib import Path


def final_metrics(run: Path) -> dict[str, float]:
    """The metrics of the last line of a run's metrics.jsonl. Raises ValueError if the run is not finished."""
    file = run / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    try:
        metrics = json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError):
        raise ValueError(f"{file}: the last line is not one of train.py") from None
    if not metrics.pop("final", False):
        raise ValueError(f"{file}: the run is not finished; go on with train.py --resume --out {run}")
    return metrics


def comparison(run_a: Path, run_b: Path, wanted: list[str]) -> str:
    """A Markdown table: metric, both runs, B minus A."""
    a, b = final_metrics(run_a), final_metrics(run_b)
    rows = [f"| metric | {run_a.name} | {run_b.name} | difference |", "|---|---|---|---|"]
    if unknown := [key for key in wanted if key not in a or key not in b]:
        raise ValueError(f"{unknown[0]}: not among the metrics of both runs")
    for key in wanted or a:
        if isinstance(a[key], float | int) and isinstance(b.get(key), float | int):
            rows.append(f"| {key} | {a[key]:.4g} | {b[key]:.4g} | {b[key] - a[key]:+.4g} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("compare.py", description=__doc__.split("\n")[0])
    parser.add_argument("run_a", type=Path)
    parser.add_argument("run_b", type=Path)
    parser.add_argument("metrics", nargs="*", help="only these (default: all)")
    args = parser.parse_args(argv)
    try:
        print(comparison(args.run_a, args.run_b, args.metrics))
    except (OSError, ValueError) as error:
        sys.exit(f"compare.py: {error}")


if __name__ == "__main__":
    main()
