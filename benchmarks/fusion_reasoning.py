"""Which way of fusing a question into a network for visual reasoning answers best, and what does each cost?

The laptop recipe's network without FiLM of its own is conditioned from outside, `tf.condition` at the
BatchNorm of every block: by FiLM, by its parts and by what it competes with, all the identity at the start.
The same question encoder (cross-attention reads words one by one), scenes, order of questions and number of
steps; held-out questions no harder than those that training has come to, and `tf.compare` for the costs.

    python benchmarks/fusion_reasoning.py OUT --data DIR [--steps 2500] [--seeds 1]

Finished runs in OUT are not repeated.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import torchfilm as tf
from measuring import parser_of, save
from torchfilm.data.clevr.files import ClevrFolder
from torchfilm.fusion import resolve
from torchfilm.systems.diffusion_policy.reasoning import Words, WordStates
from torchfilm.systems.visual_reasoning import loss
from torchfilm.systems.visual_reasoning.bundle import load_bundle
from torchfilm.systems.visual_reasoning.data import Batch, reasoning_steps
from torchfilm.systems.visual_reasoning.exam import Exam, predict
from torchfilm.systems.visual_reasoning.experiments import described, sources
from torchfilm.systems.visual_reasoning.model import VisualReasoner
from torchfilm.systems.visual_reasoning.recipe import LAPTOP, LAPTOP_FEED, LAPTOP_TRAINING, RECIPES
from torchfilm.systems.visual_reasoning.running import HELD_OUT_QUESTIONS, Material, fitted
from torchfilm.training import Draw, load_weights, started, train
from torchfilm.training.series import run_all

SITES = r"blocks\.block\d+\.norm"
FUSIONS = ("film", "scale", "bias", "gate", "low_rank", "concat", "cross_attention")
MATCHED = ("concat", "cross_attention")
WORDS, TIMED = 64, 64


class Question(Words):
    """One vector of a question, which comes as two arguments."""

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        """Return [questions, dim]."""
        return super().forward((tokens, lengths))


class QuestionWords(WordStates):
    """One vector for each word of a question."""

    def forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return [questions, words, dim], and which words are real."""
        return super().forward((tokens, lengths))


class Silent(VisualReasoner):
    """The laptop's network, none of whose blocks listens: pictures in, answers out."""

    def forward(self, images: Tensor, scene_index: Tensor) -> Tensor:  # type: ignore[override]
        """Return logits [questions, answers]; scene_index: the picture of each question."""
        return self.reason(self.features(images)[scene_index], {}).logits


def network(name: str, material: Material) -> Silent:
    """The silent network with a fusion at its norms; "NAME_matched" adds as many parameters as FiLM."""
    config = fitted(replace(LAPTOP, filmed_blocks=()), material.vocabulary)
    net = Silent(config)  # type: ignore[arg-type]
    net.encoder = nn.Identity()  # type: ignore[assignment]
    kind = name.removesuffix("_matched")
    reads = QuestionWords if kind == "cross_attention" else Question
    fusion = resolve(kind)
    if name != kind:
        sites = {site.name: site.features for site in tf.find(net, SITES)}
        target = sum(p.numel() for p in resolve("film").build(config.encoder_width, sites).parameters())
        fusion = resolve(kind, match_params=target)
    count = len(material.vocabulary.questions) - 1
    return tf.condition(net, SITES, reads(count, config.encoder_width, WORDS), fusion=fusion)  # type: ignore[return-value]


class Asked(nn.Module):
    """A conditioned network, called as the system calls its own."""

    def __init__(self, conditioned: nn.Module) -> None:
        super().__init__()
        self.conditioned = conditioned

    def forward(self, images: Tensor, questions: Tensor, lengths: Tensor, scene_index: Tensor) -> Tensor:
        """Return logits [questions, answers]."""
        return self.conditioned(images, scene_index, cond=(questions, lengths))


def right(model: nn.Module, exam: Exam) -> Tensor:
    """Which questions of an exam are answered rightly, 1 or 0."""
    return torch.from_numpy(predict(Asked(model), exam) == exam.questions.answers).double()


def asked(batch: Batch) -> dict[str, object]:
    """What a conditioned network is called with."""
    cond = (batch.questions, batch.lengths)
    return {"images": batch.images, "scene_index": batch.scene_index, "cond": cond}


def as_far_as_trained(material: Material, steps: int) -> Exam:
    """Held-out questions, no harder than those that the curriculum has come to after so many steps."""
    share = LAPTOP_FEED.curriculum.share(steps * LAPTOP_TRAINING.batch_size)
    known = reasoning_steps(material.training_questions(), material.vocabulary)
    hardest = np.quantile(known, share)
    exam = material.exam(LAPTOP, "val")
    asked = reasoning_steps(exam.questions, material.vocabulary) <= hardest
    return replace(exam, questions=exam.questions.select(asked)).sample(HELD_OUT_QUESTIONS, seed=0)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], help="train and compare these alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    shipped = load_bundle(None)
    material = Material(ClevrFolder(given.data), shipped.vocabulary, shipped.sight)
    batches = material.batches(LAPTOP, LAPTOP_FEED)
    exam = as_far_as_trained(material, given.steps)

    def run(name: str, seed: int, folder: Path) -> dict[str, float]:
        torch.manual_seed(seed)
        model = network(name, material).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        training = replace(
            LAPTOP_TRAINING,
            minutes=None,
            steps=given.steps,
            seed=seed,
        )
        out = folder / "run"
        train(model, lambda net, batch: loss(Asked(net), batch), batches, training, out, resume=started(out))
        return {"accuracy": float(right(model, exam).mean())}

    about = described(RECIPES["laptop"]) | sources(material) | {"steps": given.steps, "asked": len(exam)}
    names = given.only or [*FUSIONS, *(f"{name}_matched" for name in MATCHED)]
    run_all(
        {name: name for name in names},
        run,
        given.out,
        describe=lambda name: about | {"fusion": name},
        seeds=range(given.seeds),
        progress=lambda name, done, total: print(f"{done} of {total} done; {name}", flush=True),
    )
    models = {
        name: [trained(name, given.out / name, seed, material) for seed in range(given.seeds)]
        for name in names
    }
    comparison = tf.compare(
        models, asked(batches(Draw(given.steps, 0, 1.0, TIMED))), score=lambda model: right(model, exam)
    )
    print(comparison)
    only = f" --only {' '.join(given.only)}" if given.only else ""
    options = f"--steps {given.steps} --seeds {given.seeds}{only}"
    save(
        "fusion_reasoning",
        {"steps": given.steps, "questions": len(exam), **comparison.to_json()},
        f"fusion_reasoning.py OUT --data DIR {options}",
    )


def trained(name: str, folder: Path, seed: int, material: Material) -> nn.Module:
    """The network that a finished run left."""
    model = network(name, material)
    load_weights(folder / f"seed_{seed}" / "run" / "weights.safetensors", model)
    return model.eval()


if __name__ == "__main__":
    main()
