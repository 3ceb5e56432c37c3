"""FiLM against the alternatives, in the same policy: what it is told arrives otherwise, all else is equal."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchfilm.comparison import Comparison, compare
from torchfilm.data.table.demonstrations import Demonstrations
from torchfilm.systems.diffusion_policy import load
from torchfilm.systems.diffusion_policy.evaluate import evaluate, language_score
from torchfilm.systems.diffusion_policy.model import DiffusionPolicy, PolicyConfig
from torchfilm.systems.diffusion_policy.policy import Policy
from torchfilm.systems.diffusion_policy.reasoning import INSTRUCTION, Vocabulary
from torchfilm.systems.diffusion_policy.recipe import Recipe
from torchfilm.systems.diffusion_policy.running import train_policy
from torchfilm.training.checkpoint import write_json
from torchfilm.training.series import Progress, run_all

CLAIMED: dict[str, tuple[float, float, float]] = {
    "film": (92.3, 1.2, 0.5),
    "concat": (85.7, 2.8, 12.4),
    "cross_attention": (89.1, 15.6, 8.2),
}
"""Success in percent, latency in ms, parameters added in percent: claimed elsewhere, not measured by us."""


def _fields(**changes: Any) -> Callable[[PolicyConfig], PolicyConfig]:
    return lambda config: replace(config, **changes)


ALTERNATIVES: dict[str, Callable[[PolicyConfig], PolicyConfig]] = {
    "film": _fields(),
    "film_low_rank": _fields(head="lowrank:4"),
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
"""How the reasoning arrives, by name; the last two with as many parameters added as FiLM adds."""


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
        out: a folder that is new, or of a contest with the same numbers (ValueError otherwise).
        progress: hears which run comes next, how many are done, and of how many.

    Returns:
        plain values: "rows" by name, "claimed", and what was asked for.
    """
    description = _claim(out, contest, len(demonstrations.episodes))

    def run(config: PolicyConfig, seed: int, folder: Path) -> dict[str, float]:
        training = replace(contest.recipe.training, seed=seed)
        recipe = replace(contest.recipe, config=config, training=training)
        resume = (folder / "config.json").is_file()
        outcome = train_policy(folder.parent.name, recipe, demonstrations, folder, resume=resume)
        return measured(Policy(outcome.policy), contest, outcome.result.seconds / 60)

    configs = {name: ALTERNATIVES[name](contest.recipe.config) for name in contest.names}
    seeds = range(contest.seeds)
    results = run_all(configs, run, out, seeds=seeds, shares=("reach", "push"), progress=progress)
    costs = control_step({name: out / name / "seed_0" for name in contest.names}, demonstrations)
    rows = {name: summary(found) | cost(costs, name) for name, found in results.items()}
    found = {"rows": rows, "claimed": CLAIMED, **description}
    write_json(out / "table.json", found)
    return found


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
    swap = language_score(policy, max(contest.scenes // 2, 2), contest.scene_seed).effects["swap"].success
    assert swap is not None
    return {
        "reach": report.success("reach").value,
        "push": report.success("push").value,
        "reach_held_out": report.success("reach", held_out=True).value,
        "push_held_out": report.success("push", held_out=True).value,
        "collisions_plain": report.rows["reach plain"].collisions.value,
        "collisions_avoid": report.rows["reach avoid"].collisions.value,
        "push_collisions_avoid": report.rows["push avoid"].collisions.value,
        "energy_saved": report.energy_saved("reach"),
        "language": -swap.value,
        "minutes": minutes,
    }


class ControlStep(nn.Module):
    """One control step: a chunk from one observation and one instruction, all denoising steps in it."""

    def __init__(self, policy: DiffusionPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observations: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        """Return the chunk."""
        return self.policy.sample(observations, conditions)


def control_step(folders: Mapping[str, Path], demonstrations: Demonstrations, rounds: int = 15) -> Comparison:
    """Time one control step of each trained policy, in turn, beside one that hears nothing ("silent")."""
    policies = {name: load(folder) for name, folder in folders.items()}
    first = next(iter(policies.values()))
    silent = DiffusionPolicy(replace(first.config, vocabulary=(), vectors=(), listens=("blocks",)))
    state = np.concatenate((demonstrations.state[:1], demonstrations.environment[:1]), axis=1)
    observation = torch.from_numpy(state.astype(np.float32))[None].expand(1, first.config.observations, -1)
    words = Vocabulary(first.config.vocabulary)([demonstrations.episodes[0].told[0].text])
    steps: dict[str, nn.Module] = {"silent": ControlStep(silent)}
    steps |= {name: ControlStep(policy) for name, policy in policies.items()}
    return compare(steps, {"observations": observation, "conditions": {INSTRUCTION: words}}, rounds=rounds)


def cost(costs: Comparison, name: str) -> dict[str, Any]:
    """Parameters added in percent, and milliseconds of a control step beside those without reasoning."""
    silent, row = costs["silent"], costs[name]
    return {
        "parameters": row.parameters,
        "parameters_added": row.parameters / silent.parameters - 1,
        "milliseconds": row.milliseconds,
        "milliseconds_added": row.milliseconds - silent.milliseconds,
        "time": row.ratio,
    }


def _description(contest: Contest, episodes: int) -> dict[str, Any]:
    training = contest.recipe.training
    return {
        "minutes": training.minutes,
        "steps": training.steps,
        "scenes": contest.scenes,
        "scene_seed": contest.scene_seed,
        "demonstrations": episodes,
    }


def _claim(out: Path, contest: Contest, episodes: int) -> dict[str, Any]:
    """Say in the folder what is compared there; more names and seeds may come later, other numbers not."""
    out.mkdir(parents=True, exist_ok=True)
    wanted, path = _description(contest, episodes), out / "contest.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else wanted
    if found != wanted:
        raise ValueError(
            f"compare: expected in {out} a contest with {wanted}, found one with {found}. "
            "Use its numbers to go on, or another folder."
        )
    write_json(path, wanted)
    return wanted
