"""Read modulations and weights in the order and meaning of other codebases.

A layout is a sentence with a word for each block of C numbers, in the order in which a codebase packs them:

| word | meaning |
| --- | --- |
| gamma | the final factor |
| scale | the factor less one: gamma = 1 + scale |
| shift | what is added; also called beta or bias |
| gate | the weight of a residual branch |

"shift scale gate" is DiT's, "scale shift gate" openpi's, "gamma shift" diffusion_policy's; a layout with
several of a word, "shift scale gate shift scale gate", has several sites in one projection. `LAYOUTS` names
those of the codebases whose checkpoints are about; torchfilm's own is "scale shift", or "scale shift gate".

The numbers of a wrong order fit without an error. So orders are named here, and converted in one place.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torchfilm.generator import Generator
from torchfilm.generator_options import Emitted, GeneratorOptions
from torchfilm.heads import wide
from torchfilm.modulation import Modulation
from torchfilm.naming import check_choice, nearest

WORDS = ("gamma", "scale", "shift", "gate")

Key = TypeVar("Key", bound=str | tuple[str, ...])  # those of a mapping in a variable are of one kind


@dataclass(frozen=True)
class Layout:
    """How a codebase packs what it predicts from a condition.

    Args:
        order: the words, in order.
        trunk: what stands between the condition and the projection, as `Generator` takes it.
        where: which modules have it.

    Raises:
        ValueError: for unknown words, none, gamma beside scale, and a trunk that `Generator` does not take.
    """

    order: str
    trunk: tuple[str, ...] = ()
    where: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "trunk", GeneratorOptions(trunk=self.trunk).trunk)
        words = self.order.split()
        unknown = [word for word in words if word not in WORDS]
        if unknown or not words:
            raise ValueError(
                f"Layout: expected words of {', '.join(WORDS)}, got {self.order!r}.\n"
                f"scale is gamma - 1; what others call beta or bias is shift."
            )
        if {"gamma", "scale"} <= set(words):
            raise ValueError(
                f"Layout: expected gamma or scale, got both in {self.order!r}.\n"
                f"A projection predicts the factor or the factor less one, not one for each site."
            )

    def __str__(self) -> str:
        return f"{self.order} ({self.where})" if self.where else self.order

    @property
    def words(self) -> tuple[str, ...]:
        """Return the words in order."""
        return tuple(self.order.split())

    @property
    def sites(self) -> int:
        """Return how many sites one projection serves: how often its most frequent word occurs."""
        return max(self.words.count(word) for word in WORDS)


LAYOUTS: dict[str, Layout] = {
    "torchfilm": Layout("scale shift", (), "FiLM, Generator"),
    "torchfilm/gate": Layout("scale shift gate", (), "Generator(emit=('gamma', 'beta', 'gate'))"),
    "film": Layout("scale shift", (), "Perez et al. 2018, whose generator adds the one"),
    "dit": Layout("shift scale gate shift scale gate", ("silu",), "DiT's blocks: attention, then MLP"),
    "dit/final": Layout("shift scale", ("silu",), "DiT's last layer"),
    "diffusers/AdaLayerNormZero": Layout("shift scale gate shift scale gate", ("silu",), "DiT, SD3, Flux"),
    "diffusers/AdaLayerNormZeroSingle": Layout("shift scale gate", ("silu",), "Flux's single blocks"),
    "diffusers/SD35AdaLayerNormZeroX": Layout(
        "shift scale gate shift scale gate shift scale gate", ("silu",), "SD 3.5: attention, MLP, attention 2"
    ),
    "diffusers/AdaLayerNormContinuous": Layout("scale shift", ("silu",), "the last norm of SD3 and Flux"),
    "diffusers/AdaLayerNorm": Layout("scale shift", ("silu",), "with chunk_dim=0; with 1 it is dit/final"),
    "diffusers/AdaGroupNorm": Layout("scale shift", (), "without act_fn"),
    "diffusers/ResnetBlock2D": Layout("scale shift", ("silu",), "time_embedding_norm='scale_shift'"),
    "lucidrains/FiLM": Layout("scale shift", (), "classifier-free-guidance-pytorch, the last Linear"),
    "lucidrains/ResnetBlock": Layout("scale shift", ("silu",), "denoising-diffusion-pytorch and its kin"),
    "lucidrains/raw": Layout("gamma shift", (), "audiolm-pytorch's FiLM: no one is added"),
    "openvla-oft": Layout("scale shift", (), "two Linears for each vision block, scale and shift"),
    "rt-1": Layout("scale shift", (), "two Dense layers, mult and add, kernels to be transposed"),
    "openpi": Layout("scale shift gate", (), "the adaRMS norms of pi0.5"),
    "diffusion_policy": Layout("gamma shift", ("mish",), "cond_predict_scale=True: no one is added"),
    "diffusion_policy/bias": Layout("shift", ("mish",), "cond_predict_scale=False"),
    "audio2photoreal": Layout("scale shift", ("mish",), "DenseFiLM, also EDGE's"),
}


def read(packed: Float[Tensor, "*batch packed"], layout: str | Layout) -> tuple[Modulation, ...]:
    """Return the modulations that a packed tensor holds, one for each site of the layout, in order.

    Args:
        packed: what the other codebase's projection gave, its words along the last axis.
        layout: a name of `LAYOUTS`, or a layout.

    Raises:
        ValueError: where the last axis is not divisible by the number of words; for an unknown name.

    Example:
        >>> attention, mlp = read(torch.rand(2, 6 * 64), "dit")
        >>> attention.gate.shape
        torch.Size([2, 64])
    """
    layout = _layout(layout)
    blocks = _blocks(packed, layout, -1)
    found: dict[str, list[Tensor]] = {word: [] for word in WORDS}
    for word, block in zip(layout.words, blocks, strict=True):
        found[word].append(block)
    gammas = found["gamma"] or [1 + wide(scale) for scale in found["scale"]]
    modulations = []
    for gamma, shift, gate in itertools.zip_longest(gammas, found["shift"], found["gate"]):
        known = next(block for block in (gamma, shift, gate) if block is not None)
        modulations.append(
            Modulation(
                torch.ones_like(wide(known)) if gamma is None else wide(gamma),
                torch.zeros_like(wide(known)) if shift is None else wide(shift),
                None if gate is None else wide(gate),
            )
        )
    return tuple(modulations)


def reorder(
    tensor: Tensor, source: str | Layout, target: str | Layout = "torchfilm", *, dim: int = 0
) -> Tensor:
    """Return the blocks of a tensor in the order of another layout; their values are not changed.

    For the output axis of a projection's weight, and of a LoRA's B (its A has no such axis: permuting it is a
    bug that has been shipped).

    Args:
        tensor: blocks of equal size along `dim`.
        source: its layout.
        target: the layout wanted, of the same words; gamma and scale count as one.
        dim: the axis of the blocks.

    Raises:
        ValueError: for layouts of different words, and sizes that are not divisible.

    Example:
        >>> reorder(torch.tensor([10, 11, 20, 21]), "dit/final", "torchfilm")
        tensor([20, 21, 10, 11])
    """
    source, target = _layout(source), _layout(target)
    blocks = _blocks(tensor, source, dim)
    return torch.cat([blocks[i] for i in _order(source, target)], dim)


def convert(
    weight: Float[Tensor, "packed cond"],
    bias: Float[Tensor, " packed"] | None,
    source: str | Layout,
    target: str | Layout = "torchfilm",
) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the equivalent projection in another layout.

    Blocks change places, and where one layout has the factor (gamma) and the other the factor less one
    (scale), the one moves out of or into the bias: W z + b = 1 + (W z + (b - 1)). The bias is then in float32
    or wider: in bfloat16 a small b would be lost beside the one.

    Args:
        weight: of the projection, one row for each number.
        bias: of the same; None for none.
        source: its layout.
        target: the layout wanted.

    Raises:
        ValueError: as `reorder`.

    Example:
        >>> projection = nn.Linear(512, 2 * 64)  # of a diffusion policy: gamma, shift
        >>> weight, bias = convert(projection.weight, projection.bias, "diffusion_policy")
    """
    source, target = _layout(source), _layout(target)
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    one = ("gamma" in target.words) - ("gamma" in source.words)
    bias = wide(bias) if one else bias
    weight, blocks = reorder(weight, source, target), list(_blocks(bias, source, 0))
    for i, word in enumerate(source.words):
        if word in ("gamma", "scale"):
            blocks[i] = blocks[i] + one
    return weight.detach().clone(), torch.cat([blocks[i] for i in _order(source, target)]).detach().clone()


