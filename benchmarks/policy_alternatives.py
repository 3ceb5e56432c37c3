"""FiLM against concatenation, cross-attention and others in one policy: keep what `torchfilm compare` found.

The file is results/diffusion_policy_alternatives.json, and the policy's README shows it.

    torchfilm compare diffusion_policy --steps 3000 --seeds 3 --out OUT
    python benchmarks/policy_alternatives.py OUT

With --restore it puts the runs of the file back into OUT, so that another seed or name can be added.
"""

import json
from pathlib import Path

from measuring import RESULTS, parser_of, save
from torchfilm.systems.diffusion_policy.alternatives import restore

NAME = "diffusion_policy_alternatives"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("out", type=Path, help="the folder of the comparison")
    parser.add_argument("--restore", action="store_true", help="put the file's runs into the folder")
    given = parser.parse_args()
    if given.restore:
        restore(json.loads((RESULTS / f"{NAME}.json").read_text(encoding="utf-8")), given.out)
        return
    found = json.loads((given.out / "table.json").read_text(encoding="utf-8"))
    seeds = max(row["seeds"] for row in found["rows"].values())
    budget = f"--minutes {found['minutes']:g}" if found["minutes"] else f"--steps {found['steps']}"
    save(NAME, found, f"torchfilm compare diffusion_policy {budget} --seeds {seeds}")


if __name__ == "__main__":
    main()
