"""A U-Net in another implementation's format predicts what that implementation's equations give."""

import math

import pytest
import torch
import torch.nn.functional as functional

from torchfilm.systems.diffusion_policy.converter import from_original_unet

WIDTHS, ACTION, STEP, COND, KERNEL = (16, 24, 40), 3, 6, 5, 3


def original(lerobot=False, scale=True, prefix=""):
    """Random weights with the names and shapes of the original's modules."""
    random = torch.Generator().manual_seed(7)
    state = {}

    def layer(name, *shape, bias=None):
        state[f"{name}.weight"] = torch.randn(shape, generator=random, dtype=torch.float64) / math.sqrt(
            math.prod(shape[1:]) or 1
        )
        width = shape[0] if bias is None else bias
        state[f"{name}.bias"] = torch.randn(width, generator=random, dtype=torch.float64)

    def convolved(name, into, out):
        layer(f"{name}.0", out, into, KERNEL)
        layer(f"{name}.1", out)

    def block(name, into, out):
        first, second = ("conv1.block", "conv2.block") if lerobot else ("blocks.0.block", "blocks.1.block")
        convolved(f"{name}.{first}", into, out)
        convolved(f"{name}.{second}", out, out)
        layer(f"{name}.cond_encoder.1", 2 * out if scale else out, STEP + COND)
        if into != out:
            layer(f"{name}.residual_conv", out, into, 1)

    resample = "2" if lerobot else "2.conv"
    layer("diffusion_step_encoder.1", 4 * STEP, STEP)
    layer("diffusion_step_encoder.3", STEP, 4 * STEP)
    for i, (into, out) in enumerate(zip((ACTION, *WIDTHS), WIDTHS, strict=False)):
        block(f"down_modules.{i}.0", into, out)
        block(f"down_modules.{i}.1", out, out)
        if i < len(WIDTHS) - 1:
            layer(f"down_modules.{i}.{resample}", out, out, 3)
    for i in range(2):
        block(f"mid_modules.{i}", WIDTHS[-1], WIDTHS[-1])
    for i, (out, into) in enumerate(zip(WIDTHS[-2::-1], WIDTHS[:0:-1], strict=True)):
        block(f"up_modules.{i}.0", 2 * into, out)
        block(f"up_modules.{i}.1", out, out)
        layer(f"up_modules.{i}.{resample}", out, out, 4)
    convolved("final_conv.0.block", WIDTHS[0], WIDTHS[0])
    layer("final_conv.1", ACTION, WIDTHS[0], 1)
    return {f"{prefix}{key}": value for key, value in state.items()}


def equations(state, x, step, cond, scale=True):
    """The original's forward pass over its own names (diffusion_policy's spelling)."""

    def layer(name, value):
        return functional.linear(value, state[f"{name}.weight"], state[f"{name}.bias"])

    def conv(name, value, **options):
        return functional.conv1d(value, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    def convolved(name, value):
        value = conv(f"{name}.0", value, padding=KERNEL // 2)
        return functional.mish(
            functional.group_norm(value, 8, state[f"{name}.1.weight"], state[f"{name}.1.bias"])
        )

    def block(name, value):
        y = convolved(f"{name}.blocks.0.block", value)
        embedded = layer(f"{name}.cond_encoder.1", functional.mish(heard))[..., None]
        width = y.shape[1]
        y = embedded[:, :width] * y + embedded[:, width:] if scale else y + embedded
        y = convolved(f"{name}.blocks.1.block", y)
        return y + (conv(f"{name}.residual_conv", value) if y.shape[1] != value.shape[1] else value)

    half = STEP // 2
    angles = step[:, None] * torch.exp(torch.arange(half).double() * -(math.log(10000) / (half - 1)))
    encoded = torch.cat([angles.sin(), angles.cos()], dim=-1)
    encoded = layer("diffusion_step_encoder.3", functional.mish(layer("diffusion_step_encoder.1", encoded)))
    heard = torch.cat([encoded, cond], dim=-1)
    x, kept = x.transpose(1, 2), []
    for i in range(len(WIDTHS)):
        x = block(f"down_modules.{i}.1", block(f"down_modules.{i}.0", x))
        kept.append(x)
        if i < len(WIDTHS) - 1:
            x = conv(f"down_modules.{i}.2.conv", x, stride=2, padding=1)
    x = block("mid_modules.1", block("mid_modules.0", x))
    for i in range(len(WIDTHS) - 1):
        x = torch.cat([x, kept.pop()], dim=1)
        x = block(f"up_modules.{i}.1", block(f"up_modules.{i}.0", x))
        name = f"up_modules.{i}.2.conv"
        x = functional.conv_transpose1d(
            x, state[f"{name}.weight"], state[f"{name}.bias"], stride=2, padding=1
        )
    return conv("final_conv.1", convolved("final_conv.0.block", x)).transpose(1, 2)


def batch():
    random = torch.Generator().manual_seed(3)
    x = torch.randn(2, 8, ACTION, generator=random, dtype=torch.float64)
    return x, torch.tensor([4, 71]), torch.randn(2, COND, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize(
    ("lerobot", "prefix"), [(False, ""), (False, "model."), (True, ""), (True, "diffusion.unet.")]
)
def test_weights_of_both_give_what_the_original_equations_give(lerobot: bool, prefix: str, scale: bool):
    state = original(lerobot, scale, prefix) | {"normalizer.scale": torch.ones(3)}
    unet = from_original_unet(state)
    expected = equations(original(scale=scale), *batch(), scale=scale)
    torch.testing.assert_close(unet(*batch()), expected, rtol=0, atol=1e-5)


def test_the_original_equations_hear_the_step_and_the_condition():
    state, (x, step, cond) = original(), batch()
    y = equations(state, x, step, cond)
    assert (equations(state, x, step + 1, cond) - y).abs().max() > 1e-3
    assert (equations(state, x, step, cond + 1) - y).abs().max() > 1e-3


def test_weights_of_something_else_are_refused():
    with pytest.raises(ValueError, match="expected the names of diffusion_policy's or lerobot's U-Net"):
        from_original_unet({"conv.weight": torch.ones(1)})


def test_weights_that_are_not_whole_are_refused():
    state = original()
    del state["mid_modules.1.cond_encoder.1.bias"]
    with pytest.raises(ValueError, match=r"got one without mid_modules\.1\.cond_encoder\.1\.bias"):
        from_original_unet(state)
    state = original()
    del state["up_modules.1.2.conv.weight"]
    with pytest.raises(ValueError, match=r"got one without up_modules\.1\.2\.weight"):
        from_original_unet(state)


def test_local_conditioning_is_refused():
    state = original() | {"local_cond_encoder.0.conv1.block.0.weight": torch.ones(1)}
    with pytest.raises(ValueError, match="Local conditions are added there"):
        from_original_unet(state)
