"""A small policy over a made-up table, with randomised heads, and observations for it."""

from dataclasses import replace

import torch

from torchfilm.systems.diffusion_policy import DiffusionPolicy, PolicyConfig, build

CONFIG = PolicyConfig(
    observation=17,
    widths=(8, 16),
    kernel_size=3,
    step_dim=6,
    start="identity",
    encoder="things",
    encoder_width=10,
    things=(3, 2, 5),
    relative=True,
    vocabulary=("push", "the", "red", "blue", "thing", "slowly"),
    vectors=(("force", 3),),
    reasoning=7,
    train_steps=20,
    sample_steps=4,
)


def small(**changes) -> DiffusionPolicy:
    torch.manual_seed(3)
    policy = build(replace(CONFIG, **changes))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ranges = torch.tensor([[-0.5, -0.3], [0.4, 0.6]])
    policy.action_scale.low[:], policy.action_scale.high[:] = ranges
    return policy.eval()


def observations(count=5, seed=0, size=17):
    return torch.randn(count, 2, size, generator=torch.Generator().manual_seed(seed))
