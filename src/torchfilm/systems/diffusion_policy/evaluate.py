"""Does it do what it is told, and how it is told? On the same scenes, with controls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchfilm import heard
from torchfilm.data.table.episodes import Episode, sample_episode
from torchfilm.data.table.tasks import HOWS, WHATS, Task, tasks_of
from torchfilm.data.table.trials import Outcome
from torchfilm.data.table.wording import say
from torchfilm.heard_report import Hearing
from torchfilm.systems.diffusion_policy.looking import looks_of
from torchfilm.systems.diffusion_policy.policy import Policy
from torchfilm.systems.diffusion_policy.rollouts import roll_out

_Z = 1.96


@dataclass(frozen=True)
class Share:
    """A share of n episodes, 0..1, with its 95 % interval (Wilson's)."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, hits: Sequence[bool]) -> Share:
        """The share of True."""
        n = len(hits)
        if n == 0:
            return cls(math.nan, 0.0, 1.0, 0)
        p = sum(hits) / n
        middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
        return cls(p, max(0.0, middle - half), min(1.0, middle + half), n)


@dataclass(frozen=True)
class Row:
    """How it went with one deed in one manner.

    Attributes:
        success: the task was done.
        right: the thing that was meant was reached or moved, and no other instead.
        collisions: episodes in which the obstacle was touched.
        energy: mean in joules, over all episodes.
        seconds: mean duration.
        clearance: mean of the least distances from the obstacle in metres; negative where it was entered.
        path: mean length of the finger's path in metres.
        looks: the thing and the place that were looked at in the first moment were those meant; None for a
            policy that looks at everything.
    """

    success: Share
    right: Share
    collisions: Share
    energy: float
    seconds: float
    clearance: float
    path: float
    looks: Share | None = None


@dataclass(frozen=True)
class Report:
    """What was measured: `rows` by deed and manner ("reach avoid"), on the same scenes in every manner.

    Attributes:
        rows: as trained wordings say it.
        held_out: the same scenes and tasks in sentences that training never says.
        scenes: how many scenes; each was played in all manners.
        seed: what they were drawn from.
        guidance, execution: of the policy.
        failures: what simulators said that failed, which ended their episodes without success.
    """

    rows: dict[str, Row]
    held_out: dict[str, Row]
    scenes: int
    seed: int
    guidance: float
    execution: int
    failures: tuple[str, ...] = ()

    def success(self, what: str, *, held_out: bool = False) -> Share:
        """Success with one deed over all manners."""
        rows = self.held_out if held_out else self.rows
        found = [row.success for name, row in rows.items() if name.startswith(what)]
        n = sum(one.n for one in found)
        hits = round(sum(one.value * one.n for one in found if one.n))
        return Share.of([True] * hits + [False] * (n - hits))

    def energy_saved(self, what: str) -> float:
        """Energy when told to save it, as a share of the plain one's, on the same scenes."""
        return self.rows[f"{what} save"].energy / self.rows[f"{what} plain"].energy

    def to_json(self) -> dict[str, Any]:
        """Plain values, with `success`, `by_kind`, `n` and `seed`."""
        every = [self.success(what) for what in WHATS]
        n = sum(one.n for one in every)
        return {
            "success": sum(one.value * one.n for one in every) / n,
            "by_kind": {name: asdict(row) for name, row in self.rows.items()},
            "held_out": {name: asdict(row) for name, row in self.held_out.items()},
            "energy_saved": {what: self.energy_saved(what) for what in WHATS},
            "n": n,
            "scenes": self.scenes,
            "seed": self.seed,
            "guidance": self.guidance,
            "execution": self.execution,
            "failures": list(self.failures),
        }


def draw_scenes(count: int, seed: int) -> list[Episode]:
    """Scenes with a task for each, reach and push in turn, whose plain path the obstacle blocks."""
    rng = np.random.default_rng([seed, 7])
    return [sample_episode(rng, what=WHATS[i % 2], how="plain", blocked=True) for i in range(count)]


def in_all_manners(episodes: Sequence[Episode], seed: int, *, held_out: bool = False) -> list[Episode]:
    """The same scenes and tasks, told in each manner in turn."""
    rng = np.random.default_rng([seed, 8, int(held_out)])
    found = []
    for episode in episodes:
        for how in HOWS:
            task = Task(**{**episode.tasks[0].to_dict(), "how": how})
            found.append(Episode(episode.scene, (say(rng, episode.scene, task, held_out=held_out),)))
    return found


def evaluate(policy: Policy, scenes: int = 200, seed: int = 0, *, held_out: bool = True) -> Report:
    """Play fresh scenes, each in all four manners, told as in training and, after that, as never there.

    Args:
        policy: over states of the table.
        scenes: how many, at least one for each deed; each makes four episodes, or eight.
        seed: of scenes and wordings.
        held_out: whether to play the held-out wordings too.

    Raises:
        ValueError: for fewer scenes than deeds, of which no shares could be told.
    """
    if scenes < len(WHATS):
        raise ValueError(
            f"evaluate: expected at least {len(WHATS)} scenes, one for each deed, got {scenes}. Play more."
        )
    drawn = draw_scenes(scenes, seed)
    found, failures = {}, []
    for other in (False, True)[: 1 + held_out]:
        told = in_all_manners(drawn, seed, held_out=other)
        outcomes = roll_out(policy, told)
        found[other] = rows_of(told, outcomes, looks_right(policy, told))
        failures += [outcome.failure for outcome in outcomes if outcome.failure is not None]
    acted = policy.guidance, policy.execution
    return Report(found[False], found.get(True, {}), scenes, seed, *acted, tuple(failures))


def looks_right(policy: Policy, episodes: Sequence[Episode]) -> list[bool] | None:
    """Whether the thing and the place that are looked at are those meant; None where everything is."""
    if policy.network.config.encoder != "things" or not policy.reads:
        return None
    told = [episode.told[0] for episode in episodes]
    looks = looks_of(policy, [episode.scene for episode in episodes], [one.text for one in told])
    pairs = zip(looks.tasks(), told, strict=True)
    return [(seen.which, seen.place) == (one.task.which, one.task.place) for seen, one in pairs]


def rows_of(
    episodes: Sequence[Episode], outcomes: Sequence[Outcome], looks: Sequence[bool] | None = None
) -> dict[str, Row]:
    """Sort outcomes by deed and manner, and whether looks were right."""
    groups: dict[str, list[int]] = {f"{what} {how}": [] for what in WHATS for how in HOWS}
    tasks = [episode.tasks[0] for episode in episodes]
    for row, task in enumerate(tasks):
        groups[f"{task.what} {task.how}"].append(row)

    def row_of(rows: Sequence[int]) -> Row:
        found = [outcomes[row] for row in rows]
        return Row(
            Share.of([one.success for one in found]),
            Share.of([outcomes[row].chosen == tasks[row].which for row in rows]),
            Share.of([one.collisions > 0 for one in found]),
            float(np.mean([one.energy for one in found])),
            float(np.mean([one.time for one in found])),
            float(np.mean([one.clearance for one in found])),
            float(np.mean([one.path for one in found])),
            None if looks is None else Share.of([looks[row] for row in rows]),
        )

    return {name: row_of(rows) for name, rows in groups.items() if rows}


def language_score(policy: Policy, scenes: int = 100, seed: int = 0, batch: int = 50) -> Hearing:
    """Measure by `torchfilm.heard` whether the instruction is heard: right, swapped, blank, paraphrased.

    The condition is the meaning of an instruction (thing, deed, place, manner), put into words for the scene
    at hand, so that a swapped one is as well-formed there as the right one. Success is judged by what was
    meant at first; the paraphrase is a held-out wording.
    """
    rng = np.random.default_rng([seed, 9])
    episodes = [sample_episode(rng) for _ in range(scenes)]
    meanings = _meanings(episodes)
    batches = [(rows, meanings[rows], rows) for rows in torch.arange(scenes).split(batch)]

    def model(x: Tensor, cond: Tensor) -> dict[str, Tensor]:
        return _played(policy, [episodes[row] for row in x.tolist()], cond, seed)

    def other_words(cond: Tensor) -> Tensor:
        return torch.cat([cond[:, :3], torch.ones_like(cond[:, :1])], dim=1)

    return heard(
        model,
        batches,
        success=lambda output, _: output["success"],
        blank=lambda cond: torch.full_like(cond, -1),
        paraphrase=other_words,
        seed=seed,
    )


_DEEDS = (("reach", None), *(("push", place) for place in ("goal", "left", "right", "far")))


def _meanings(episodes: Sequence[Episode]) -> Tensor:
    """[thing, deed, manner, 1 for a held-out wording] of each episode; integers."""
    tasks = [episode.tasks[0] for episode in episodes]
    return torch.tensor([[t.which, _DEEDS.index((t.what, t.place)), HOWS.index(t.how), 0] for t in tasks])


def _played(policy: Policy, episodes: Sequence[Episode], cond: Tensor, seed: int) -> dict[str, Tensor]:
    """Play the scenes told what the meanings say (-1: nothing), judged by their own tasks."""
    texts: list[str | None] = []
    for row, (episode, meaning) in enumerate(zip(episodes, cond.tolist(), strict=True)):
        which, deed, manner, other = meaning
        if which < 0:
            texts.append(None)
            continue
        what, place = _DEEDS[deed]
        task = Task(which, what, HOWS[manner], place)
        assert task in tasks_of(episode.scene)
        rng = np.random.default_rng([seed, row])
        texts.append(say(rng, episode.scene, task, held_out=bool(other)).text)
    outcomes = roll_out(policy, episodes, texts)
    return {
        "chosen": torch.tensor([-1 if o.chosen is None else o.chosen for o in outcomes]),
        "path": torch.tensor([o.path for o in outcomes]),  # metres
        "success": torch.tensor([o.success for o in outcomes]),
    }
