"""FiLM against concatenation, cross-attention and others in one policy: keep what `torchfilm compare` found.

The file is results/diffusion_policy_alternatives.json, and the policy's README shows it.

    torchfilm compare diffusion_policy --minutes 10 --seeds 3 --out OUT
    python benchmarks/policy_alternatives.py OUT
"""

import argparse
import json
from pathlib import Path

from measuring import save


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", nargs="?", type=Path, help="the folder of the comparison")
    given = parser.parse_args()
    if given.out is None:  # `make bench` runs every benchmark; this one needs a comparison
        parser.print_help()
        return
    found = json.loads((given.out / "table.json").read_text(encoding="utf-8"))
    seeds = max(row["seeds"] for row in found["rows"].values())
    budget = f"--minutes {found['minutes']:g}" if found["minutes"] else f"--steps {found['steps']}"
    save(
        "diffusion_policy_alternatives", found, f"torchfilm compare diffusion_policy {budget} --seeds {seeds}"
    )


if __name__ == "__main__":
    main()
