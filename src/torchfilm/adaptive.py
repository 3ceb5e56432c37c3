"""Norms of gated residual branches: adaLN-Zero and adaRMS.

x + gate(z) * branch(gamma(z) * norm(x) + beta(z)). The layer gives the branch its input and hands on the
gate, for `torchfilm.functional.gated_residual` at the end of the branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from torchfilm.heads import like_weights
from torchfilm.layers import FiLM, GateStart, resolve
from torchfilm.modulation import Modulation
from torchfilm.norms import ListeningNorm, channels_of

_Gated = TypeVar("_Gated", bound="_GatedNorm")


class _GatedNorm(ListeningNorm):
    """What AdaLN-Zero and adaRMS share: they return the gate of the branch that follows."""

    _dim = -1

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        cond_dim: int,
        *,
        eps: float | None = 1e-6,
        elementwise_affine: bool = False,
        gate: GateStart = "zero",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._base.__init__(self, normalized_shape, eps, elementwise_affine, device=device, dtype=dtype)
        features = channels_of(type(self).__name__, self)
        self.film = FiLM(features, cond_dim, dim=-1, gate=gate, device=device, dtype=dtype)

    @classmethod
    def from_norm(cls: type[_Gated], norm: nn.Module, cond_dim: int, *, gate: GateStart = "one") -> _Gated:
        """Condition the trained norm of a branch: its own parameters, and a gate that starts at one.

        Raises:
            ValueError: for anything but torch's norm of this kind, not a subclass, or another gate. Norms of
            others, as those of Gemma and Llama, round elsewhere in half precision: `condition` keeps them.
        """
        return cls.around(norm, cond_dim, gate)

    def forward(
        self,
        x: Float[Tensor, "*batch channels"],
        condition: Float[Tensor, "*cond_batch cond"] | None = None,
        *,
        modulation: Modulation | None = None,
    ) -> tuple[Float[Tensor, "*batch channels"], Float[Tensor, "*gate_batch channels"]]:
        """Return the normalised, modulated features, and the gate for the end of the branch.

        Args:
            x: tokens with C features on the last axis.
            condition: [B, cond_dim], or [B, T, cond_dim] for one condition per token.
            modulation: a ready modulation with a gate, instead of a condition.

        Raises:
            ValueError: unless exactly one of condition and modulation is given, where sizes do not fit, and
            for a modulation without a gate.
        """
        chosen = resolve(self, condition, modulation, x)
        if chosen.gate is None:
            raise ValueError(
                f"{type(self).__name__}: expected a modulation with a gate, got gamma and beta alone.\n"
                f"Give it one, m.replace(gate=torch.ones_like(m.gamma)), or use a conditional norm."
            )
        return self.modulated(x, Modulation(chosen.gamma, chosen.beta)), chosen.gate


class AdaLNZero(_GatedNorm, nn.LayerNorm):
    """Adaptive layer norm of a residual branch: x + gate(z) * branch(gamma(z) * LN(x) + beta(z)).

    adaLN-Zero (Peebles and Xie 2023, section 3.2, arXiv 2212.09748): one linear map of silu(z), zero at the
    start. The layer returns (y, gate); the block ends in `torchfilm.functional.gated_residual`. A gate of
    zero starts every block as the identity; a pretrained branch needs gate "one", or it is erased.

    Args:
        normalized_shape: features of a token, C or (C,), on the last axis of x.
        cond_dim: size of the condition's last axis; a condition [B, T, cond_dim] has a row for each token.
        eps: added to the variance.
        elementwise_affine: give the norm learned factors and shifts of its own, besides gamma and beta.
        gate: "zero" from scratch, "one" around what is trained.
        device: where the parameters live.
        dtype: their precision.

    Raises:
        ValueError: for a normalized_shape of more than one axis, or another gate.

    Example:
        >>> from torchfilm.functional import gated_residual
        >>> norm, mlp, x, z = AdaLNZero(64, 512), nn.Linear(64, 64), torch.rand(2, 7, 64), torch.rand(2, 512)
        >>> y, gate = norm(x, z)
        >>> x = gated_residual(x, mlp(y), gate, dim=-1)
    """

    _base = nn.LayerNorm

    def modulation(self, condition: Float[Tensor, "*batch cond"]) -> Modulation:
        """Return gamma, beta and the gate for a condition, without applying them."""
        return self.film.modulation(functional.silu(like_weights(condition, self.film.head.weight)))


class AdaRMSNorm(_GatedNorm, nn.RMSNorm):
    """Adaptive RMS norm of a residual branch: x + gate(z) * branch(gamma(z) * RMS(x) + beta(z)).

    adaRMS of pi0.5 (arXiv 2504.16054): scale, shift and gate come from one linear map of the condition, zero
    in weight and bias, so that at the start every block is the identity. The layer returns (y, gate), as
    `AdaLNZero`. For real-time chunking give a condition per token, [B, T, cond_dim].

    Args:
        normalized_shape: features of a token, C or (C,), on the last axis of x.
        cond_dim: size of the condition's last axis.
        eps: added to the mean square.
        elementwise_affine: give the norm learned factors of its own, besides gamma.
        gate: "zero" from scratch, "one" around what is trained.
        device: where the parameters live.
        dtype: their precision.

    Raises:
        ValueError: for a normalized_shape of more than one axis, or another gate.

    Example:
        >>> norm = AdaRMSNorm(64, cond_dim=512)
        >>> y, gate = norm(torch.rand(2, 7, 64), torch.rand(2, 512))
    """

    _base = nn.RMSNorm
