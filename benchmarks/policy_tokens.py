"""How many words that matter can FiLM, concatenation and cross-attention carry in the policy's U-Net?

A text of K words, each one of four heights, says what a chunk of 16 actions is. Either word k sets the k-th
part of the time, so that it matters at one place, or the k-th number of every action, so that all words
matter everywhere. Same U-Net, words, steps and batches for all; what is counted is the words obeyed in fresh
texts (the nearest height over its part is the one that was said; a quarter is chance).

    python benchmarks/policy_tokens.py OUT [--steps 1500] [--seeds 3]

Finished runs in OUT are not repeated.
"""

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from measuring import parser_of, save
from torchfilm.systems.diffusion_policy import Batch, DiffusionPolicy, PolicyConfig, build, loss, predict
from torchfilm.systems.diffusion_policy.reasoning import INSTRUCTION, Vocabulary
from torchfilm.training import Draw, TrainConfig, started, train
from torchfilm.training.series import run_all

HEIGHTS = MappingProxyType({"floor": -0.75, "low": -0.25, "high": 0.25, "top": 0.75})
HORIZON, TRIES = 16, 500
FUSIONS = ("film", "concat", "cross_attention")
COUNTS = (1, 4, 8, 16)
PLACES = ("time", "action")


@dataclass(frozen=True)
class Setting:
    """One row: a fusion, how many words, and whether each matters at one time or in one number."""

    fusion: str
    words: int
    place: str

    @property
    def name(self) -> str:
        """As a folder."""
        return f"{self.place}-{self.words}-{self.fusion}"

    def config(self) -> PolicyConfig:
        """The laptop's U-Net without an encoder, and nothing to see."""
        return PolicyConfig(
            observation=1,
            action=self.words if self.place == "action" else 1,
            observations=1,
            horizon=HORIZON,
            execution=1,
            widths=(32, 64),
            kernel_size=3,
            step_dim=32,
            start="identity",
            vocabulary=tuple(HEIGHTS),
            reasoning=64,
            dropout=0.0,
            listens=("blocks",),
            fusion=self.fusion,
            prediction="sample",
            sample_steps=5,
        )

    def batch(self, rng: np.random.Generator, size: int) -> Batch:
        """Texts, and the chunks that they mean."""
        drawn = rng.integers(len(HEIGHTS), size=(size, self.words))
        names, heights = list(HEIGHTS), np.array(list(HEIGHTS.values()), np.float32)[drawn]
        if self.place == "action":
            actions = np.repeat(heights[:, None], HORIZON, axis=1)
        else:
            actions = np.repeat(heights, HORIZON // self.words, axis=1)[..., None]
        texts = [" ".join(names[i] for i in row) for row in drawn]
        read = Vocabulary(names)(texts)
        return Batch(torch.zeros(size, 1, 1), torch.from_numpy(actions), {INSTRUCTION: read})

    def obeyed(self, actions: np.ndarray, batch: Batch) -> float:
        """The share of words that the chunks follow."""
        meant, done = batch.actions.numpy(), actions
        if self.place == "time":
            parts = (len(done), self.words, HORIZON // self.words)
            meant, done = meant.reshape(parts), done.reshape(parts)
        axis = 1 if self.place == "action" else 2
        heights = np.array(list(HEIGHTS.values()))
        nearest = np.abs(done.mean(axis)[..., None] - heights).argmin(-1)
        return float((np.abs(heights[nearest] - meant.mean(axis)) < 1e-3).mean())


def trained(setting: Setting, seed: int, folder: Path, steps: int) -> dict[str, float]:
    """Train one policy, and count the words that it obeys."""
    torch.manual_seed(seed)
    policy: DiffusionPolicy = build(setting.config())
    policy.action_scale.low.fill_(-1.0)
    policy.action_scale.high.fill_(1.0)

    def batches(draw: Draw) -> Batch:
        return setting.batch(draw.rng(), draw.batch_size)

    config = TrainConfig(
        steps=steps,
        lr=2e-3,
        seed=seed,
        grad_clip=1.0,
        cooldown=0.5,
        checkpoint_seconds=None,
        tensorboard=False,
    )
    run = folder / "run"
    train(policy, loss, batches, config, run, resume=started(run))
    fresh = setting.batch(np.random.default_rng([seed, 1_000_000_007]), TRIES)
    torch.manual_seed(seed)
    return {"accuracy": setting.obeyed(predict(policy, fresh).numpy(), fresh)}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    every = [Setting(fusion, n, place) for place in PLACES for n in COUNTS for fusion in FUSIONS]
    found = run_all(
        {one.name: one for one in every},
        lambda setting, seed, folder: trained(setting, seed, folder, given.steps),
        given.out,
        describe=lambda setting: {
            "network": asdict(setting.config()),
            **asdict(setting),
            "steps": given.steps,
        },
        seeds=range(given.seeds),
        progress=lambda name, done, total: print(f"{done} of {total} done; {name}", flush=True),
    )
    rows = [
        {
            "place": one.place,
            "words": one.words,
            "fusion": one.fusion,
            "obeyed": [result["accuracy"] for result in found[one.name]],
            "mean": statistics.fmean(result["accuracy"] for result in found[one.name]),
        }
        for one in every
    ]
    save(
        "policy_tokens",
        {"steps": given.steps, "batch_size": 64, "seeds": given.seeds, "texts": TRIES, "rows": rows},
        f"policy_tokens.py OUT --steps {given.steps} --seeds {given.seeds}",
    )


if __name__ == "__main__":
    main()
