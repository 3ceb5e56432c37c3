"""Look at a trained policy: one scene told four ways, two arms told different things, what each depth hears.

Each figure has the numbers behind it in a file of the same name.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8

from torchfilm import Modulation, plot
from torchfilm.canvas import Figure
from torchfilm.data.table.episodes import Episode, sample_episode
from torchfilm.data.table.playing import Step, play
from torchfilm.data.table.render import Renderer
from torchfilm.data.table.solids import MIDDLE, SPAN
from torchfilm.data.table.tasks import WHATS, How, Task
from torchfilm.data.table.trials import Outcome, positions_of
from torchfilm.data.table.wording import Instruction, say
from torchfilm.extras import needed
from torchfilm.summary import variances
from torchfilm.systems.diffusion_policy.evaluate import draw_scenes, in_all_manners
from torchfilm.systems.diffusion_policy.model import DiffusionPolicy
from torchfilm.systems.diffusion_policy.policy import Policy
from torchfilm.systems.diffusion_policy.reasoning import INSTRUCTION, Vocabulary
from torchfilm.systems.diffusion_policy.rollouts import Arms, track
from torchfilm.training.checkpoint import replace_file, write_csv, write_json

with needed("pictures need Pillow", "systems"):
    from PIL import Image

PARTS = ("which", "what", "how")
"""What an instruction is made of: the thing, the deed with its place, the manner."""

_FRAME = 50  # milliseconds of a picture: 20 steps of control a second
_HELD = 20  # pictures for which the end stays
_COMPANY: tuple[tuple[How, How], ...] = (("avoid", "save"), ("save", "avoid"))


@dataclass(frozen=True)
class Take:
    """One episode as it was seen: a picture of the table and the finger's position at each step."""

    told: Instruction
    outcome: Outcome
    pictures: list[UInt8[np.ndarray, "size size 3"]]
    path: Float[np.ndarray, "steps 2"]


def inspect(policy: Policy, out: Path, *, points: int = 3000, seed: int = 0) -> list[Path]:
    """Draw all figures into `out` and return the files.

    Args:
        policy: whose reasoning arrives by a FiLM of some kind (ValueError otherwise).
        out: the folder.
        points: instructions from which it is measured what each site hears.
        seed: of scenes and instructions.
    """
    return [
        *(file for what in WHATS for file in manners_figure(policy, what, out, seed=seed)),
        *company_figure(policy, out, seed=seed),
        *depth_figure(policy.network, out, points=points, seed=seed),
    ]


def manners_figure(
    policy: Policy, what: str, out: Path, *, seed: int = 0, size: int = 240, scene: int = 0
) -> list[Path]:
    """The same scene and deed told in four manners: a moving picture side by side, and the fingers' paths.

    Args:
        policy: who acts.
        what: "reach" or "push".
        out: gets WHAT_manners.gif, .png and .json.
        seed, scene: which of the scenes that `evaluate` plays with this seed.
        size: width and height of one picture in pixels.
    """
    scenes = [episode for episode in draw_scenes(2 * scene + 2, seed) if episode.tasks[0].what == what]
    takes = film_takes(policy, in_all_manners(scenes[scene : scene + 1], seed), size)
    return _written(out, f"{what}_manners", takes, takes)


def company_figure(policy: Policy, out: Path, *, seed: int = 0, size: int = 240) -> list[Path]:
    """Two arms on one table: one pushes and one reaches, each in a manner of its own, and then exchanged.

    Args:
        policy: who acts, for both arms in one batch.
        out: gets company.gif, the table as the first arm sees it, and company.png and company.json with the
            path of each arm in its own view.
        seed: of the scene.
        size: width and height of one picture in pixels.
    """
    takes = [company_takes(policy, episode, size) for episode in company(seed)]
    every = [one for arms in takes for one in arms]
    return _written(out, "company", [arms[0] for arms in takes], every)


