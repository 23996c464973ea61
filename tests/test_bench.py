"""Every script of bench/ starts and comes to its end, as its user would start it, on a tiny model."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.name for path in (ROOT / "bench").glob("[a-z]*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_bench_runs_small(name, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / name), "--small"], capture_output=True, text=True, cwd=tmp_path, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"$ python bench/{name}" in done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_bench_has_its_line_in_the_readme(name):
    assert f"| `{name}`" in (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
