"""A policy that obeys one instruction for good: what it hears is folded into plain weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from torchfilm.modulation import Modulation
from torchfilm.systems.diffusion_policy.model import DiffusionPolicy
from torchfilm.systems.diffusion_policy.observing import FlatEncoder, ThingsEncoder


@torch.no_grad()
def fixed(policy: DiffusionPolicy, conditions: Mapping[str, Any]) -> DiffusionPolicy:
    """Return a policy without instructions that does what `policy` does when it hears `conditions`.

    A modulation behind a linear layer is another linear layer, y = gamma (W x + b) + beta; one behind the
    U-Net's own, which a linear head makes of step and observation, is another head:

        gamma (gamma_k x + beta_k) + beta  has the rows  gamma * gamma_k  and  gamma * beta_k + beta

    So nothing is computed for the instruction any more, and the new policy, whose config hears nothing, is
    saved, compiled and exported as any.

    Args:
        policy: whose reasoning modulates encoder or blocks by FiLM of some kind.
        conditions: what is heard, by name, one row each, as `DiffusionPolicy.reason` takes it.

    Raises:
        ValueError: for a fusion without gamma and beta, reasoning on the condition vector, whose activation
            is in the way, more than one row, or a generator whose rows are bounded.

    Example:
        read = Vocabulary(policy.config.vocabulary)(["push the red ball to the goal"])
        plain = fixed(policy, {"instruction": read})
    """
    z = policy.reason(conditions, 1)
    heard = policy.listen(z)
    values = {site: value for place in heard.values() for site, value in place.items()}
    if "condition" in heard or not all(isinstance(value, Modulation) for value in values.values()):
        raise ValueError(
            f"fixed: expected reasoning that modulates encoder or blocks as gamma and beta, got fusion "
            f"{policy.config.fusion!r} on {policy.config.listens}. Policy keeps what others hear as it is."
        )
    config = replace(policy.config, vocabulary=(), vectors=(), matched=False)
    plain = DiffusionPolicy(config).to(policy.unet.out.weight)
    own = plain.state_dict()
    plain.load_state_dict({name: value for name, value in policy.state_dict().items() if name in own})
    if isinstance(plain.encoder, ThingsEncoder) and isinstance(policy.encoder, ThingsEncoder):
        plain.encoder.held = policy.encoder.held
    _fold_encoder(plain.encoder, heard.get("encoder", {}))
    if "blocks" in heard:
        _fold_head(plain, heard["blocks"])
    return plain.train(policy.training)


def _fold_encoder(encoder: FlatEncoder | ThingsEncoder | None, heard: Mapping[str, Modulation]) -> None:
    """Multiply the modulation of each site into the layers whose sum it acts on."""
    layers: dict[str, tuple[nn.Module, ...]] = {}
    if isinstance(encoder, FlatEncoder | ThingsEncoder):
        layers = {"encoder_0": (encoder.first,), "encoder_1": (encoder.second,)}
    if isinstance(encoder, ThingsEncoder):
        turning = encoder.turning
        layers |= {
            "thing_0": (encoder.thing_0,),
            "thing_1": (encoder.thing_1, encoder.around),
            "way_0": (turning.first,),
            "way_1": (turning.second, turning.around),
            "spot": (encoder.spot,),
        }
    for site, modulation in heard.items():
        gamma, beta = modulation.gamma[0], modulation.beta[0]
        for layer in layers[site]:
            if isinstance(layer, nn.Embedding):
                layer.weight.copy_(layer.weight * gamma + beta)
            elif isinstance(layer, nn.Linear):
                layer.weight.mul_(gamma[:, None].to(layer.weight))
                if layer.bias is not None:
                    layer.bias.copy_(layer.bias * gamma + beta)


def _fold_head(policy: DiffusionPolicy, heard: Mapping[str, Modulation]) -> None:
    """Multiply the blocks' modulations into the rows of the U-Net's own generator."""
    generator = policy.unet.generator
    if generator.emit != ("gamma", "beta") or generator.bound is not None:
        raise ValueError(
            f"fixed: expected a U-Net whose generator emits gamma and beta without a bound, got "
            f"{generator.emit} and {generator.bound!r}. Fold into emit=('gamma', 'beta')."
        )
    factor, shift = [], []
    for site in generator.sites:
        gamma, beta = heard[site].gamma[0], heard[site].beta[0]
        offset = generator.gamma_offset
        factor += [gamma, gamma]
        shift += [offset * (gamma - 1), beta]
    rows, added = torch.cat(factor), torch.cat(shift)
    weight, bias = _linear(generator.head)
    weight.mul_(rows[:, None].to(weight))
    bias.copy_(bias * rows + added)


def _linear(head: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear head."""
    weight, bias = head.get_parameter("weight"), head.get_parameter("bias")
    return weight, bias
