"""Every public module of the library, with inputs: what the laws run over.

A new public module is added here, or `test_every_public_module_is_in_the_catalogue` fails. Sizes are pairwise
different, so that no test passes by a lucky broadcast.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import torchfilm as tf

CHANNELS, COND, CLASSES, TIME = 3, 7, 13, 11


@dataclass(frozen=True)
class Case:
    """One module and how to call it: `build()(*inputs(batch))`.

    `inputs` make one row per sample; for a layer the first is the features, with their channels on axis
    `dim`, and the second the condition. `plain` is what the layer computes while it is not conditioned.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    dim: int | None = None
    plain: Callable[[Tensor], Tensor] | None = None

    def __str__(self) -> str:
        """Name the case in test ids."""
        return self.name


def image(batch: int) -> Tensor:
    """Return [B, C, H, W] features."""
    return torch.randn(batch, CHANNELS, 5, 4)


def tokens(batch: int) -> Tensor:
    """Return [B, T, C] features."""
    return torch.randn(batch, TIME, CHANNELS)


def vector(batch: int) -> Tensor:
    """Return a condition vector per sample."""
    return torch.randn(batch, COND)


def sentence(batch: int) -> tuple[Tensor, Tensor]:
    """Return tokens of a condition and which of them are real: the first is, so that no sequence is empty."""
    mask = torch.rand(batch, TIME) < 0.5
    mask[:, 0] = True
    return torch.randn(batch, TIME, COND), mask


def sequence(batch: int) -> Tensor:
    """Return [B, C, T] features."""
    return torch.randn(batch, CHANNELS, TIME)


def volume(batch: int) -> Tensor:
    """Return [B, C, D, H, W] features."""
    return torch.randn(batch, CHANNELS, 5, 4, 2)


def per_token(batch: int) -> Tensor:
    """Return a condition for each token."""
    return torch.randn(batch, TIME, COND)


def normed(kind: type[nn.Module], *sizes: int, **options: bool) -> Callable[[Tensor], Tensor]:
    """Return what torch's own norm without an affine computes."""
    return lambda x: kind(*sizes, **options, dtype=torch.promote_types(x.dtype, torch.float32))(x)


NORMS = (
    ("ConditionalBatchNorm1d", tf.ConditionalBatchNorm1d, sequence, 1, nn.BatchNorm1d),
    ("ConditionalBatchNorm2d", tf.ConditionalBatchNorm2d, image, 1, nn.BatchNorm2d),
    ("ConditionalBatchNorm3d", tf.ConditionalBatchNorm3d, volume, 1, nn.BatchNorm3d),
    ("ConditionalInstanceNorm1d", tf.ConditionalInstanceNorm1d, sequence, 1, nn.InstanceNorm1d),
    ("ConditionalInstanceNorm2d", tf.ConditionalInstanceNorm2d, image, 1, nn.InstanceNorm2d),
    ("ConditionalInstanceNorm3d", tf.ConditionalInstanceNorm3d, volume, 1, nn.InstanceNorm3d),
    ("ConditionalLayerNorm", tf.ConditionalLayerNorm, tokens, -1, nn.LayerNorm),
    ("ConditionalRMSNorm", tf.ConditionalRMSNorm, tokens, -1, nn.RMSNorm),
)


def norm_case(name: str, kind: type, features: Callable, dim: int, plain: type) -> Case:
    """Return the case of a conditional norm, which starts as torch's norm without an affine."""
    option = "elementwise_affine" if dim == -1 else "affine"
    return Case(
        name,
        lambda: kind(CHANNELS, COND),
        lambda b: (features(b), vector(b)),
        dim,
        normed(plain, CHANNELS, **{option: False}),
    )


