"""Layers that listen: FiLM and DenseFiLM; conditional norms are in `torchfilm.norms`.

Each layer takes features and a condition vector, or a ready `Modulation` by keyword; each is the identity, to
the bit, until it is trained. `layer.modulation(z)` is what a condition becomes, without applying it.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from torchfilm.functional import film
from torchfilm.heads import AffineHead, like_weights, no_row
from torchfilm.modulation import Modulation
from torchfilm.naming import check_choice, check_size

GateStart = Literal["zero", "one"]


class Listening(nn.Module):
    """A layer that hears a condition: `modulation` is what that becomes, `modulated` what it does to x."""

    def forward(
        self,
        x: Float[Tensor, "*shape"],
        condition: Float[Tensor, "*batch cond"] | None = None,
        *,
        modulation: Modulation | None = None,
        rows: Int[Tensor, " nodes"] | None = None,
    ) -> Float[Tensor, "*shape"]:
        """Return the modulated features, of a norm behind its normalisation, with the shape and dtype of x.

        Args:
            x: features with C channels, where the layer has them.
            condition: [B, cond_dim], or [B, T, cond_dim] for one condition per step; its axes besides the
                last align with those of x besides the channels, from the left.
            modulation: a ready modulation instead of a condition, channels last, aligned in the same way.
            rows: for each row of x, the row of the condition (or modulation) that it listens to; as the
                `batch` of torch_geometric. None where row i listens to condition i.

        Raises:
            ValueError: unless exactly one of condition and modulation is given, and where sizes do not fit.
            IndexError: for a row that the condition does not have, also one counted from the end (on an
                accelerator, torch's own).
        """
        return self.modulated(x, resolve(self, condition, modulation, x, rows))

    def modulation(self, condition: Float[Tensor, "*batch cond"]) -> Modulation:
        """Return gamma, beta and the gate where there is one, [*batch, C] each, without applying them."""
        raise NotImplementedError

    def modulated(self, x: Tensor, modulation: Modulation) -> Tensor:
        """Return the features, modulated."""
        raise NotImplementedError


def resolve(
    layer: Listening,
    condition: Tensor | None,
    modulation: Modulation | None,
    x: Tensor,
    rows: Tensor | None = None,
) -> Modulation:
    """Return the modulation that is meant: the one given, or the one that the layer makes of the condition.

    Raises:
        ValueError: unless exactly one of the two is given; without a condition nothing is silently plain. And
            for rows that are not one for each row of x.
    """
    if modulation is None and condition is not None:
        modulation, condition = layer.modulation(condition), None
    if modulation is None or condition is not None:
        raise ValueError(
            f"{type(layer).__name__}: expected a condition or a modulation, got "
            f"{'neither' if modulation is None else 'both'}.\n"
            f"Call layer(x, condition) or layer(x, modulation=...); for no conditioning at all use "
            f"Modulation.identity(features)."
        )
    return modulation if rows is None else _picked(layer, modulation, rows, x)


def _picked(layer: Listening, modulation: Modulation, rows: Tensor, x: Tensor) -> Modulation:
    """Return the modulation of each row: as by indexing, but a row counted from the end is none."""
    if rows.dtype not in (torch.int64, torch.int32) or rows.shape != x.shape[:1]:
        raise ValueError(
            f"{type(layer).__name__}: expected rows as int64 or int32 numbers, one for each of the "
            f"{x.shape[0]} rows of x, got {rows.dtype} {tuple(rows.shape)}.\n"
            f"For sizes of graphs use torch.repeat_interleave(torch.arange(len(sizes)), sizes)."
        )
    fields = modulation.of_rows()
    try:
        return Modulation(*(field.index_select(0, rows) for field in fields))
    except IndexError as error:
        raise no_row(f"{type(layer).__name__}: rows", len(fields[0]), rows) from error


class FiLM(Listening):
    """Modulate features by a condition: y = gamma(z) * x + beta(z), with (gamma - 1, beta) = W z + b.

    Perez et al. 2018, eq. 1 and 2 (arXiv 1709.07871). The identity at the start, to the bit. For many sites
    on one condition use one `Generator` and hand each site its modulation: one matrix product instead of
    many.

    With a gate, y = gate(z) * (gamma(z) * x + beta(z)), for the end of a residual branch. Its head has a
    third block of rows; the order is gamma, beta, gate.

    Over time, give a condition per step, [B, T, cond_dim]. Over a batch of graphs, give one condition per
    graph and `rows`, the graph of each node (GNN-FiLM, Brockschmidt 2020, arXiv 1906.12192, modulates
    messages by their target node in the same way).

    Args:
        features: channels of x, C.
        cond_dim: size of the condition's last axis.
        dim: the channel axis of x; 1 for convolutions and for node features [N, C], -1 for tokens.
        gate: None for none; "zero" starts with the branch switched off, as adaLN-Zero from scratch does;
            "one" starts with the branch as it is, as a pretrained network needs.
        device: where the parameters live.
        dtype: precision of the parameters; gamma and beta are float32 or wider in any case.

    Raises:
        ValueError: for another gate, and for sizes that are no whole numbers from 1 on.

    Example:
        >>> layer = FiLM(64, cond_dim=512)
        >>> y = layer(torch.rand(2, 64, 7, 7), torch.rand(2, 512))
        >>> nodes, graph = torch.rand(5, 64), torch.tensor([0, 0, 0, 1, 1])
        >>> y = layer(nodes, torch.rand(2, 512), rows=graph)
    """

    def __init__(
        self,
        features: int,
        cond_dim: int,
        dim: int = 1,
        *,
        gate: GateStart | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        meaning = "'zero' is the start from scratch, 'one' keeps a pretrained branch."
        check_choice("FiLM: gate", gate, (None, *get_args(GateStart)), remedy=meaning)
        check_size("FiLM: features", features)
        check_size("FiLM: cond_dim", cond_dim)
        self.features = features
        self.dim = dim
        self.gate = gate
        rows = (2 if gate is None else 3) * features
        self.head = AffineHead(cond_dim, rows, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Return to the start: gamma = 1, beta = 0 and the gate as it was asked for."""
        self.head.reset_parameters()

    def modulation(self, condition: Float[Tensor, "*batch cond"]) -> Modulation:
        """Return gamma, beta and the gate for a condition, [*batch, C] each, without applying them."""
        parts = self.head(condition).chunk(2 if self.gate is None else 3, dim=-1)  # Tensor.split takes longer
        gate = None if self.gate is None else parts[2] if self.gate == "zero" else 1 + parts[2]
        return Modulation(1 + parts[0], parts[1], gate)

    def modulated(self, x: Tensor, modulation: Modulation) -> Tensor:
        """Return gate * (gamma * x + beta)."""
        m = modulation
        return film(x, m.gamma, m.beta, self.dim, gate=m.gate, modulation_dim=-1)

    def extra_repr(self) -> str:
        """Show the options in `repr`."""
        gate = "" if self.gate is None else f", gate={self.gate!r}"
        return f"{self.features}, dim={self.dim}{gate}"


class DenseFiLM(Listening):
    """Modulate tokens by an embedding: y = (1 + scale) * x + shift, with (scale, shift) = W mish(z) + b.

    The feature-wise affine of Audio2Photoreal (Ng et al. 2024, arXiv 2401.01885), which FiLMs each sublayer
    of its motion transformer; in this package's words gamma = 1 + scale and beta = shift. Zero at the start,
    so the identity. The rows of the original's Linear are [scale, shift]: its checkpoints load as
    `film.head`. For a scale and a shift in hand use `torchfilm.functional.featurewise_affine`.

    Args:
        features: channels of x, C.
        cond_dim: size of the condition's last axis.
        dim: the channel axis of x; tokens have it last.
        gate: as in `FiLM`.
        device: where the parameters live.
        dtype: precision of the parameters.

    Example:
        >>> layer = DenseFiLM(64, cond_dim=512)
        >>> y = layer(torch.rand(2, 196, 64), torch.rand(2, 512))
    """

    def __init__(
        self,
        features: int,
        cond_dim: int,
        dim: int = -1,
        *,
        gate: GateStart | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.film = FiLM(features, cond_dim, dim, gate=gate, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Return to the start, as `FiLM.reset_parameters`."""
        self.film.reset_parameters()

    def modulation(self, condition: Float[Tensor, "*batch cond"]) -> Modulation:
        """Return gamma = 1 + scale and beta = shift for a condition, without applying them."""
        return self.film.modulation(functional.mish(like_weights(condition, self.film.head.weight)))

    def modulated(self, x: Tensor, modulation: Modulation) -> Tensor:
        """Return (1 + scale) * x + shift."""
        return self.film(x, modulation=modulation)
