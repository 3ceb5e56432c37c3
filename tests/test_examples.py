"""Every example runs, as a user would run it, and says what it promises."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PROMISES = {
    "ask_a_scene.py": r"%",
    "film_layer.py": "class 2: gamma +3.00 (true 3), beta -2.00 (true -2)",
    "read_clevr.py": "240 of 240 programs give the answer in the file",
}


def test_every_example_has_its_promise():
    assert sorted(PROMISES) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", PROMISES)
def test_the_example_runs_and_keeps_its_promise(name: str):
    command = [sys.executable, "-W", "error", str(EXAMPLES / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert PROMISES[name] in done.stdout
