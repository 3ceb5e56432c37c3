"""Every example runs, as a user would run it, and says what it promises."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PROMISES = {
    "ask_a_scene.py": r"%",
    "diffusion_with_guidance.py": "% in the column asked for",
    "film_layer.py": "class 2: gamma +3.00 (true 3), beta -2.00 (true -2)",
    "find_an_ignored_condition.py": "The condition is heard: swapping it changes the output",
    "fold_for_deployment.py": "classes of others than torch: []",
    "listen_to_metadata.py": "the same, listening: 0.0",
    "read_clevr.py": "240 of 240 programs give the answer in the file",
    "told_what_to_look_for.py": "100% right; without the question 25 %",
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
