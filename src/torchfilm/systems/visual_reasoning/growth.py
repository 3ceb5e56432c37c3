"""Go on with a trained network that has become too small: widen its classifier, which changes no answer."""

from dataclasses import replace

import torch
from torch import nn

from torchfilm.systems.visual_reasoning.baselines import BaselineConfig
from torchfilm.systems.visual_reasoning.model import ReasonerConfig, VisualReasoner

WIDENED = ("projection", "hidden")


def can_grow(small: ReasonerConfig | BaselineConfig, large: ReasonerConfig | BaselineConfig) -> bool:
    """Whether the second config is the first with a wider classifier and no more; words do not count."""
    if not (isinstance(small, ReasonerConfig) and isinstance(large, ReasonerConfig)):
        return False
    sizes = {name: getattr(small, name) for name in (*WIDENED, "vocabulary", "answers")}
    wider = any(getattr(large, name) > sizes[name] for name in WIDENED)
    narrower = any(getattr(large, name) < sizes[name] for name in WIDENED)
    return wider and not narrower and replace(large, **sizes) == small


@torch.no_grad()
def grown(network: nn.Module, config: ReasonerConfig | BaselineConfig) -> VisualReasoner:
    """Return a network of this config with the weights of a smaller one, which answers as that one did.

    The new maps of the classifier's projection reach new hidden units only, and those reach no answer yet:
    their weights into the answers start at 0, all other new weights as in a fresh network.

    Raises ValueError where the configs differ in anything but the classifier's widths (`can_grow`).
    """
    old = getattr(network, "config", None)
    if old is None or not can_grow(old, config):
        raise ValueError(
            f"grown: expected the network's config with a wider {' or '.join(WIDENED)}, got {config} for "
            f"{old}. Other sizes need a fresh network."
        )
    assert isinstance(config, ReasonerConfig)
    config = replace(config, vocabulary=old.vocabulary, answers=old.answers)
    large = VisualReasoner(config)
    state, found = network.state_dict(), large.state_dict()
    for name, value in found.items():
        value[tuple(slice(size) for size in state[name].shape)] = state[name]
    hidden, answer = found["classifier.hidden.weight"], found["classifier.answer.weight"]
    hidden[: old.hidden] = 0
    for seen, wider in zip(
        state["classifier.hidden.weight"].split(old.projection, dim=1),
        hidden.split(config.projection, dim=1),
        strict=True,
    ):
        wider[: old.hidden, : old.projection] = seen
    answer[:, old.hidden :] = 0
    return large
