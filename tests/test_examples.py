"""Every public example runs: the scripts, and the Python blocks of README and docs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from core_models import classification, loader, trained

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    (page.name, number, text)
    for page in PAGES
    for number, text in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
]


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.stem for script in SCRIPTS])
def test_a_script_runs(script: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def names() -> dict[str, object]:
    """What the pages take for granted: a trained network and loaders."""
    x, y = classification(120)
    x_val, y_val = classification(120, seed=1)
    x_test, y_test = classification(60, seed=2)
    torch.manual_seed(0)
    model = trained(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), x, y, 100)
    return {
        "model": model,
        "x": x,
        "train_loader": loader(x, y),
        "val_loader": loader(x_val, y_val),
        "test_loader": loader(x_test, y_test, shuffle=False),
        "test_x": x_test,
        "test_y": y_test,
    }


@pytest.mark.parametrize("block", BLOCKS, ids=[f"{page}-{number}" for page, number, _ in BLOCKS])
def test_a_block_of_a_page_runs(block: tuple[str, int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page, number, text = block
    exec(compile(text, f"{page} block {number}", "exec"), names())  # noqa: S102 - our own pages


def test_there_are_examples() -> None:
    assert len(SCRIPTS) >= 2
    assert {page for page, _, _ in BLOCKS} >= {"README.md"}


def test_links_of_the_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
