"""Does a policy do what it is told, and does it listen? On fresh scenes, for one training or several.

Success, collisions and energy by deed and manner, then the language score; the file is
results/diffusion_policy_laptop.json, and the READMEs' tables show it.

    python benchmarks/policy_success.py RUN_0 RUN_1 RUN_2 --minutes 15
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from measuring import save


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, help="one of each training seed, from 0 on")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--language-scenes", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1, help="of the scenes")
    parser.add_argument("--execution", type=int, help="actions executed of each chunk; default: the run's")
    parser.add_argument("--minutes", type=float, help="what each training took, of one core")
    given = parser.parse_args()
    if given.minutes is None or not given.runs:  # `make bench` runs them all; this one needs trainings
        parser.print_help()
        return
    options = ["--execution", str(given.execution)] if given.execution else []
    scenes = ["--scenes", str(given.scenes), "--seed", str(given.seed), *options]
    talk = ["--scenes", str(given.language_scenes), "--experiment", "language", *options]
    runs = [
        {**evaluated([str(run), *scenes]), "language": evaluated([str(run), *talk])} for run in given.runs
    ]
    save(
        "diffusion_policy_laptop",
        {"minutes": given.minutes, "runs": runs},
        " ".join(["policy_success.py RUN ...", *scenes]),
    )


def evaluated(options: list[str]) -> dict[str, object]:
    """What `torchfilm eval diffusion_policy` says."""
    torchfilm = Path(sys.executable).with_name("torchfilm")
    command = [torchfilm, "eval", "diffusion_policy", *options, "--json"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


if __name__ == "__main__":
    main()
