"""FiLM against the alternatives, in the same policy: what it is told arrives otherwise, all else is equal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchfilm.comparison import Comparison, compare
from torchfilm.data.table.demonstrations import Demonstrations
from torchfilm.data.table.wording import vocabulary
from torchfilm.heard_report import Hearing
from torchfilm.systems.diffusion_policy import build, describe, loss
from torchfilm.systems.diffusion_policy.data import Batch, Windows, rows_of
from torchfilm.systems.diffusion_policy.evaluate import evaluate, language_score
from torchfilm.systems.diffusion_policy.model import DiffusionPolicy, PolicyConfig
from torchfilm.systems.diffusion_policy.plans import Plans
from torchfilm.systems.diffusion_policy.policy import Policy
from torchfilm.systems.diffusion_policy.reasoning import Vocabulary
from torchfilm.systems.diffusion_policy.recipe import RECIPES, Recipe
from torchfilm.systems.diffusion_policy.running import begun, fitted, recordings_of, train_policy
from torchfilm.training import folder as run_folder
from torchfilm.training.checkpoint import write_json
from torchfilm.training.series import RESULT, SETTING, Progress, run_all

_BATCH = 64  # windows of the training step that is timed


def _fields(**changes: Any) -> Callable[[PolicyConfig], PolicyConfig]:
    return lambda config: replace(config, **changes)


ALTERNATIVES: dict[str, Callable[[PolicyConfig], PolicyConfig]] = {
    "film": _fields(),
    "film_low_rank": _fields(head="lowrank:21"),
    "scale": _fields(fusion="scale"),
    "bias": _fields(fusion="bias"),
    "concat": _fields(fusion="concat"),
    "cross_attention": _fields(fusion="cross_attention"),
    "condition_only": _fields(listens=("condition",)),
    "encoder_only": _fields(listens=("encoder",)),
    "film_before_activation": _fields(placement="before_activation"),
    "concat_matched": _fields(fusion="concat", matched=True),
    "cross_attention_matched": _fields(fusion="cross_attention", matched=True),
}
"""How the reasoning arrives, by name.

