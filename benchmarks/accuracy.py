"""How often is a trained network right, by kind, type and family of question?

Give a run that `torchfilm train` left, and a split that no choice was made on; the file is
results/visual_reasoning_NAME.json, and the READMEs' tables show every such file.

    python benchmarks/accuracy.py NAME RUN --data DIR --split test --minutes 15 --seed 0 [--blind RUN]
"""

import argparse
import time
from pathlib import Path

import torch

from measuring import save
from torchfilm.data.clevr.files import ClevrFolder
from torchfilm.systems.visual_reasoning.bundle import load_blind, load_bundle
from torchfilm.systems.visual_reasoning.evaluate import evaluate
from torchfilm.systems.visual_reasoning.running import Material


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help="of the results file")
    parser.add_argument("run", nargs="?", type=Path, help="run or bundle; default: the shipped checkpoint")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument(
        "--train-split", default="train", help="for the most frequent answers, if it is there"
    )
    parser.add_argument("--blind", type=Path, help="a run that does not see, reported beside")
    parser.add_argument("--minutes", type=float, help="what the training took, of all cores")
    parser.add_argument("--label", help="the column's name in the tables, instead of recipe and minutes")
    parser.add_argument("--seed", type=int, default=0, help="the training's")
    given = parser.parse_args()
    if given.name is None or given.data is None:  # `make bench` runs every benchmark; this one needs a run
        parser.print_help()
        return
    torch.set_num_threads(1)
    bundle, folder = load_bundle(given.run), ClevrFolder(given.data)
    exam = Material(folder, bundle.vocabulary, bundle.sight).exam(bundle.network.config, given.split)
    known = None
    if given.train_split in folder.splits():
        known = folder.encoded(given.train_split, exam.vocabulary)
    start = time.process_time()
    report = evaluate(
        bundle.network, exam, blind=load_blind(given.blind, given.run, bundle.vocabulary), train=known
    )
    save(
        f"visual_reasoning_{given.name}",
        {
            **report.to_json(),
            "recipe": bundle.recipe,
            "seed": given.seed,
            "minutes": given.minutes,
            **({"label": given.label} if given.label else {}),
            "answering_seconds": time.process_time() - start,
        },
        command=f"accuracy.py {given.name} RUN --data DIR --split {given.split}",
    )


if __name__ == "__main__":
    main()
