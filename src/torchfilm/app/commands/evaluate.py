"""`torchfilm eval`."""

from __future__ import annotations

import contextlib
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torchfilm.app.commands.train import SEEN, known_system
from torchfilm.app.console import Bar, emit, note, percent, table
from torchfilm.app.options import (
    OptionalFloat,
    OptionalInt,
    OptionalPath,
    OptionalText,
    RunPath,
    SystemName,
    check_finite,
    check_least,
    check_own,
)

if TYPE_CHECKING:
    from torchfilm.app.commands.inspect import Inspect
    from torchfilm.data.clevr.encoding import EncodedQuestions
    from torchfilm.data.clevr.files import ClevrFolder
    from torchfilm.systems.visual_reasoning.bundle import Bundle
    from torchfilm.systems.visual_reasoning.evaluate import Report, Score
    from torchfilm.systems.visual_reasoning.exam import Exam
    from torchfilm.systems.visual_reasoning.robustness import Robustness

USUAL_SPLITS = ("test", "val", "testA", "valA", "testB", "valB", "train")
UNSEEN_SPLITS = ("testB", "valB")
FRESH = "fresh"

EXPERIMENTS = {
    "visual_reasoning": ("accuracy", "means", "noise", "arithmetic", "ablations", "data_size", "cogent"),
    "diffusion_policy": ("accuracy", "language"),
}
"""System -> what can be measured."""

OWN = {
    "visual_reasoning": (
        *("data", "split", "blind", "families", "limit", "out", "features", "images", "cache"),
        *("recipe", "minutes", "steps", "seeds", "only", "perception"),
    ),
    "diffusion_policy": ("guidance", "execution"),
}
"""System -> the options that it has for itself."""

_ASKED = ("run", "limit", "seed")
_TRAINED = ("recipe", "minutes", "steps", "seeds", "only", "perception")
READ = {
    "accuracy": (*_ASKED, "scenes", "blind", "families"),
    "means": (*_ASKED, "scenes"),
    "noise": (*_ASKED, "scenes"),
    "arithmetic": _ASKED,
    "ablations": _TRAINED,
    "data_size": (*_TRAINED, "blind"),
    "cogent": _TRAINED,
}
"""Experiment of visual_reasoning -> the options that not all of its experiments read."""

ASKED_OF = {"with --data": ("split", "images", "cache", "features"), "without --data": ("scenes",)}
"""Where the questions come from -> the options for that alone."""