class Called(nn.Module):
    """A module that takes one value, called with the two tensors which that value is made of."""

    def __init__(self, module: nn.Module, value: Callable[..., object]) -> None:
        super().__init__()
        self.module = module
        self.value = value

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Make the value and call the module."""
        return self.module(self.value(first, second))


def named(words: Tensor, kind: Tensor) -> dict[str, Tensor]:
    """Return two conditions by name."""
    return {"kind": kind, "words": words}


def generator(**options: object) -> tf.Generator:
    """Return a generator with options for sites of different widths."""
    return tf.Generator(COND, {"a": CHANNELS, "b": 5}, **options)


def several(combine: str) -> Called:
    """Return a class and a vector at once."""
    parts = {"kind": tf.Classes(CLASSES, COND), "words": tf.Vector(COND)}
    return Called(tf.Several(parts, combine), named)


CASES = (
    Case("FiLM", lambda: tf.FiLM(CHANNELS, COND), lambda b: (image(b), vector(b)), 1, lambda x: x),
    Case(
        "FiLM/tokens",
        lambda: tf.FiLM(CHANNELS, COND, dim=-1),
        lambda b: (tokens(b), vector(b)),
        -1,
        lambda x: x,
    ),
    Case(
        "DenseFiLM", lambda: tf.DenseFiLM(CHANNELS, COND), lambda b: (tokens(b), vector(b)), -1, lambda x: x
    ),
    Case(
        "FiLM/gate one",
        lambda: tf.FiLM(CHANNELS, COND, gate="one"),
        lambda b: (image(b), vector(b)),
        1,
        lambda x: x,
    ),
    Case(
        "FiLM/gate zero",
        lambda: tf.FiLM(CHANNELS, COND, gate="zero"),
        lambda b: (image(b), vector(b)),
    ),
    *[norm_case(*entry) for entry in NORMS],
    Case(
        "ConditionalLayerNorm/per token",
        lambda: tf.ConditionalLayerNorm(CHANNELS, COND),
        lambda b: (tokens(b), per_token(b)),
        -1,
        normed(nn.LayerNorm, CHANNELS, elementwise_affine=False),
    ),
    Case(
        "ConditionalGroupNorm",
        lambda: tf.ConditionalGroupNorm(1, CHANNELS, COND),
        lambda b: (image(b), vector(b)),
        1,
        normed(nn.GroupNorm, 1, CHANNELS),  # torch rounds it otherwise where it has no affine
    ),
    Case("AdaLNZero", lambda: tf.AdaLNZero(CHANNELS, COND), lambda b: (tokens(b), vector(b))),
    Case("AdaRMSNorm", lambda: tf.AdaRMSNorm(CHANNELS, COND), lambda b: (tokens(b), per_token(b))),
    Case("Generator", lambda: tf.Generator(COND, {"a": CHANNELS, "b": 5}), lambda b: (vector(b),)),
    Case("Generator/shared", lambda: generator(head="shared"), lambda b: (vector(b),)),
    Case("Generator/low rank", lambda: generator(head="lowrank:2"), lambda b: (vector(b),)),
    Case(
        "Generator/table",
        lambda: tf.Generator(CLASSES, {"a": CHANNELS, "b": 5}, head="table"),
        lambda b: (torch.randperm(CLASSES)[:b],),
    ),
    Case(
        "Generator/trunk and gate",
        lambda: generator(trunk=(11, "silu"), emit=("gamma", "beta", "gate"), bound="tanh:0.5"),
        lambda b: (vector(b),),
    ),
    Case(
        "Generator/fields by site",
        lambda: generator(emit={"a": ("gamma", "beta"), ".*": ("gamma", "beta", "gate")}),
        lambda b: (vector(b),),
    ),
    Case("Generator/learned scale", lambda: generator(learned_scale=True), lambda b: (vector(b),)),
    Case(
        "ComposedGenerator",
        lambda: tf.ComposedGenerator((2, COND - 2), {"a": CHANNELS, "b": 5}),
        lambda b: (vector(b),),
    ),
    Case("Vector", lambda: tf.Vector(COND), lambda b: (vector(b),)),
    Case("Scalars", lambda: tf.Scalars(COND, 4 * COND), lambda b: (vector(b),)),
    Case("Scalars/learned", lambda: tf.Scalars(COND, 4 * COND, learned=True), lambda b: (vector(b),)),
    Case("Classes", lambda: tf.Classes(CLASSES, COND), lambda b: (torch.randperm(CLASSES)[:b],)),
    Case("Tokens", lambda: tf.Tokens(COND), sentence),
    Case("Tokens/attention", lambda: tf.Tokens(COND, "attention", heads=7), sentence),
    Case(
        "Maybe",
        lambda: Called(tf.Maybe(tf.Vector(COND)), tf.Masked),
        lambda b: (vector(b), torch.arange(b) != 3),
    ),
    Case("Several", lambda: several("concat"), lambda b: (vector(b), torch.randint(CLASSES, (b,)))),
    Case("Several/sum", lambda: several("sum"), lambda b: (vector(b), torch.randint(CLASSES, (b,)))),
)
LAYERS = tuple(case for case in CASES if case.dim is not None)


def refilled_by_type(module: nn.Module) -> None:
    """Refill the layers that have a type of torch's: an initialisation hook of others, for `apply`."""
    if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
        nn.init.normal_(module.weight, std=0.02)


def refilled_by_name(module: nn.Module) -> None:
    """Refill the layers whose class has a name like those of torch, as many init hooks do."""
    if any(word in type(module).__name__ for word in ("Linear", "Conv", "Norm")):
        for parameter in (getattr(module, name, None) for name in ("weight", "bias")):
            if parameter is not None:
                nn.init.normal_(parameter, std=0.02)


def case_id(value: object) -> str:
    """What a case is called: without addresses of functions, which differ between workers."""
    return getattr(value, "__name__", str(value))[:25]


def randomise(module: nn.Module) -> nn.Module:
    """Fill every parameter: heads that start at zero would make "works" and "is ignored" look alike."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


def double(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the floating-point inputs in float64 and the others as they are."""
    return tuple(value.double() if value.is_floating_point() else value for value in values)
