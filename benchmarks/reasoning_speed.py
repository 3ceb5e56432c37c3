"""How fast does the paper's configuration answer and train, and what does packing the questions save?

Generator (question to gamma and beta) and network (features, gamma and beta to the answer) apart. "padded"
runs PyTorch's GRU over all 42 places of every question, as the original does, and picks the state at the
last word; "packed" is ours. Both give the same vector, which is checked first. Questions are fresh ones on
scenes of 3 to 10 objects.

    python benchmarks/reasoning_speed.py        (some 10 minutes of one core, 3 GB of memory)
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from measuring import in_turn, parser_of, questions, save
from torchfilm import Modulation
from torchfilm.systems.visual_reasoning import RECIPES, VisualReasoner, build
from torchfilm.training.optimisers import build_optimiser

PLACES = 42
Encode = Callable[[Tensor, Tensor], Tensor]


def drawn(number_of_questions: int) -> tuple[Tensor, Tensor]:
    """Questions [N, 42], padded with 0, and their lengths, <START> and <END> counted."""
    tokens, lengths, _ = questions("full", 40)
    short = (lengths <= PLACES).nonzero()[:number_of_questions, 0]
    return functional.pad(tokens, (0, PLACES - tokens.shape[1]))[short], lengths[short]


def padded(model: VisualReasoner) -> Encode:
    """The original's way: over all places, then the state at the last word."""

    def encode(tokens: Tensor, lengths: Tensor) -> Tensor:
        states, _ = model.encoder.rnn(model.encoder.embedding(tokens))
        return states[torch.arange(len(tokens)), lengths - 1]

    return encode


def packed(model: VisualReasoner) -> Encode:
    """Ours; the batch comes without the places that no question of it uses, as `Batch` has it."""
    return lambda tokens, lengths: model.encode(tokens[:, : int(lengths.max())], lengths)


def check_equal(model: VisualReasoner, tokens: Tensor, lengths: Tensor) -> None:
    with torch.inference_mode():
        one, other = (encode(tokens, lengths) for encode in (padded(model), packed(model)))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def answering(model: VisualReasoner, batch: int, rounds: int) -> dict[str, float]:
    """CPU seconds for one batch of answers, each question about a picture of its own."""
    model.eval()
    tokens, lengths = drawn(batch)
    config = model.config
    images = torch.rand(batch, config.input_channels, config.input_height, config.input_width)

    def generate(encode: Encode) -> dict[str, Modulation]:
        return model.modulations(encode(tokens, lengths))

    with torch.inference_mode():
        modulations = generate(packed(model))
        return in_turn(
            {
                "generator_padded": lambda: generate(padded(model)),
                "generator_packed": lambda: generate(packed(model)),
                "network": lambda: model.reason(model.features(images), modulations),
            },
            rounds,
        )


def training(model: VisualReasoner, batch: int, rounds: int) -> dict[str, float]:
    """CPU seconds for one step: forward, backward, Adam with L2."""
    model.train()
    tokens, lengths = drawn(batch)
    config = model.config
    images = torch.rand(batch, config.input_channels, config.input_height, config.input_width)
    answers = torch.randint(config.answers, (batch,))
    optimiser = build_optimiser(model, RECIPES["paper"].training)

    def step(encode: Encode) -> None:
        optimiser.zero_grad()
        modulations = model.modulations(encode(tokens, lengths))
        logits = model.reason(model.features(images), modulations).logits
        functional.cross_entropy(logits, answers).backward()
        optimiser.step()

    return in_turn({"padded": lambda: step(padded(model)), "packed": lambda: step(packed(model))}, rounds)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train-batch", type=int, default=16, help="the paper's is 64")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build(RECIPES["paper"].config)
    assert isinstance(model, VisualReasoner)
    check_equal(model, *drawn(2))
    _, lengths = drawn(64)
    answers = {}
    for batch in (1, 64):
        seconds = answering(model, batch, given.rounds if batch > 1 else 3 * given.rounds)
        answers[str(batch)] = {
            "ms_per_answer": {name: 1000 * s / batch for name, s in seconds.items()},
            "answers_per_second": {
                kind: batch / (seconds[f"generator_{kind}"] + seconds["network"])
                for kind in ("padded", "packed")
            },
        }
    seconds = training(model, given.train_batch, given.rounds)
    save(
        "reasoning_speed",
        {
            "recipe": "paper",
            "parameters": {
                "generator": sum(p.numel() for p in model.generator_parameters()),
                "network": sum(p.numel() for p in model.network_parameters()),
            },
            "places": PLACES,
            "mean_length": lengths.float().mean().item(),
            "rounds": given.rounds,
            "answering": answers,
            "training": {
                "batch": given.train_batch,
                "questions_per_second": {name: given.train_batch / s for name, s in seconds.items()},
            },
        },
    )


if __name__ == "__main__":
    main()
