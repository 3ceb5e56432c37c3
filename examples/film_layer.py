"""Condition a layer: train one FiLM layer to obey a class, then close a channel by hand.

The task: for a class k, y = (k + 1) * x - k. A FiLM layer over the class learns gamma = k + 1, beta = -k.

    python examples/film_layer.py
"""

import torch

import torchfilm as tf

CLASSES, CHANNELS = 3, 2


def train(steps: int = 300) -> tuple[tf.Classes, tf.FiLM]:
    torch.manual_seed(0)
    condition, layer = tf.Classes(CLASSES, dim=8), tf.FiLM(CHANNELS, cond_dim=8)
    optimiser = torch.optim.Adam([*condition.parameters(), *layer.parameters()], lr=0.05)
    for _ in range(steps):
        x, k = torch.randn(64, CHANNELS, 5), torch.randint(CLASSES, (64,))
        wanted = (k + 1)[:, None, None] * x - k[:, None, None]
        loss = (layer(x, condition(k)) - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return condition, layer


def main() -> None:
    condition, layer = train()
    generator = tf.Generator(8, {"here": CHANNELS})
    generator.head.load_state_dict(layer.head.state_dict())  # the same numbers, seen as a Modulation
    with torch.no_grad():
        learned = generator(condition(torch.arange(CLASSES)))["here"]
        for k in range(CLASSES):
            gamma, beta = learned.gamma[k, 0].item(), learned.beta[k, 0].item()
            print(f"class {k}: gamma {gamma:+.2f} (true {k + 1}), beta {beta:+.2f} (true {-k})")
        first, second, third = (learned[[k]] for k in range(CLASSES))
        sum_of_three = second + (second - first)  # the paper's arithmetic: from 0 to 1 is as from 1 to 2
        print(f"1 + (1 - 0) against 2: {(sum_of_three.gamma - third.gamma).abs().max().item():.2f} apart")
        x = torch.ones(1, CHANNELS, 5)
        closed = second.replace(gamma=second.gamma * torch.tensor([[0.0, 1.0]]))
        print("channel 0 closed:", [round(v, 1) for v in layer(x, modulation=closed)[0, :, 0].tolist()])


if __name__ == "__main__":
    main()