@dataclass(frozen=True)
class Evaluate:
    """Measure a trained system: accuracy by kind and type of question, and the paper's experiments.

    Without RUN: the checkpoint shipped with the package. Without --data: fresh scenes, rendered on the spot.
    Experiments: accuracy; means (γ or β by their means); noise (on γ and β); arithmetic (zero-shot: RUN was
    trained on CoGenT's condition A, as runs/cogent/on_a/seed_0, and is asked about B). These train: ablations
    (the paper's tables), data_size (a curve), cogent (A to B with fine-tuning; --perception of condition A,
    since the shipped one has seen all combinations).

    Example: torchfilm eval visual_reasoning runs/first --data data-clevr --split val --families
    """

    system: SystemName = "visual_reasoning"
    """the system"""
    run: RunPath = None
    """run or bundle; default: the shipped checkpoint"""
    data: OptionalPath = None
    """the data folder; default: fresh scenes"""
    split: OptionalText = None
    """default: test, else val; arithmetic: testB, else valB"""
    experiment: Literal[
        "accuracy", "means", "noise", "arithmetic", "ablations", "data_size", "cogent", "language"
    ] = "accuracy"
    """what to measure; diffusion_policy: accuracy is success, language exchanges the instructions"""
    blind: OptionalPath = None
    """run or bundle of a network that does not see, reported beside; default: the bundle's own, in its
    folder blind, where there is one"""
    families: bool = False
    """a line for each of the 90 families too"""
    limit: OptionalInt = None
    """at most so many questions, drawn at random"""
    scenes: int = 200
    """how many fresh scenes"""
    seed: OptionalInt = None
    """of fresh scenes and of what is drawn; default: 0, and another one each time for fresh scenes"""
    out: OptionalPath = None
    """folder for figures and the numbers behind them; default: runs/EXPERIMENT"""
    recipe: str = "laptop"
    """what the experiments that train, train"""
    minutes: OptionalFloat = None
    """their budget for each training; default: the recipe's"""
    steps: OptionalInt = None
    """their budget in steps, instead of minutes"""
    seeds: int = 1
    """how often they train each setting"""
    only: tuple[str, ...] = ()
    """ablations: these names; data_size: these numbers of scenes; cogent: these numbers of questions"""
    perception: OptionalPath = None
    """what they see with: run or bundle; default: the shipped one"""
    features: OptionalPath = None
    """the folder with SPLIT_features.h5 for a network over features; default: the data folder"""
    images: OptionalPath = None
    """the folder with the images, where they lie elsewhere: CLEVR-Humans is questions alone"""
    guidance: float = 1.0
    """of diffusion_policy: beyond 1 the instruction is exaggerated, at twice the cost"""
    execution: OptionalInt = None
    """of diffusion_policy: how many actions are executed before the next are planned; default: its own"""
    cache: OptionalPath = None
    """where derived files are kept; default: .cache in the data folder"""
    json: bool = False
    """print one JSON object"""

    def __call__(self) -> None:
        """Measure."""
        known_system(self.system)
        self._check()
        if self.system == "diffusion_policy":
            from torchfilm.app.commands import policy

            policy.evaluate(self)
            return
        if self.experiment in ("ablations", "data_size", "cogent"):
            from torchfilm.app.commands.experiments import SERIES

            SERIES[self.experiment](self)
            return
        from torchfilm.systems.visual_reasoning.bundle import load_bundle

        usual = UNSEEN_SPLITS if self.experiment == "arithmetic" else USUAL_SPLITS
        if self.experiment == "arithmetic" and (self.run is None or self.data is None):
            raise ValueError(
                "eval --experiment arithmetic asks about what the network has never seen: expected RUN, "
                "trained on CoGenT's condition A, and --data with testB or valB, got no "
                f"{'RUN (the shipped one has seen all)' if self.run is None else '--data'}. "
                "Train one with --experiment cogent: runs/cogent/on_a/seed_0."
            )
        bundle = load_bundle(self.run)
        check_own(self, SEEN, bundle.network.config.input, "network over")
        with data_folder(self, bundle) as (folder, seed):
            split = self.split or usual_split(folder, usual)
            exam = bundle_exam(bundle, folder, split, self.features)
            if self.limit is not None:
                exam = exam.sample(self.limit, seed)
            how = {
                "accuracy": self._accuracy,
                "arithmetic": self._arithmetic,
                "means": self._robustness,
                "noise": self._robustness,
            }
            found = how[self.experiment](bundle, exam, folder, seed)
        note(f"figures and numbers in {self._out}")
        if self.json:
            about = {"experiment": self.experiment, "recipe": bundle.recipe, "split": split}
            emit(about | found | {"seed": seed})

    def _check(self) -> None:
        """Raise ValueError for what the system has not, and for numbers out of range."""
        here = EXPERIMENTS[self.system]
        if self.experiment not in here:
            others = ", ".join(name for name, found in EXPERIMENTS.items() if self.experiment in found)
            raise ValueError(
                f"experiment {self.experiment!r} is one of {others}; {self.system} has {', '.join(here)}."
            )
        check_own(self, OWN, self.system, "system")
        if self.system == "visual_reasoning":
            check_own(self, READ, self.experiment, "experiment")
        check_least(self, limit=1, scenes=2 if self.system == "diffusion_policy" else 1, seeds=1, seed=0)
        check_finite(self, "guidance")

    @property
    def _out(self) -> Path:
        return self.out or Path("runs") / self.experiment

    def _accuracy(self, bundle: Bundle, exam: Exam, folder: ClevrFolder, seed: int) -> dict[str, Any]:
        from torchfilm.systems.visual_reasoning.bundle import load_blind
        from torchfilm.systems.visual_reasoning.evaluate import evaluate
        from torchfilm.systems.visual_reasoning.report_figures import write_report

        blind = load_blind(self.blind, self.run, bundle.vocabulary)
        known = training_questions(folder, exam)
        with Bar("answering", "questions") as bar:
            report = evaluate(bundle.network, exam, blind=blind, train=known, seed=seed, progress=bar)
        write_report(report, self._out)
        if not self.json:
            show_report(report, families=self.families)
        return report.to_json()

    def _robustness(self, bundle: Bundle, exam: Exam, folder: ClevrFolder, seed: int) -> dict[str, Any]:
        from torchfilm.systems.visual_reasoning.robustness import robustness

        known = training_questions(folder, exam)
        if known is None:
            note("no split train: the means are taken over the questions asked here")
        more = {"noise": (0.0,)} if self.experiment == "means" else {}
        network = film_network(bundle)
        with Bar("answering", "answers") as bar:
            found = robustness(
                network, exam, known or exam.questions, self._out, seed=seed, progress=bar, **more
            )
        if not self.json:
            show_robustness(found, noise=self.experiment == "noise")
        return found.to_json()

    def _arithmetic(self, bundle: Bundle, exam: Exam, folder: ClevrFolder, seed: int) -> dict[str, Any]:
        from torchfilm.systems.visual_reasoning.arithmetic import zero_shot

        found = zero_shot(film_network(bundle), exam, self._out)
        if not self.json:
            rows = [
                ["questions to which it applies", percent(found.before), percent(found.after)],
                ["all questions", percent(found.all_before), percent(found.all_after)],
            ]
            table(["", "as they are", "by arithmetic"], rows)
            print(f"It applies to {found.applies:,} of {found.n:,} questions.")
        return found.to_json() | {"accuracy": found.after}


