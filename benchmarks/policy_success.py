"""Does a policy do what it is told, and does it listen? On fresh scenes.

Success, collisions and energy by deed and manner, then the language score; the file is
results/diffusion_policy_laptop.json, and the READMEs' tables show it.

    python benchmarks/policy_success.py [RUN] --minutes 9.5 --training-seed 0
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
    parser.add_argument("run", nargs="?", type=Path, help="default: the shipped checkpoint")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--language-scenes", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1, help="of the scenes")
    parser.add_argument("--minutes", type=float, help="what the training took, of one core")
    parser.add_argument("--training-seed", type=int, default=0)
    given = parser.parse_args()
    if given.minutes is None:  # `make bench` runs every benchmark; this one needs a training
        parser.print_help()
        return
    run = [] if given.run is None else [str(given.run)]
    success = evaluated([*run, "--scenes", str(given.scenes), "--seed", str(given.seed)])
    language = evaluated([*run, "--scenes", str(given.language_scenes), "--experiment", "language"])
    numbers = {"minutes": given.minutes, "training_seed": given.training_seed, **success}
    command = f"policy_success.py --scenes {given.scenes} --seed {given.seed}"
    save("diffusion_policy_laptop", {**numbers, "language": language}, command)


def evaluated(options: list[str]) -> dict[str, object]:
    """What `torchfilm eval diffusion_policy` says."""
    torchfilm = Path(sys.executable).with_name("torchfilm")
    command = [torchfilm, "eval", "diffusion_policy", *options, "--json"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


if __name__ == "__main__":
    main()
