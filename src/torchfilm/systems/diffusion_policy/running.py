"""From demonstrations and a recipe to a trained policy in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchfilm.data.table.demonstrations import Demonstrations
from torchfilm.data.table.tasks import HOWS
from torchfilm.data.table.wording import vocabulary
from torchfilm.heads import LowRankHead, SharedHead
from torchfilm.systems.diffusion_policy import build, describe, loss
from torchfilm.systems.diffusion_policy.data import Recordings, Windows
from torchfilm.systems.diffusion_policy.looking import SPOTS
from torchfilm.systems.diffusion_policy.model import DiffusionPolicy, PolicyConfig
from torchfilm.systems.diffusion_policy.observing import ThingsEncoder
from torchfilm.systems.diffusion_policy.plans import Plans
from torchfilm.systems.diffusion_policy.reasoning import INSTRUCTION, Vocabulary
from torchfilm.systems.diffusion_policy.recipe import Recipe
from torchfilm.systems.diffusion_policy.understanding import (
    WHERE,
    WHICH,
    Questions,
    Understanding,
    understanding_loss,
)
from torchfilm.training import (
    Interrupted,
    TrainResult,
    find_weights,
    first_process,
    load_weights,
    save_weights,
    started,
    train,
)
from torchfilm.training.checkpoint import write_json
from torchfilm.training.folder import digest, no_run

BALANCE = 0.5
"""How much long episodes are held back, see `Windows`."""

BEGINNINGS = 0.25
"""Share of what is learned from that are beginnings, where the side of a detour is chosen."""

SILENCE = 0.1
"""Share of the words that are left out while words are learned, see `Questions`."""

_SAMPLED = 20_000  # windows that the range of the actions is taken from


@dataclass(frozen=True, eq=False)
class Outcome:
    """A trained policy, and how its training went."""

    recipe: str
    policy: DiffusionPolicy
    result: TrainResult

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "recipe": self.recipe,
            "steps": self.result.steps,
            "seconds": round(self.result.seconds, 1),
            "loss": self.result.train.get("loss"),
            **self.result.evaluation,
        }


def recordings_of(
    demonstrations: Demonstrations, words: Vocabulary, vectors: Mapping[str, Tensor] | None = None
) -> Recordings:
    """Return demonstrations as a policy over states learns from them: arm and table in one vector.

    words: that are read one by one; `Vocabulary(())` where readers alone hear the instruction.
    vectors: what else is heard, by name one row per episode (`Reader`, a sensor).
    """
    both = np.concatenate((demonstrations.state, demonstrations.environment), axis=1)
    told = [episode.told[0].text for episode in demonstrations.episodes]
    return Recordings(
        torch.from_numpy(both.astype(np.float32)),
        torch.from_numpy(demonstrations.action.astype(np.float32)),
        demonstrations.starts,
        {**({INSTRUCTION: words(told)} if words.known else {}), **(vectors or {})},
    )


def fitted(config: PolicyConfig, recordings: Recordings, words: Vocabulary) -> PolicyConfig:
    """The config for these words and vectors, and this many numbers in an observation."""
    size, action = recordings.observations.shape[1], recordings.actions.shape[1]
    vectors = tuple((name, rows.shape[1]) for name, rows in recordings.heard.items() if name != INSTRUCTION)
    return replace(config, observation=size, action=action, vocabulary=words.known, vectors=vectors)


def fit_scales(policy: DiffusionPolicy, windows: Windows, seed: int = 0) -> None:
    """Take the ranges of observations and of actions from the recordings.

    Relative actions get a range for each step of a chunk: the first are a sixth of the last, and with one
    range for all they would be as blurred as the last, though they alone are executed.
    """
    policy.scale.fit(windows.recordings.observations)
    count = min(_SAMPLED, len(windows))
    batch = windows.at(np.random.default_rng(seed).choice(len(windows), count, replace=False))
    away = batch.actions - policy.origin(batch.observations)
    if not policy.config.relative:
        away = away.flatten(0, 1)
    if policy.turns:  # one range for all directions
        away = away.abs().amax(dim=-1, keepdim=True).expand_as(away)
        away = torch.cat([-away, away])
    policy.action_scale.fit(away)


def train_policy(
    name: str,
    recipe: Recipe,
    demonstrations: Demonstrations,
    out: Path,
    *,
    resume: bool = False,
    vectors: Mapping[str, Tensor] | None = None,
    words: Vocabulary | None = None,
    plans: Plans | None = None,
) -> Outcome:
    """Train a recipe in the run folder `out`, and leave the policy in `out`/model, also when interrupted.

    resume: go on with the run in `out`, whether it was stopped in understanding (`out`/understanding) or in
    acting. vectors: what the policy hears beside the instruction, and words: which it knows (default: all of
    the table's), as for `recordings_of`. plans: of these demonstrations, where several trainings share them.
    Under torchrun only rank 0 writes. Raises RunFolderError for another
    run in `out`, or none to resume, and ValueError where a recipe learns words first and there are none.
    """
    if resume and not begun(out):
        raise no_run(out)
    words = Vocabulary(vocabulary()) if words is None else words
    if recipe.understanding is not None and not words.known:
        raise ValueError(
            "train_policy: expected words for a recipe that learns them first, got none. Use "
            "replace(recipe, understanding=None)."
        )
    recordings = recordings_of(demonstrations, words, vectors)
    config = fitted(recipe.config, recordings, words)
    windows = Windows(recordings, config.observations, config.horizon, BALANCE, BEGINNINGS)
    torch.manual_seed(recipe.training.seed)
    policy = build(config)
    fit_scales(policy, windows)
    about = {
        "recipe": name,
        "network": describe(config),
        "episodes": len(demonstrations.episodes),
        "frames": len(windows),
        "data": digest(recordings.observations.numpy(), recordings.actions.numpy()),
        "balance": BALANCE,
        "beginnings": BEGINNINGS,
    }
    if recipe.understanding is not None:
        module, questions = asking(policy, windows, demonstrations, plans)
        first = out / "understanding"
        train(
            module,
            understanding_loss,
            questions,
            recipe.understanding,
            first,
            resume=resume and started(first),
            extra_config=about | {"silence": SILENCE},
        )
        if "encoder" in config.listens:  # a deaf one has not understood anything that could be held
            hold(policy)
            windows.recordings = with_words_read(policy, recordings)
    policy.to("cuda" if torch.cuda.is_available() else "cpu")
    try:
        result = train(
            policy,
            loss,
            windows,
            recipe.training,
            out,
            resume=resume and started(out),
            extra_config=about,
        )
    except Interrupted:
        if first_process():
            load_weights(find_weights(out), policy)
            save_policy(out / "model", name, policy)
        raise
    if first_process():
        save_policy(out / "model", name, policy)
    policy.eval()
    return Outcome(name, policy, result)


def begun(out: Path) -> bool:
    """Whether there is a run of `train_policy` in `out`, to go on with."""
    return started(out) or started(out / "understanding")


def asking(
    policy: DiffusionPolicy, windows: Windows, demonstrations: Demonstrations, plans: Plans | None = None
) -> tuple[Understanding, Questions]:
    """The policy as one that is asked what instructions mean, and the questions with their answers."""
    tasks = [episode.tasks[0] for episode in demonstrations.episodes]
    deeds = {deed: i for i, deed in enumerate(sorted({(t.what, t.place or "") for t in tasks}))}
    labels = {
        WHICH: torch.tensor([task.which for task in tasks]),
        WHERE: torch.tensor([SPOTS.index(task.place) for task in tasks]),
        "deed": torch.tensor([deeds[task.what, task.place or ""] for task in tasks]),
        "manner": torch.tensor([HOWS.index(task.how) for task in tasks]),
    }
    module = Understanding(policy, {"deed": len(deeds), "manner": len(HOWS)})
    return module, Questions(windows, labels, SILENCE, plans or Plans(demonstrations))


def hold(policy: DiffusionPolicy) -> None:
    """Hold words, looks and ways fast, as they were understood; the encoder's last layers go on learning."""
    assert policy.reasoning is not None
    policy.reasoning.parts[INSTRUCTION].get_submodule("condition").requires_grad_(requires_grad=False)
    if isinstance(policy.encoder, ThingsEncoder):
        policy.encoder.held = True
    # What a head's sites share would move the looks, while it learns for the last layers.
    for head in policy.listeners["encoder"].modules():
        if isinstance(head, LowRankHead):
            head.down.requires_grad = False
        elif isinstance(head, SharedHead):
            head.weight.requires_grad = False


@torch.no_grad()
def with_words_read(policy: DiffusionPolicy, recordings: Recordings) -> Recordings:
    """The recordings with the vectors of their instructions in place of the words, for words held fast."""
    assert policy.reasoning is not None
    read = policy.reasoning.parts[INSTRUCTION].get_submodule("condition")
    tokens, lengths = recordings.heard[INSTRUCTION]
    found = [read(part) for part in zip(tokens.split(1000), lengths.split(1000), strict=True)]
    states = torch.cat([one[0] if isinstance(one, tuple) else one for one in found])
    heard = (states, lengths) if isinstance(found[0], tuple) else states
    return replace(recordings, heard={**recordings.heard, INSTRUCTION: heard})


def save_policy(folder: Path, recipe: str, policy: DiffusionPolicy) -> None:
    """Write config.json and, last, weights.safetensors with the normalisation."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"recipe": recipe, "network": describe(policy.config)}
    write_json(folder / "config.json", content)
    save_weights(folder / "weights.safetensors", policy.state_dict())
