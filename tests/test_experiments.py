"""Pictures are drawn, experiments continue where they stopped, and a step has the passes that results.md lists."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small import FAST

import train
from engine.config import parse_config
from experiments import ablate, benchmark, figures

ROOT = Path(__file__).parent.parent
SMALL = [*FAST, "--steps", "2"]


def test_contact_sheet(tmp_path):
    figures.main(["sheet", "--num-products", "2", "--file", str(tmp_path / "s.png")])
    assert Image.open(tmp_path / "s.png").width > 600


def test_masks_of_a_checkpoint(tmp_path):
    config, given = parse_config([*SMALL, "--out", str(tmp_path / "run")])
    train.train(config, given)
    checkpoint = str(tmp_path / "run" / "last.pt")
    figures.main(["masks", "--checkpoint", checkpoint, "--num-products", "2", "--file", str(tmp_path / "m.png")])
    assert np.array(Image.open(tmp_path / "m.png")).std() > 10
    with pytest.raises(SystemExit, match="nowhere.pt: no such checkpoint"):
        figures.main(["masks", "--checkpoint", "nowhere.pt"])


def test_curves_of_several_runs(tmp_path):
    for name, shares in {"one": [0.1, 0.2], "two": [0.1, 0.3]}.items():
        (tmp_path / name).mkdir()
        lines = [{"step": step, "val_i2t_r1": share, "val_t2i_r1": share} for step, share in enumerate(shares)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    runs = [str(tmp_path / "one"), str(tmp_path / "two")]
    figures.main(["curves", "--runs", *runs, "--file", str(tmp_path / "c.png")])
    assert Image.open(tmp_path / "c.png").height == 3 * 90  # one row of panels: no image gain
    with pytest.raises(SystemExit, match="nowhere: no metrics.jsonl with a validation"):
        figures.main(["curves", "--runs", "nowhere"])


@pytest.mark.usefixtures("quick")
def test_an_ablation_continues_where_it_stopped(tmp_path, capsys, monkeypatch):
    grid = {"one": ["--negatives", "hard"], "two": ["--word-mask", "random"]}
    monkeypatch.setitem(ablate.GRIDS, "negatives", grid)
    started = []

    def stand_in(command):
        """Train in this process instead of a new one, and stop the first run before its end."""
        started.append(command)
        config, given = parse_config(command[2:])
        train.train(config, given, stop_at=1 if len(started) == 1 else None)

    monkeypatch.setattr(ablate, "run_to_its_end", stand_in)
    flags = ["--grid", "negatives", "--seeds", "2", "--out", str(tmp_path), *SMALL]
    with pytest.raises(SystemExit, match="the run did not finish; run the same command again"):
        ablate.main(flags)
    ablate.main(flags)
    assert len(started) == 5 and "--resume" in started[1]
    table = capsys.readouterr().out
    ablate.main(flags)
    assert len(started) == 5 and capsys.readouterr().out.strip().endswith(table.strip().splitlines()[-1])
    with pytest.raises(SystemExit, match="holds a run with other flags"):
        ablate.main([*flags, "--alpha", "0.3"])


def test_the_table_by_hand():
    lines = [{"val_i2t_r1": 0.1, "val_t2i_r1": 0.5}, {"val_i2t_r1": 0.3, "val_t2i_r1": 0.5}]
    others = [{"val_i2t_r1": 0.2, "val_t2i_r1": 0.6}, {"val_i2t_r1": 0.4, "val_t2i_r1": 0.8}]
    rows = [row.split(" | ") for row in ablate.comparison_table({"a": lines, "b": others}).splitlines()]
    assert rows[0] == ["| condition", "R@1, image to caption, %", "R@1, caption to image, % |"]
    assert rows[2] == ["| a", "20.0 ± 14.1", "50.0 ± 0.0 |"]
    assert rows[3] == ["| b", "30.0 ± 14.1", "70.0 ± 14.1 |"]
    assert rows[4] == ["| b − a", "10.0 ± 0.0", "20.0 ± 14.1 |"]


def test_every_condition_of_the_ablations_is_a_valid_run():
    for grid in ablate.GRIDS.values():
        for flags in grid.values():
            parse_config(flags)


@pytest.mark.parametrize("recipe", train.RECIPES)
def test_no_recipe_makes_more_passes_than_the_page_says(recipe):
    """A recipe that gets one more pass needs a new line in the table of results.md."""
    lines = (ROOT / "experiments/results.md").read_text().splitlines()
    header = lines.index("| recipe | vision | text | fusion | decoder | vision_m | text_m | fusion_m |")
    rows = [line.strip("| ").split(" | ") for line in lines[header:][:7]]
    (numbers,) = [row[1:] for row in rows if row[0] == recipe]
    passes = {part: int(number) for part, number in zip(rows[0][1:], numbers, strict=True) if number != "0"}
    flags = [*SMALL, "--fusion-layers", "2", "--recipe", recipe]
    config, _ = parse_config([*flags, "--alpha", "0"])
    counts = benchmark.count_passes(*benchmark.open_run(config))
    assert counts == passes
    config, _ = parse_config([*flags, "--alpha", "0.4"])
    counts_with_soft_targets = benchmark.count_passes(*benchmark.open_run(config))
    extra = {part for part, count in counts_with_soft_targets.items() if count > counts.get(part, 0)}
    assert extra == (set() if recipe == "fashionfine" else {"text_m", "fusion_m"})


def test_the_benchmark_prints_what_a_step_costs(capsys):
    benchmark.main(["step", "--repeats", "1", *SMALL])
    printed = capsys.readouterr().out
    for words in ("syncmask, tiny, batch 8, fp32, cpu", "images per second", "forward", "update", "MiB"):
        assert words in printed
    benchmark.main(["passes", *SMALL, "--fusion-layers", "2"])
    table = capsys.readouterr().out.splitlines()
    assert set(table) <= set((ROOT / "experiments/results.md").read_text().splitlines()) and len(table) == 6
    benchmark.main(["operations", *SMALL, "--fusion-layers", "2"])
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 6 and all(float(row.split(" | ")[2].strip(" |")) > 0 for row in table[2:])
    with pytest.raises(SystemExit, match="benchmark.py: image_size 0"):
        benchmark.main(["step", "--image-size", "0"])
