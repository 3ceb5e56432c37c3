"""Does a policy do what it is told, and does it listen? On fresh scenes, for one training or several.

Success, collisions and energy by deed and manner, then the language score; the file is
results/diffusion_policy_laptop.json, and the READMEs' tables show it.

Seeds and minutes are what the runs' own files say.

    python benchmarks/policy_success.py RUN_0 RUN_1 RUN_2
"""

import json
from pathlib import Path

from measuring import evaluated, parser_of, save


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="trainings, one of each seed")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--language-scenes", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1, help="of the scenes")
    parser.add_argument("--execution", type=int, help="actions executed of each chunk; default: the run's")
    given = parser.parse_args()
    options = ["--execution", str(given.execution)] if given.execution else []
    scenes = ["--scenes", str(given.scenes), "--seed", str(given.seed), *options]
    talk = ["--scenes", str(given.language_scenes), "--experiment", "language", *options]
    trained = [training(run) for run in given.runs]
    runs = [
        {
            **evaluated("diffusion_policy", str(run), *scenes),
            "language": evaluated("diffusion_policy", str(run), *talk),
        }
        for run in given.runs
    ]
    save(
        "diffusion_policy_laptop",
        {
            "seeds": [seed for seed, _ in trained],
            "minutes": round(max(minutes for _, minutes in trained), 1),
            "runs": runs,
        },
        " ".join(["policy_success.py RUN ...", *scenes]),
    )


def training(run: Path) -> tuple[int, float]:
    """The seed of a run, and the minutes that it took: understanding, where there was one, and acting."""
    seed = json.loads((run / "config.json").read_text(encoding="utf-8"))["train"]["seed"]
    stages = [stage for stage in (run / "understanding", run) if (stage / "metrics.jsonl").is_file()]
    lasts = [(stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1] for stage in stages]
    return seed, sum(json.loads(last)["seconds"] for last in lasts) / 60


if __name__ == "__main__":
    main()
