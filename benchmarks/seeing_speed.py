"""How many 96x64 images a second does the laptop's perception see on one core?

python benchmarks/seeing_speed.py
"""

import torch

from measuring import in_turn, parser_of, save
from torchfilm.systems.visual_reasoning.perception import Perception, PerceptionConfig

HEIGHT, WIDTH = 64, 96


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    perception = Perception(PerceptionConfig()).eval()
    found = {}
    for batch in (1, 64):
        images = torch.rand(batch, 3, HEIGHT, WIDTH)
        last = images.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            seconds = in_turn(
                {
                    "channels_first": lambda x=images: perception.maps(x),
                    "channels_last": lambda x=last: perception.maps(x),
                },
                given.rounds,
            )
        found[str(batch)] = {name: batch / s for name, s in seconds.items()}
    save(
        "seeing_speed",
        {
            "parameters": sum(p.numel() for p in perception.parameters()),
            "precision": "float32",
            "rounds": given.rounds,
            "images_per_second_by_batch": found,
        },
    )


if __name__ == "__main__":
    main()
