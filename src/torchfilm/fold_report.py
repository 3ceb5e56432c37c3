"""Where each modulation went when a network was folded, and how exact it is there, measured."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import batchnorm, conv, instancenorm

from torchfilm.fold_draft import Affine
from torchfilm.naming import Entries
from torchfilm.writing import in_columns


@dataclass(frozen=True)
class FoldedSite:
    """What became of one site.

    Args:
        site: its name.
        target: the tensors that took its modulation; "constant" where it was kept, "padding" where the border
            of a convolution took a part.
        error: the largest difference from the modulated layer in float64, on random features, relative to its
            largest output; 0 for a constant, which computes what was computed before.
        note: why it was kept, or what else changed.
    """

    site: str
    target: str
    error: float
    note: str = ""


@dataclass(frozen=True)
class FoldReport(Entries[FoldedSite]):
    """What folding did, site by site; prints as a table.

    Args:
        sites: one entry for each site, in the order of the network.
        parameters: how many numbers the network has now, and how many it had.
        error: the largest difference between the outputs of the folded and the conditioned network on the
            inputs that were given, relative to the largest number of each; None without inputs.
        fused: each convolution that took a BatchNorm, with its name.
    """

    sites: tuple[FoldedSite, ...]
    parameters: tuple[int, int]
    error: float | None = None
    fused: tuple[tuple[str, str], ...] = ()

    def _by_name(self) -> dict[str, FoldedSite]:
        """Return the entries by the names of the sites."""
        return {one.site: one for one in self.sites}

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def __repr__(self) -> str:
        rows = [("site", "went into", "error", "note")]
        rows += [(s.site, s.target, f"{s.error:.1e}", s.note) for s in self.sites]
        lines = [in_columns(rows)]
        lines += [f"{conv} took the BatchNorm {norm}" for conv, norm in self.fused]
        lines.append(f"{self.parameters[1]:,} parameters became {self.parameters[0]:,}")
        if self.error is not None:
            lines.append(f"outputs differ by {self.error:.1e} of the largest")
        return "\n".join(lines)


@dataclass
class Reference:
    """What a layer computed before it was folded: its input maps, itself, its output maps, what follows.

    Args:
        layer: a copy from before, which shares its tensors.
        inputs: map and axis of what is modulated in front, the outermost first.
        outputs: likewise behind, the innermost first.
        following: the reference of a BatchNorm that the layer took.
    """

    layer: nn.Module
    inputs: list[tuple[Affine, int]] = field(default_factory=list)
    outputs: list[tuple[Affine, int]] = field(default_factory=list)
    following: Reference | None = None

    @classmethod
    def of(cls, layer: nn.Module) -> Reference:
        """Remember a layer as it is, whatever takes the place of its tensors later."""
        shared: dict[int, Any] = {id(t): t for t in (*layer.parameters(), *layer.buffers())}
        return cls(copy.deepcopy(layer, shared))

    def __call__(self, x: Tensor) -> Tensor:
        """Return what was computed before, without hooks, in float64 where the layer has plain numbers."""
        for affine, dim in self.inputs:
            x = mapped(x, affine, dim)
        layer = self.layer if is_quantised(self.layer) else _on_cpu(self.layer).double()
        y = layer.forward(x).cpu().double()
        for affine, dim in self.outputs:
            y = mapped(y, affine, dim)
        return y if self.following is None else self.following(y)

    def error(self, folded: nn.Module) -> float:
        """Return the largest relative difference that folding made, on random features.

        Switches for products of float32 have no part in it; what half precision holds has.
        """
        now, quantised = _on_cpu(folded), is_quantised(self.layer)
        own = (tensor for tensor in now.parameters() if tensor.is_floating_point())
        like = next(own, torch.empty(0, dtype=torch.float32, device="cpu"))
        x = probe(self.layer).to(like.device)
        rounded = x.to(like.dtype) if x.is_floating_point() else x
        with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
            expected = self(rounded if quantised else x)
            if like.dtype == torch.float32 and not quantised:
                now, rounded = now.double(), x
            y = now.forward(rounded).cpu().double()
        return float(
            (y - expected).abs().max() / expected.abs().max().clamp(min=torch.finfo(like.dtype).tiny)
        )


def _on_cpu(layer: nn.Module) -> nn.Module:
    """Return a copy on the CPU, which has float64; where it is, if its kernels may not be there."""
    copied = copy.deepcopy(layer)
    return copied if is_quantised(layer) else copied.cpu()


def mapped(x: Tensor, affine: Affine, dim: int) -> Tensor:
    """Return the map of the channels of x, as written: slow, and not by the code that is checked."""
    last = x.movedim(dim, -1)
    factor, shift = affine.factor.to(last), affine.shift.to(last)
    return ((last @ factor.T if affine.mixes else last * factor) + shift).movedim(-1, dim)


def is_quantised(module: nn.Module) -> bool:
    """Whether a layer has weights that are no plain floating-point numbers."""
    weight: Any = getattr(module, "weight", None)
    return not isinstance(weight, Tensor | None) or (weight is not None and type(weight.data) is not Tensor)


def probe(layer: Any) -> Tensor:
    """Return random features that a layer of torch takes, in float64; every row for an embedding."""
    if isinstance(layer, nn.Embedding):
        return torch.arange(layer.num_embeddings, device="cpu")
    if isinstance(layer, conv._ConvNd):
        reach = [d * (k - 1) + 3 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        shape = [2, layer.in_channels, *([3] * len(reach) if layer.transposed else reach)]
    elif isinstance(layer, batchnorm._BatchNorm):
        axes = {nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}
        shape = [2, layer.num_features, *[3] * next((n for k, n in axes.items() if isinstance(layer, k)), 1)]
    elif isinstance(layer, instancenorm._InstanceNorm):
        shape = [2, layer.num_features, *[3] * (layer._get_no_batch_dim() - 1)]
    elif isinstance(layer, nn.GroupNorm):
        shape = [2, layer.num_channels, 5]
    elif isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        shape = [2, *layer.normalized_shape]
    else:
        shape = [2, 5, layer.in_features]
    chance = torch.Generator().manual_seed(0)
    return torch.randn(shape, dtype=torch.float64, device="cpu", generator=chance)
