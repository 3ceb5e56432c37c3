"""Every example runs, as a user would run it, and says what it promises."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def mostly_right(said: str) -> bool:
    return said.count(": right") >= 6 and said.count("?\n") == 8


def guided(said: str) -> bool:
    without, plain, exaggerated = map(int, re.findall(r"scale \d\.0: (\d+)% in the column asked for", said))
    return without < 35 < plain < exaggerated - 10


PROMISES: dict[str, str | Callable[[str], bool]] = {
    "ask_a_scene.py": mostly_right,
    "diffusion_with_guidance.py": guided,
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
    promise = PROMISES[name]
    assert promise in done.stdout if isinstance(promise, str) else promise(done.stdout), done.stdout
