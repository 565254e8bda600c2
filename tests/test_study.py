"""The pictures are drawn, and of what they say."""

import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent


def test_contact_sheet(tmp_path):
    command = [sys.executable, "study/figures.py", "sheet", "--products", "2", "--file", str(tmp_path / "s.png")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert Image.open(tmp_path / "s.png").width > 600
    refused = subprocess.run(
        [*command, "--data", "jsonl", "--root", "/nowhere"], cwd=ROOT, capture_output=True, text=True
    )
    assert (
        refused.returncode == 1
        and refused.stderr.strip() == "figures.py: /nowhere: no such folder; say with --root where the jsonl files are"
    )
