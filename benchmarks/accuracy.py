"""How often is a trained network right, by kind, type and family of question?

Give one run or several of a recipe (its seeds) that `torchfilm train` left, and a split that no choice was
made on; the file is results/visual_reasoning_NAME.json, and the READMEs' tables show every such file as a
column, several runs as their mean and range. Minutes and seed are those that the run's folder tells; a bundle
without its run's folder needs --minutes and --seed.

    python benchmarks/accuracy.py NAME RUN [RUN ...] --data DIR --split test [--cores 2] [--blind RUN]
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from measuring import RESULTS, parser_of, public, save
from torchfilm.data.clevr.files import ClevrFolder
from torchfilm.systems.visual_reasoning.bundle import load_blind, load_bundle
from torchfilm.systems.visual_reasoning.evaluate import evaluate
from torchfilm.systems.visual_reasoning.running import Material
from torchfilm.training.checkpoint import newest_checkpoint

PLACES = ("--data", "--blind")


def training(run: Path | None, minutes: float | None, seed: int | None) -> dict[str, Any]:
    """Seed, steps and minutes of a run by its own folder, unless they are given; None where nobody knows."""
    found: dict[str, Any] = {"seed": None, "steps": None, "minutes": None}
    newest = None if run is None else newest_checkpoint(run / "checkpoints")
    if run is not None and newest is not None:
        counters = json.loads((newest / "state.json").read_text(encoding="utf-8"))["counters"]
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))["train"]
        took = round(counters["seconds"] / 60, 1)
        found = {"seed": config["seed"], "steps": counters["step"], "minutes": took}
    given = {"seed": seed, "minutes": minutes}
    found |= {name: value for name, value in given.items() if value is not None}
    return found | {"seed": found["seed"] or 0}


def measured(run: Path | None, given: argparse.Namespace) -> dict[str, Any]:
    """One run's report in plain values, with its recipe and training."""
    bundle, folder = load_bundle(run), ClevrFolder(given.data)
    exam = Material(folder, bundle.vocabulary, bundle.sight).exam(bundle.network.config, given.split)
    known = None
    if given.train_split in folder.splits():
        known = folder.encoded(given.train_split, exam.vocabulary)
    start = time.process_time()
    blind = load_blind(given.blind, run, bundle.vocabulary)
    report = evaluate(bundle.network, exam, blind=blind, train=known)
    return {
        **report.to_json(),
        "recipe": bundle.recipe,
        **training(run, given.minutes, given.seed),
        "answering_seconds": time.process_time() - start,
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("name", help="of the results file")
    parser.add_argument("runs", nargs="*", type=Path, help="runs or bundles; default: the shipped checkpoint")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument(
        "--train-split", default="train", help="for the most frequent answers, if it is there"
    )
    parser.add_argument("--blind", type=Path, help="a run that does not see, reported beside")
    parser.add_argument(
        "--minutes", type=float, help="what the training took, with those that it started from"
    )
    parser.add_argument("--cores", type=int, help="that it took them of")
    parser.add_argument("--label", help="the column's name in the tables, instead of recipe and minutes")
    parser.add_argument("--seed", type=int, help="the training's")
    parser.add_argument(
        "--more", action="store_true", help="beside the runs that the file has, not in their place"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    kept = RESULTS / f"visual_reasoning_{given.name}.json"
    runs = json.loads(kept.read_text(encoding="utf-8"))["runs"] if given.more else []
    runs += [measured(run, given) for run in given.runs or [None]]
    alike = {(run["recipe"], run["n"], run["scenes"]) for run in runs}
    if len(alike) > 1:
        parser.error(f"expected runs of one recipe, asked the same questions, got {sorted(alike)}")
    more = {"label": given.label, "cores": given.cores}
    save(
        f"visual_reasoning_{given.name}",
        {
            "recipe": runs[0]["recipe"],
            **{name: value for name, value in more.items() if value is not None},
            "accuracy": sum(run["accuracy"] for run in runs) / len(runs),
            "runs": runs,
        },
        command=f"accuracy.py {public(sys.argv[1:], PLACES)}",
    )


if __name__ == "__main__":
    main()
