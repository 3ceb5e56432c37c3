"""How fast does the laptop configuration see, answer and train?

Answering: perception and network, one picture for each question. Training: what a step of the recipe does on
maps of pictures that were seen before (batch, questions a scene, precision and compilation as the recipe
says), forward, backward and AdamW.

    python benchmarks/laptop_speed.py
"""

from collections.abc import Callable

import torch

from measuring import in_turn, parser_of, questions, save
from torchfilm.systems.visual_reasoning import RECIPES, Batch, VisualReasoner, build, loss
from torchfilm.systems.visual_reasoning.perception import STRIDE, Perception, PerceptionConfig
from torchfilm.training.optimisers import build_optimiser


def drawn(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, lengths, _ = questions("laptop", 250)
    return tokens[:number, : int(lengths[:number].max())], lengths[:number]


def answering(model: VisualReasoner, batch: int, rounds: int) -> dict[str, float]:
    config = RECIPES["laptop"].config
    perception = Perception(PerceptionConfig()).eval()
    images = torch.rand(batch, 3, STRIDE * config.input_height, STRIDE * config.input_width)
    tokens, lengths = drawn(batch)
    with torch.inference_mode():
        maps = perception.maps(images)
        return in_turn(
            {
                "perception": lambda: perception.maps(images),
                "generator": lambda: model.modulations(model.encode(tokens, lengths)),
                "whole": lambda: model(perception.maps(images), tokens, lengths),
                "whole_but_perception": lambda: model(maps, tokens, lengths),
            },
            rounds,
        )


def stepping(*, as_recipe: bool) -> Callable[[], None]:
    """One training step as the recipe has it, or in plain float32 without compilation."""
    recipe = RECIPES["laptop"]
    model = build(recipe.config).train()
    batch_size, config = recipe.training.batch_size, recipe.config
    per_scene = recipe.feed.questions_per_scene
    scenes = batch_size // per_scene
    tokens, lengths = drawn(batch_size)
    batch = Batch(
        torch.rand(scenes, config.input_channels, config.input_height, config.input_width),
        tokens,
        lengths,
        torch.arange(scenes).repeat_interleave(per_scene),
        torch.randint(config.answers, (batch_size,)),
    )
    optimiser = build_optimiser(model, recipe.training)
    if as_recipe and recipe.training.compile:
        model.compile()
    low = as_recipe and recipe.training.precision == "bfloat16"

    def step() -> None:
        optimiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            found = loss(model, batch)
        found.value.backward()
        optimiser.step()

    return step


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    recipe = RECIPES["laptop"]
    model = build(recipe.config).eval()
    assert isinstance(model, VisualReasoner)
    answers = {}
    for batch in (1, 64):
        seconds = answering(model, batch, 3 * given.rounds if batch == 1 else given.rounds)
        answers[str(batch)] = {
            "ms_per_answer": {name: 1000 * s / batch for name, s in seconds.items()},
            "answers_per_second": batch / seconds["whole"],
        }
    steps = in_turn(
        {"as_recipe": stepping(as_recipe=True), "float32_eager": stepping(as_recipe=False)}, given.rounds
    )
    save(
        "laptop_speed",
        {
            "recipe": "laptop",
            "parameters": {
                "generator": sum(p.numel() for p in model.generator_parameters()),
                "network": sum(p.numel() for p in model.network_parameters()),
                "perception": sum(p.numel() for p in Perception(PerceptionConfig()).parameters()),
            },
            "mean_length": drawn(1000)[1].float().mean().item(),
            "rounds": given.rounds,
            "answering": answers,
            "training": {
                "batch": recipe.training.batch_size,
                "questions_per_scene": recipe.feed.questions_per_scene,
                "precision": recipe.training.precision,
                "compile": recipe.training.compile,
                "questions_per_second": {n: recipe.training.batch_size / s for n, s in steps.items()},
            },
        },
    )


if __name__ == "__main__":
    main()