def company(seed: int) -> list[Episode]:
    """One table of two arms, told twice: the first pushes and the second reaches, in exchanged manners."""
    rng = np.random.default_rng([seed, 13])
    drawn = sample_episode(rng, what="push", blocked=True, arms=2)
    pushed, other = drawn.tasks
    views = [drawn.scene.seen_by(arm) for arm in range(2)]
    return [
        Episode(
            drawn.scene,
            (
                say(rng, views[0], replace(pushed, how=first)),
                say(rng, views[1], Task(other.which, "reach", second)),
            ),
        )
        for first, second in _COMPANY
    ]


def company_takes(policy: Policy, episode: Episode, size: int) -> list[Take]:
    """Play one table of several arms, and keep what each arm saw, in its own view."""
    draw, things = Renderer(size, "drawn"), len(episode.scene.things)
    steps: list[Step] = []
    policy.reset([one.text for one in episode.told])
    arms = Arms(policy, len(episode.told))
    (outcomes,) = play([episode.scene], [episode.tasks], arms, steps.append)
    pictures = [
        draw(episode.scene, step.state[0, :, :2], positions_of(step.environment[0, 0], things))
        for step in steps
    ]
    paths = np.stack([step.state[0, :, 4:6] for step in steps], axis=1)
    turned = [picture[::-1, ::-1] for picture in pictures]
    return [
        Take(told, outcome, seen, path)
        for told, outcome, seen, path in zip(episode.told, outcomes, (pictures, turned), paths, strict=True)
    ]


def _written(out: Path, name: str, moving: Sequence[Take], still: Sequence[Take]) -> list[Path]:
    """The film of some takes, and of all that count their paths and numbers."""
    out.mkdir(parents=True, exist_ok=True)
    film = out / f"{name}.gif"
    replace_file(film, side_by_side(moving))
    rows = [
        {"told": take.told.text, **take.outcome.to_dict(), "finger": take.path.round(4).tolist()}
        for take in still
    ]
    return [film, plot.save(_paths(still), out / f"{name}.png"), write_json(out / f"{name}.json", rows)]


def film_takes(policy: Policy, episodes: Sequence[Episode], size: int) -> list[Take]:
    """Play episodes of one arm, and keep what was seen."""
    draw, told = Renderer(size, "drawn"), [episode.told[0] for episode in episodes]
    tracks = track(
        policy, [e.scene for e in episodes], [one.task for one in told], [one.text for one in told]
    )
    return [
        Take(
            one,
            found.outcome,
            [
                draw(episode.scene, joints[None], things)
                for joints, things in zip(found.state[:, :2], found.things, strict=True)
            ],
            found.state[:, 4:6],
        )
        for episode, one, found in zip(episodes, told, tracks, strict=True)
    ]


def side_by_side(takes: Sequence[Take]) -> bytes:
    """A GIF of all takes in a row, as fast as they were; those that end first stand still."""
    longest = max(len(take.pictures) for take in takes)
    frames = [
        Image.fromarray(np.hstack([take.pictures[min(i, len(take.pictures) - 1)] for take in takes]))
        for i in range(longest + _HELD)
    ]
    palette = frames[0].quantize(64)
    reduced = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    content = io.BytesIO()
    reduced[0].save(
        content, "GIF", save_all=True, append_images=reduced[1:], duration=_FRAME, loop=0, optimize=False
    )
    return content.getvalue()


Shares = dict[str, dict[str, dict[str, float]]]
"""Site -> "gamma" or "beta" -> part of the instruction -> share of the variance that it explains.

"deviation" beside the parts is the root of the mean variance over channels.
"""


def depth_figure(network: DiffusionPolicy, out: Path, *, points: int = 3000, seed: int = 0) -> list[Path]:
    """What the instruction does to γ and β by depth: the share of their variance that each part explains."""
    shares = shares_by_site(network, points=points, seed=seed)
    columns = [(symbol, name, part) for symbol, name in (("γ", "gamma"), ("β", "beta")) for part in PARTS]
    grid = np.array(
        [[found.get(name, {}).get(part, 0.0) for _, name, part in columns] for found in shares.values()]
    )
    figure = plot.table(
        grid,
        list(shares),
        [f"{symbol}: {part}" for symbol, _, part in columns],
        xlabel="part of the instruction",
        ylabel="site, in the order of the computation",
        unit="share of the variance explained",
    )
    path = plot.save(figure, out / "depth.png")
    return [path, write_json(out / "depth.json", shares), _csv(out / "depth.csv", shares)]