The head of low rank adds just under half a percent to the paper's network, the matched ones as much as FiLM.
"""


@dataclass(frozen=True)
class Contest:
    """What is compared, and how it is measured.

    Attributes:
        recipe: of all, with the budget.
        names: of `ALTERNATIVES`.
        seeds: how many trainings of each.
        scenes: fresh ones, on which each is measured in all manners; half of them for the language score.
        scene_seed: what they are drawn from.
    """

    recipe: Recipe
    names: tuple[str, ...] = tuple(ALTERNATIVES)
    seeds: int = 3
    scenes: int = 100
    scene_seed: int = 1

    def __post_init__(self) -> None:
        unknown = [name for name in self.names if name not in ALTERNATIVES]
        if unknown or not self.names:
            raise ValueError(
                f"compare: expected names among {', '.join(ALTERNATIVES)}, got {', '.join(unknown) or 'none'}"
            )
        if self.seeds < 1 or self.scenes < 2:
            raise ValueError(
                f"compare: expected at least 1 seed and 2 scenes, got {self.seeds} and {self.scenes}"
            )


def hold(
    contest: Contest,
    demonstrations: Demonstrations,
    out: Path,
    progress: Progress = lambda name, done, total: None,
) -> dict[str, Any]:
    """Train and measure all, and return the table, kept as `out`/table.json; what is done is not repeated.

    Each training has a folder, `out`/NAME/seed_S, and goes on where it was stopped.

    Args:
        contest: what is compared.
        demonstrations: the same for all.
        out: a folder that is new, or of the same contest. Another recipe, network, budget or data, or another
            process at work there, is a ValueError that names it; more names and seeds may come later.
        progress: hears which run comes next, how many are done, and of how many.

    Returns:
        plain values: "rows" by name, and what was asked for.
    """
    with run_folder.alone_in(out):
        about = run_folder.describe(contest.recipe.training, _what_is_compared(contest, demonstrations))
        run_folder.open_folder(out, about, resume=run_folder.started(out))
        run_folder.write_description(out, about)
        return _held(contest, demonstrations, out, progress)


def _held(contest: Contest, demonstrations: Demonstrations, out: Path, progress: Progress) -> dict[str, Any]:
    plans = Plans(demonstrations)  # of one seed, all are asked the same

    def run(config: PolicyConfig, seed: int, folder: Path) -> dict[str, float]:
        training = replace(contest.recipe.training, seed=seed)
        recipe = replace(contest.recipe, config=config, training=training)
        name = folder.parent.name
        outcome = train_policy(name, recipe, demonstrations, folder, resume=begun(folder), plans=plans)
        return measured(Policy(outcome.policy), contest, outcome.result.seconds / 60)

    def setting(config: PolicyConfig) -> dict[str, Any]:
        recipe = asdict(replace(contest.recipe, config=config))
        return recipe | _what_is_compared(contest, demonstrations)

    configs = {name: ALTERNATIVES[name](contest.recipe.config) for name in contest.names}
    seeds, shares = range(contest.seeds), ("reach", "push")
    results = run_all(configs, run, out, describe=setting, seeds=seeds, shares=shares, progress=progress)
    costs = Costs.of(configs, demonstrations)
    training = contest.recipe.training
    found = {
        "rows": {name: summary(numbers) | costs.row(name) for name, numbers in results.items()},
        "minutes": training.minutes,
        "steps": training.steps,
        "scenes": contest.scenes,
        "scene_seed": contest.scene_seed,
        "demonstrations": len(demonstrations.episodes),
        "runs": {
            name: {"setting": setting(config), "results": results[name]} for name, config in configs.items()
        },
    }
    write_json(out / "table.json", found)
    return found


def restore(found: Mapping[str, Any], out: Path) -> None:
    """Put the runs of a table into the folder `out`, where `hold` goes on from them; those there stay.

    Of each run there are the numbers and what they depend on, which is compared as ever; no weights.
    """
    for name, runs in found["runs"].items():
        for seed, numbers in enumerate(runs["results"]):
            folder = out / name / f"seed_{seed}"
            if not (folder / RESULT).is_file():
                folder.mkdir(parents=True, exist_ok=True)
                write_json(folder / SETTING, runs["setting"])
                write_json(folder / RESULT, numbers)


def summary(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, and range over the seeds, of each number; shares in 0..1, energy as a share of the plain one."""
    found: dict[str, Any] = {"seeds": len(results)}
    for key in results[0]:
        values = [one[key] for one in results]
        found[key] = {"mean": float(np.mean(values)), "low": min(values), "high": max(values)}
    return found


