"""Do the table's experts do what they are told, and how many steps of control does one core make in a second?

Reaching and pushing in all four manners on the same scenes, in half of which the obstacle is in the way.

    python benchmarks/table_world.py [--episodes 1000] [--seed 0]
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from measuring import parser_of, save
from torchfilm.data.table.env import TableEnv, TableVectorEnv
from torchfilm.data.table.episodes import Episode, sample_episode
from torchfilm.data.table.playing import Step, play
from torchfilm.data.table.render import BACKENDS, Renderer
from torchfilm.data.table.tasks import HOWS, Task
from torchfilm.data.table.trials import Trials


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = np.random.default_rng(given.seed)
    experts = {what: experts_of(rng, what, given.episodes) for what in ("reach", "push")}
    save("table_world", {"seed": given.seed, "experts": experts, "steps_per_cpu_second": speeds(rng)})


def experts_of(rng: np.random.Generator, what: Any, count: int) -> dict[str, dict[str, float]]:
    drawn = [sample_episode(rng, what=what, how="plain", blocked=i % 2 == 0) for i in range(count)]
    blocked = np.arange(count) % 2 == 0
    return {how: expert_of(drawn, blocked, how) for how in HOWS}


def expert_of(drawn: list[Episode], blocked: np.ndarray, how: Any) -> dict[str, float]:
    steps = 0

    def watch(step: Step) -> None:
        nonlocal steps
        steps += len(step.rows)

    tasks = [[Task(t.which, t.what, how, t.place) for t in episode.tasks] for episode in drawn]
    start = time.process_time()
    done = [arms[0] for arms in play([episode.scene for episode in drawn], tasks, watch=watch)]
    seconds = time.process_time() - start
    hits = np.array([outcome.collisions > 0 for outcome in done])
    return {
        "episodes": len(done),
        "success": float(np.mean([o.success for o in done])),
        "collided_where_in_the_way": float(hits[blocked].mean()),
        "collided_elsewhere": float(hits[~blocked].mean()),
        "energy_joules": float(np.mean([o.energy for o in done])),
        "time_seconds": float(np.mean([o.time for o in done])),
        "path_metres": float(np.mean([o.path for o in done])),
        "clearance_metres": float(np.mean([o.clearance for o in done])),
        "steps_per_cpu_second": steps / seconds,
    }


def speeds(rng: np.random.Generator) -> dict[str, float]:
    found = {"TableEnv": rate(single(), 1, 2000)}
    for count in (16, 64, 256):
        many = TableVectorEnv(count)
        many.reset(seed=0)
        actions = many.action_space.sample()
        found[f"TableVectorEnv({count})"] = rate(lambda m=many, a=actions: m.step(a), count, 6400 // count)
        drawn = [sample_episode(rng) for _ in range(count)]
        trials = Trials([e.scene for e in drawn], [e.tasks for e in drawn])
        targets = trials.tables.fingers + 0.01
        found[f"Trials({count})"] = rate(lambda t=trials, a=targets: t.step(a), count, 6400 // count)
    scene = drawn[0].scene
    for backend in BACKENDS:
        try:
            draw = Renderer(96, backend)
        except ValueError:
            continue
        joints, things = trials.tables.joints[0], trials.tables.things[0]
        found[f"picture, {backend}"] = rate(lambda d=draw, j=joints, t=things: d(scene, j, t), 1, 300)
        draw.close()
    return found


def single() -> Callable[[], None]:
    env = TableEnv()
    env.reset(seed=0)

    def step() -> None:
        *_, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()

    return step


def rate(step: Callable[[], Any], count: int, times: int) -> float:
    """What `times` calls make in a second of this process, `count` in each."""
    step()
    start = time.process_time()
    for _ in range(times):
        step()
    return count * times / (time.process_time() - start)


if __name__ == "__main__":
    main()