def shares_by_site(network: DiffusionPolicy, *, points: int = 3000, seed: int = 0) -> Shares:
    """Which part of the instruction explains how much of each site's γ and β, over fresh instructions."""
    rng = np.random.default_rng([seed, 11])
    told = [sample_episode(rng).told[0] for _ in range(points)]
    parts = {
        "which": [one.which for one in told],
        "what": [f"{one.task.what} {one.task.place or ''}" for one in told],
        "how": [one.task.how for one in told],
    }
    shares: Shares = {}
    for site, modulation in heard_by_site(network, [one.text for one in told]).items():
        values = {"gamma": modulation.gamma, "beta": modulation.beta}
        shares[site] = {
            name: {part: explained(value.numpy(), parts[part]) for part in PARTS}
            | {"deviation": float(value.std(dim=0).square().mean().sqrt())}
            for name, value in values.items()
            if isinstance(value, torch.Tensor)
        }
    return shares


@torch.no_grad()
def heard_by_site(network: DiffusionPolicy, texts: Sequence[str]) -> dict[str, Modulation]:
    """γ and β of every site for each text, in the order of the computation, in float32 on the CPU.

    Raises ValueError for a policy that hears no words, or whose fusion has no γ and β.
    """
    z = None
    if network.config.vocabulary:
        read = Vocabulary(network.config.vocabulary)(texts)
        told = tuple(part.to(network.unet.out.weight.device) for part in read)
        z = network.reason({INSTRUCTION: told}, len(texts))
    if z is None or isinstance(z, tuple):
        raise ValueError(
            f"inspect: expected a policy that hears an instruction as γ and β, got fusion "
            f"{network.config.fusion!r} and {len(network.config.vocabulary)} words."
        )
    found = {
        site: value.to("cpu", torch.float32) if isinstance(value, Modulation) else value
        for listen in network.listeners.values()
        for site, value in listen(z).items()
    }
    if not all(isinstance(value, Modulation) for value in found.values()):
        raise ValueError(
            f"inspect: expected fusion film, scale or bias, got {network.config.fusion!r}, without γ and β."
        )
    return found


def explained(values: Float[np.ndarray, "n channels"], labels: Sequence[str]) -> float:
    """Share 0..1 of the variance of `values` that lies between the groups of equal labels.

    Adjusted for the number of groups, so that labels by chance explain 0 on average:
    1 - (1 - between / total) (n - 1) / (n - groups).
    """
    n, groups = len(values), len(set(labels))
    between, total = (float(part.sum()) for part in variances(values, labels))
    if total < 1e-12 or groups in (1, n):
        return 0.0
    return max(0.0, 1 - (1 - between / total) * (n - 1) / (n - groups))


def _paths(takes: Sequence[Take]) -> Figure:
    """The last picture of each take, and the finger's path over it."""
    titles = [
        f"{textwrap.fill(take.told.text, 36)}\n{take.outcome.energy:.2f} J, {take.outcome.time:.1f} s, "
        f"{'obstacle touched' if take.outcome.collisions else 'clear of the obstacle'}"
        for take in takes
    ]
    size = len(takes[0].pictures[0])
    pixels = [
        np.stack(
            [
                (take.path[:, 0] - MIDDLE[0]) / SPAN * size + size / 2,
                size / 2 - (take.path[:, 1] - MIDDLE[1]) / SPAN * size,
            ],
            axis=-1,
        )
        for take in takes
    ]
    return plot.paths_over_pictures([take.pictures[-1] for take in takes], pixels, titles)


def _csv(path: Path, shares: Shares) -> Path:
    rows = (
        (site, name, *(row[part] for part in PARTS), row["deviation"])
        for site, found in shares.items()
        for name, row in found.items()
    )
    return write_csv(path, ("site", "parameter", *PARTS, "deviation"), rows)