def measured(policy: Policy, contest: Contest, minutes: float) -> dict[str, float]:
    """The numbers of one run: success, collisions when told to avoid, energy, the language score."""
    report = evaluate(policy, contest.scenes, contest.scene_seed)
    hearing = language_score(policy, max(contest.scenes // 2, 2), contest.scene_seed)
    return {
        "reach": report.success("reach").value,
        "push": report.success("push").value,
        "reach_held_out": report.success("reach", held_out=True).value,
        "push_held_out": report.success("push", held_out=True).value,
        "collisions_plain": report.rows["reach plain"].collisions.value,
        "collisions_avoid": report.rows["reach avoid"].collisions.value,
        "push_collisions_avoid": report.rows["push avoid"].collisions.value,
        "energy_saved": report.energy_saved("reach"),
        "language": _lost(hearing, "swap"),
        "language_blank": _lost(hearing, "blank"),
        "language_paraphrase": _lost(hearing, "paraphrase"),
        "minutes": minutes,
    }


def _lost(hearing: Hearing, told: str) -> float:
    """The share of successes that is lost when told something else."""
    change = hearing.effects[told].success
    assert change is not None
    return -change.value


class ControlStep(nn.Module):
    """One control step: a chunk from one observation and one instruction, all denoising steps in it."""

    def __init__(self, policy: DiffusionPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, batch: Batch) -> Tensor:
        """Return the chunk for the first of the batch."""
        return self.policy.sample(batch.observations[:1], rows_of(batch.reasoning, torch.tensor([0])))


class TrainingStep(nn.Module):
    """One step of training without the optimiser's: the loss of a batch and its gradient."""

    def __init__(self, policy: DiffusionPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss; the gradients are dropped."""
        with torch.enable_grad():
            value = loss(self.policy, batch).value
            value.backward()
        self.policy.zero_grad(set_to_none=True)
        return value.detach()


@dataclass(frozen=True)
class Costs:
    """What the alternatives cost, beside the same policy that hears nothing ("silent").

    Attributes:
        control, training: a `ControlStep` and a `TrainingStep`, measured in turn.
        policies: by name.
    """

    control: Comparison
    training: Comparison
    policies: Mapping[str, DiffusionPolicy]

    @classmethod
    def of(
        cls, configs: Mapping[str, PolicyConfig], demonstrations: Demonstrations, rounds: int = 15
    ) -> Costs:
        """Measure untrained policies over these demonstrations; what they have learned costs nothing."""
        words = Vocabulary(vocabulary())
        recordings = recordings_of(demonstrations, words)
        policies = {name: build(fitted(config, recordings, words)) for name, config in configs.items()}
        config = next(iter(policies.values())).config
        windows = Windows(recordings, config.observations, config.horizon)
        batch = windows.at(np.random.default_rng(0).choice(len(windows), _BATCH))
        silent = build(replace(config, vocabulary=(), vectors=(), listens=("blocks",)))
        every = {"silent": silent, **policies}
        control = compare(
            {name: ControlStep(one) for name, one in every.items()}, {"batch": batch}, rounds=rounds
        )
        training = compare(
            {name: TrainingStep(one) for name, one in every.items()}, {"batch": batch}, rounds=rounds
        )
        return cls(control, training, policies)

    def row(self, name: str) -> dict[str, Any]:
        """Shares of the silent policy: parameters added, and times; milliseconds of a control step."""
        silent, row = self.control["silent"], self.control[name]
        return {
            "parameters": row.parameters,
            "parameters_added": _listening(self.policies[name]) / silent.parameters,
            "parameters_added_paper": added_at_paper_size(name, self.policies[name].config.vocabulary),
            "milliseconds": row.milliseconds,
            "milliseconds_added": row.milliseconds - silent.milliseconds,
            "time": row.ratio,
            "training_time": self.training[name].ratio,
        }


def added_at_paper_size(name: str, vocabulary: tuple[str, ...]) -> float | None:
    """The share of parameters that an alternative adds to the paper's network; None where it has no place."""
    if name == "encoder_only":  # the paper's state needs no encoder
        return None
    silent = RECIPES["paper"].config
    config = ALTERNATIVES[name](replace(silent, vocabulary=vocabulary))
    with torch.device("meta"):
        policies = [DiffusionPolicy(one) for one in (silent, config)]
    return _listening(policies[1]) / sum(p.numel() for p in policies[0].parameters())


def _listening(policy: DiffusionPolicy) -> int:
    """Parameters that bring the reasoning to its places."""
    return sum(parameter.numel() for parameter in policy.listeners.parameters())


def _what_is_compared(contest: Contest, demonstrations: Demonstrations) -> dict[str, Any]:
    """All beside the training itself that decides what comes out."""
    understanding = contest.recipe.understanding
    return {
        "network": describe(contest.recipe.config),
        "understanding": None if understanding is None else asdict(understanding),
        "words": list(vocabulary()),
        "demonstrations": len(demonstrations.episodes),
        "frames": len(demonstrations.state),
        "scenes": contest.scenes,
        "scene_seed": contest.scene_seed,
    }