@contextlib.contextmanager
def data_folder(options: Evaluate | Inspect, bundle: Bundle) -> Iterator[tuple[ClevrFolder, int]]:
    """The data folder and the seed; without one, fresh scenes in a folder that is gone afterwards."""
    from torchfilm.data.clevr.files import ClevrFolder
    from torchfilm.data.clevr.generate import generate_dataset

    check_own(options, ASKED_OF, f"with{'' if options.data else 'out'} --data")
    if options.data is not None:
        yield ClevrFolder(options.data, options.images, options.cache), options.seed or 0
        return
    scenes = options.scenes
    drawn = secrets.randbelow(2**31) if options.seed is None else options.seed
    note(f"no --data: rendering {scenes} fresh scenes, seed {drawn}")
    height, _ = bundle.picture_size
    with tempfile.TemporaryDirectory(prefix="torchfilm-") as place:
        with Bar("fresh scenes", "scenes") as bar:
            generate_dataset(
                place,
                FRESH,
                scenes,
                drawn,
                workers=None if scenes > 50 else 1,
                progress=bar,
                questions_per_scene=20,
                width=round(1.5 * height),
                height=height,
            )
        yield ClevrFolder(Path(place)), drawn


def usual_split(folder: ClevrFolder, usual: Sequence[str] = USUAL_SPLITS) -> str:
    """The split to measure on where none was named: the first of the usual ones that is there."""
    there = folder.splits()
    return next((name for name in (*usual, *there) if name in there), usual[0])


def bundle_exam(bundle: Bundle, folder: ClevrFolder, split: str, features: Path | None = None) -> Exam:
    """The questions of a split, and what the bundle's network sees of its scenes."""
    from torchfilm.systems.visual_reasoning.running import Material

    with Bar("looking at the pictures", "pictures") as bar:
        material = Material(folder, bundle.vocabulary, bundle.sight, progress=bar, features=features)
        return material.exam(bundle.network.config, split)


def training_questions(folder: ClevrFolder, exam: Exam, most: int = 50_000) -> EncodedQuestions | None:
    """At most `most` of the folder's training questions; None where it has no such split."""
    split = next((name for name in ("train", "trainA") if name in folder.splits()), None)
    return None if split is None else folder.encoded(split, exam.vocabulary).select(slice(most))


def film_network(bundle: Bundle) -> Any:
    """The bundle's network; ValueError for a baseline, which has no γ and β."""
    from torchfilm.systems.visual_reasoning.model import VisualReasoner

    if not isinstance(bundle.network, VisualReasoner):
        raise ValueError(f"expected a FiLM network, got the baseline {bundle.recipe!r}, which has no γ and β")
    return bundle.network


def show_report(report: Report, *, families: bool) -> None:
    """The table of an evaluation, beside the baselines that were measured."""
    baselines = {"blind": report.blind, "most frequent": report.mode}
    beside = {name: other for name, other in baselines.items() if other is not None}

    def line(group: str, name: Any, score: Score) -> list[str]:
        others = [getattr(other, group).get(name) for other in beside.values()]
        return [
            f"{'family ' if group == 'families' else ''}{name}",
            f"{score.n:,}",
            percent(score.accuracy),
            f"{100 * score.low:.1f} to {100 * score.high:.1f}",
            *("" if other is None else percent(other.accuracy) for other in others),
        ]

    rows: list[list[str]] = []
    for group in ("kinds", "types", "families") if families else ("kinds", "types"):
        rows += [line(group, name, score) for name, score in getattr(report, group).items()]
        rows.append([])
    interval = f"{100 * report.low:.1f} to {100 * report.high:.1f}"
    others = (percent(other.accuracy) for other in beside.values())
    rows.append(["all", f"{report.n:,}", percent(report.accuracy), interval, *others])
    table(["question", "n", "accuracy", "95 %", *beside], rows)


def show_robustness(found: Robustness, *, noise: bool) -> None:
    """The table of what γ and β are worth."""
    if noise:
        columns = zip(found.noise, found.noise_gamma, found.noise_beta, found.noise_both, strict=True)
        rows = [[f"{sd:g}", percent(g), percent(b), percent(both)] for sd, g, b, both in columns]
        table(["noise, SD", "on γ", "on β", "on both"], rows)
        return
    rows = [
        ["unchanged", percent(found.accuracy)],
        ["γ by its mean", percent(found.gamma_mean)],
        ["β by its mean", percent(found.beta_mean)],
        ["both by their means", percent(found.both_mean)],
        ["γ = 1", percent(found.gamma_one)],
        ["β = 0", percent(found.beta_zero)],
    ]
    table(["", "accuracy"], rows)