def as_generator(
    projections: Mapping[Key, nn.Linear | Sequence[nn.Linear]],
    layout: str | Layout,
    *,
    gates: Mapping[str, str | None] | None = None,
) -> Generator:
    """Return a `Generator` that does what these projections of one condition did, in one product.

    In adaLN-Zero and adaRMS, x + gate * branch(gamma * norm(x) + beta), the gate acts at the branch, not at
    the norm. For a network that is conditioned by `condition`, `gates` names the branches.

    Args:
        projections: site to projection; a tuple of sites where the layout has several in one projection, in
            its order. A tuple of projections where each word of the layout has one of its own, in its order.
        layout: that of all of them. Its activation becomes the generator's trunk; where it has the factor
            itself (gamma), so has the generator's head, gamma_offset=0.
        gates: for each of these sites, the one that takes its gate: {"0.norm": "0.mlp"}; None for a gate that
            is left out, as that of openpi's last norm. Without, each site takes its own.

    Raises:
        ValueError: for no projections, other numbers of sites than the layout has, a site named twice,
            projections of different conditions, sizes that are not divisible, and tuples of projections that
            are not one for each word, of one size; for gates of a layout without, and such that are not of
            the sites.

    Example:
        >>> blocks = {(f"{i}.norm1", f"{i}.norm2"): nn.Linear(512, 6 * 64) for i in range(3)}
        >>> gates = {f"{i}.{norm}": f"{i}.{branch}" for i in range(3)
        ...          for norm, branch in (("norm1", "attention"), ("norm2", "mlp"))}
        >>> modulations = as_generator(blocks, "dit", gates=gates)(torch.rand(2, 512))
        >>> modulations["1.norm2"].gamma.shape, modulations["1.mlp"].gate.shape
        (torch.Size([2, 64]), torch.Size([2, 64]))
    """
    layout = _layout(layout)
    projections = {key: _packed(key, projection, layout) for key, projection in projections.items()}
    emitted = [word for word in get_args(Emitted) if _THEIRS[word] & set(layout.words)]
    raw = "gamma" in layout.words
    words = _OURS | ({"gamma": "gamma"} if raw else {})
    ours = Layout(" ".join(words[word] for word in emitted * layout.sites))
    sites: dict[str, int] = {}
    parts = []
    for key, projection in projections.items():
        names = (key,) if isinstance(key, str) else key
        if len(names) != layout.sites:
            raise ValueError(
                f"as_generator: expected {layout.sites} sites for each projection of {layout.order!r}, "
                f"got {names}.\nGive a tuple of names, in the order of the layout."
            )
        twice = [name for i, name in enumerate(names) if name in sites or name in names[:i]]
        if twice:
            raise ValueError(
                f"as_generator: expected each site once, got {twice[0]!r} again in {names}.\n"
                f"Give every norm or block of the network a name of its own."
            )
        sites |= dict.fromkeys(names, projection.out_features // len(layout.words))
        parts.append(convert(projection.weight, projection.bias, layout, ours))
    conditions = {projection.in_features for projection in projections.values()}
    if len(conditions) != 1:
        raise ValueError(
            f"as_generator: expected projections of one condition, got sizes {sorted(conditions)}.\n"
            f"One generator reads one condition."
        )
    weight, bias = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    start: dict[str, Any] = {"init": "default", "gamma_offset": 0.0} if raw else {}
    emit: Any = emitted
    if gates is not None:
        _check_gates(gates, sites, layout)
        sites, emit, kept = _parted(sites, gates, emitted[:-1])
        weight, bias = weight[kept], bias[kept]
    generator = Generator(conditions.pop(), sites, trunk=layout.trunk, emit=emit, **start)
    generator.head.load_state_dict({"weight": weight, "bias": bias})
    return generator.to(weight)


def _packed(key: Any, projection: nn.Linear | Sequence[nn.Linear], layout: Layout) -> nn.Linear:
    """Return the one projection that says what those of single words say."""
    if isinstance(projection, nn.Linear):
        return projection
    sizes = [(one.in_features, one.out_features) for one in projection]
    if len(sizes) != len(layout.words) or len(set(sizes)) != 1:
        raise ValueError(
            f"as_generator: expected a projection for each word of {layout.order!r}, all of one size, got "
            f"{len(sizes)} at {key!r}, of (in_features, out_features) {sizes}.\n"
            f"Give them in the order of the layout."
        )
    packed = nn.Linear(sizes[0][0], len(sizes) * sizes[0][1], device="meta")
    packed.weight = nn.Parameter(torch.cat([one.weight for one in projection]))
    biases = [one.weight.new_zeros(len(one.weight)) if one.bias is None else one.bias for one in projection]
    packed.bias = nn.Parameter(torch.cat(biases))
    return packed


def _parted(
    sites: Mapping[str, int], gates: Mapping[str, str | None], at_norms: Sequence[str]
) -> tuple[dict[str, int], dict[str, Sequence[str]], list[bool]]:
    """Return the sites, behind each that of its gate; what each takes; and which rows are taken."""
    found: dict[str, int] = {}
    fields: dict[str, Sequence[str]] = {}
    kept: list[bool] = []
    for name, channels in sites.items():
        found[name], fields[name] = channels, at_norms
        kept += [True] * channels * len(at_norms) + [gates[name] is not None] * channels
        if (end := gates[name]) is not None:
            found[end], fields[end] = channels, ("gate",)
    return found, fields, kept


def _check_gates(gates: Mapping[str, str | None], sites: Mapping[str, int], layout: Layout) -> None:
    """Raise ValueError for gates that do not name one site for each of these, and for a layout without."""
    if "gate" not in layout.words or set(layout.words) == {"gate"}:
        raise ValueError(
            f"as_generator: expected a layout with a gate and more for gates=, got {layout.order!r}.\n"
            f"Leave gates= out."
        )
    for name in gates:
        if name not in sites:
            raise ValueError(
                f"as_generator: expected gates of the sites of projections, got one of {name!r}.\n"
                f"The nearest are {nearest(name, sites)}."
            )
    for name in sites:
        if name not in gates:
            raise ValueError(
                f"as_generator: expected the site that takes the gate of {name!r}, got none.\n"
                f"Give gates={{{name!r}: ...}}: the branch behind it, or None where nothing takes it."
            )
    ends = [end for end in gates.values() if end is not None]
    twice = [end for end in ends if end in sites or ends.count(end) > 1]
    if twice:
        raise ValueError(
            f"as_generator: expected each site once, got {twice[0]!r} again in gates.\n"
            f"Every gate acts at a branch of its own, at none of the sites that take gamma and beta."
        )


_OURS = {"gamma": "scale", "beta": "shift", "gate": "gate"}
_THEIRS = {"gamma": {"gamma", "scale"}, "beta": {"shift"}, "gate": {"gate"}}


def _layout(layout: str | Layout) -> Layout:
    if isinstance(layout, Layout):
        return layout
    check_choice("layout:", layout, [*LAYOUTS], remedy="For another order give Layout('shift scale').")
    return LAYOUTS[layout]


def _blocks(tensor: Tensor, layout: Layout, dim: int) -> tuple[Tensor, ...]:
    if tensor.shape[dim] % len(layout.words):
        raise ValueError(
            f"layout {layout.order!r}: expected a size divisible by its {len(layout.words)} words, "
            f"got {tensor.shape[dim]} on axis {dim} of {tuple(tensor.shape)}.\n"
            f"Every word has as many numbers as there are channels."
        )
    return tensor.chunk(len(layout.words), dim)


def _order(source: Layout, target: Layout) -> list[int]:
    """Return which block of the source each block of the target is; the n-th of a word stays the n-th."""
    places: dict[str, list[int]] = {}
    for i, word in enumerate(_same(source)):
        places.setdefault(word, []).append(i)
    if sorted(_same(source)) != sorted(_same(target)):
        raise ValueError(
            f"layouts: expected the same words, got {source} and {target}.\n"
            f"What a projection does not predict cannot be made by changing its order."
        )
    return [places[word].pop(0) for word in _same(target)]


def _same(layout: Layout) -> list[str]:
    return ["gamma" if word == "scale" else word for word in layout.words]
