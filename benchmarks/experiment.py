"""What do the paper's experiments give on our networks? One results file per experiment.

The options are those of `torchfilm eval`; the file is results/visual_reasoning_EXPERIMENT.json, and the
tables of the READMEs show it.

    python benchmarks/experiment.py means --data DIR --split test --limit 8000
    python benchmarks/experiment.py ablations --data DIR --steps 4000 --only blocks_1 no_residual
    python benchmarks/experiment.py cogent --data DIR --perception DIR --seeds 3
    python benchmarks/experiment.py arithmetic runs/cogent/on_a/seed_0 --data DIR
"""

import sys

from measuring import evaluated, public, save

EXPERIMENTS = ("means", "noise", "arithmetic", "ablations", "data_size", "cogent")
PLACES = ("--data", "--out", "--cache", "--perception", "--blind", "--images")


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in EXPERIMENTS:
        print(__doc__)
        return
    name, *options = sys.argv[1:]
    found = evaluated("visual_reasoning", *options, "--experiment", name)
    found.pop("out", None)  # a place on this machine
    save(f"visual_reasoning_{name}", found, f"experiment.py {name} {public(options, PLACES)}")


if __name__ == "__main__":
    main()
