"""Is the GRU with a gradient written by hand faster than `nn.GRU` over the same packed words?

python benchmarks/gru_speed.py
"""

from collections.abc import Callable

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from measuring import in_turn, parser_of, questions, save
from torchfilm.blocks.recurrence import last_state
from torchfilm.systems.visual_reasoning import RECIPES


def calls(rnn: torch.nn.GRU, packed: PackedSequence) -> dict[str, Callable[[], torch.Tensor]]:
    """The last states of the sequences, longest first, by either way."""
    sizes = packed.batch_sizes.tolist()
    plain = PackedSequence(packed.data, packed.batch_sizes)
    return {"nn_gru": lambda: rnn(plain)[1][0], "ours": lambda: last_state(rnn, packed.data, sizes)}


def measured(width: int, word_dim: int, batch: int, rounds: int) -> dict[str, dict[str, float]]:
    tokens, lengths, vocabulary = questions("laptop", 100)
    words = torch.nn.Embedding(len(vocabulary.questions), word_dim)(tokens[:batch])
    packed = pack_padded_sequence(words.detach(), lengths[:batch], batch_first=True, enforce_sorted=False)
    packed.data.requires_grad_()
    rnn = torch.nn.GRU(word_dim, width, batch_first=True)
    ways = calls(rnn, packed)
    torch.testing.assert_close(ways["ours"](), ways["nn_gru"](), rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        answering = in_turn(ways, rounds)
    training = in_turn({name: (lambda way=way: way().sum().backward()) for name, way in ways.items()}, rounds)
    return {
        task: {f"{name}_ms": 1000 * s for name, s in seconds.items()}
        | {"ratio": seconds["nn_gru"] / seconds["ours"]}
        for task, seconds in {"training": training, "answering": answering}.items()
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = RECIPES["laptop"].config
    save(
        "gru_speed",
        {
            "batch": given.batch,
            "width": config.encoder_width,
            "word_dim": config.word_dim,
            "precision": "float32",
            "rounds": given.rounds,
            **measured(config.encoder_width, config.word_dim, given.batch, given.rounds),
        },
    )


if __name__ == "__main__":
    main()
