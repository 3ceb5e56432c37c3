"""Layers that listen: FiLM, DenseFiLM and conditional normalisation.

Each layer takes features and a condition vector, or a ready `Modulation` by keyword; each is the identity, to
the bit, until it is trained.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from torchfilm.functional import film
from torchfilm.modulation import Modulation


class Head(nn.Module):
    """Predict modulation parameters from a condition: y = W z + b, with W and b zero at the start.

    Not a subclass of `nn.Linear`, on purpose: the initialisation hooks of other libraries pick `nn.Linear`
    modules and would refill them (a common port of adaRMS lost its zero start in this way). A hook that walks
    over parameters and not over modules cannot be evaded; call `reset_parameters()` after it. The parameter
    names are those of `nn.Linear`, so checkpoints convert by renaming alone.

    Args:
        cond_dim: size of the condition's last axis.
        rows: how many numbers are predicted.
        device: where the parameters live.
        dtype: precision of the parameters.
    """

    def __init__(
        self,
        cond_dim: int,
        rows: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.cond_dim = cond_dim
        self.weight = nn.Parameter(torch.empty(rows, cond_dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set weight and bias to zero; a bias left as it was would modulate every sample alike."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, condition: Float[Tensor, "*batch cond"]) -> Float[Tensor, "*batch rows"]:
        """Return W z + b in float32 or wider, whatever precision autocast took for the product.

        Raises:
            ValueError: where the condition's last axis is not `cond_dim`.
        """
        if condition.ndim == 0 or condition.shape[-1] != self.cond_dim:
            raise ValueError(
                f"condition: expected {self.cond_dim} numbers on the last axis (cond_dim), got shape "
                f"{tuple(condition.shape)}.\n"
                f"Build the layer with the condition's size, or project the condition first."
            )
        raw = functional.linear(condition, self.weight, self.bias)
        return raw.to(torch.promote_types(raw.dtype, torch.float32))

    def extra_repr(self) -> str:
        """Show the sizes in `repr`."""
        return f"{self.cond_dim}, {self.weight.shape[0]}"


class FiLM(nn.Module):
    """Modulate features by a condition: y = gamma(z) * x + beta(z), with (gamma - 1, beta) = W z + b.

    Perez et al. 2018, eq. 1 and 2 (arXiv 1709.07871). The identity at the start, to the bit. For many sites
    on one condition use one `Generator` and hand each site its modulation: one matrix product instead of
    many.

    Args:
        features: channels of x, C.
        cond_dim: size of the condition's last axis.
        dim: the channel axis of x; 1 for convolutions, -1 for tokens.
        device: where the parameters live.
        dtype: precision of the parameters; gamma and beta are float32 or wider in any case.

    Example:
        >>> layer = FiLM(64, cond_dim=512)
        >>> y = layer(torch.rand(2, 64, 7, 7), torch.rand(2, 512))
    """

    def __init__(
        self,
        features: int,
        cond_dim: int,
        dim: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.features = features
        self.dim = dim
        self.head = Head(cond_dim, 2 * features, device=device, dtype=dtype)

    def forward(
        self,
        x: Float[Tensor, "*shape"],
        condition: Float[Tensor, "*batch cond"] | None = None,
        *,
        modulation: Modulation | None = None,
    ) -> Float[Tensor, "*shape"]:
        """Return the modulated features, with the shape, dtype and memory format of x.

        Args:
            x: features with C channels on axis `dim`.
            condition: [B, cond_dim], or [B, T, cond_dim] for one condition per step; its axes besides the
                last align with those of x besides the channels, from the left.
            modulation: a ready modulation instead of a condition, channels last, aligned in the same way.

        Raises:
            ValueError: unless exactly one of condition and modulation is given, and where sizes do not fit.
        """
        if modulation is None and condition is not None:
            modulation = self.modulation(condition)
        elif modulation is None or condition is not None:
            raise ValueError(
                f"{type(self).__name__}: expected a condition or a modulation, got "
                f"{'neither' if modulation is None else 'both'}.\n"
                f"Call layer(x, condition) or layer(x, modulation=...); for no conditioning at all use "
                f"Modulation.identity({self.features})."
            )
        return film(x, modulation.gamma, modulation.beta, self.dim, modulation_dim=-1)

    def modulation(self, condition: Float[Tensor, "*batch cond"]) -> Modulation:
        """Return gamma and beta for a condition, [*batch, C] each, without applying them."""
        delta, beta = self.head(condition).chunk(2, dim=-1)
        return Modulation(1 + delta, beta)

    def extra_repr(self) -> str:
        """Show the options in `repr`."""
        return f"{self.features}, dim={self.dim}"


class DenseFiLM(nn.Module):
    """Modulate tokens by an embedding: y = (1 + scale) * x + shift, with (scale, shift) = W mish(z) + b.

    The feature-wise affine of Audio2Photoreal (Ng et al. 2024, arXiv 2401.01885), which FiLMs each sublayer
    of its motion transformer; in this package's words gamma = 1 + scale and beta = shift. Zero at the start,
    so the identity.

    Args:
        features: channels of x, C.
        cond_dim: size of the condition's last axis.
        dim: the channel axis of x; tokens have it last.
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.film = FiLM(features, cond_dim, dim, device=device, dtype=dtype)

    def forward(
        self,
        x: Float[Tensor, "*shape"],
        condition: Float[Tensor, "*batch cond"] | None = None,
        *,
        modulation: Modulation | None = None,
    ) -> Float[Tensor, "*shape"]:
        """Return the modulated features; arguments and errors as `FiLM.forward`."""
        active = None if condition is None else functional.mish(condition)
        return self.film(x, active, modulation=modulation)


class ConditionalBatchNorm2d(nn.Module):
    """Normalise each channel over the batch, then modulate it: y = gamma(z) * BN(x) + beta(z).

    The paper's place for FiLM (Perez et al. 2018, section 3.2, with affine=False) and, with the trained
    affine of a pretrained norm kept inside BN, conditional batch normalisation (de Vries et al. 2017, arXiv
    1707.00683), whose change of the affine is read here as a factor on it: at the start the output is BN's
    own, to the bit.

    The norm is a child named `norm`, so `SyncBatchNorm.convert_sync_batchnorm` and folding find it.

    Args:
        num_features: channels of x, C.
        cond_dim: size of the condition's last axis.
        eps: added to the variance.
        momentum: weight of the current batch in the running statistics; None for their plain average.
        affine: give BN learned factors and shifts of its own, which gamma and beta do not need.
        track_running_stats: keep running statistics for evaluation.
        device: where parameters and statistics live.
        dtype: their precision.

    Example:
        >>> layer = ConditionalBatchNorm2d(64, cond_dim=512)
        >>> y = layer(torch.rand(2, 64, 7, 7), torch.rand(2, 512))
    """

    def __init__(
        self,
        num_features: int,
        cond_dim: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        self.film = FiLM(num_features, cond_dim, device=device, dtype=dtype)

    @classmethod
    def from_norm(cls, norm: nn.BatchNorm2d, cond_dim: int) -> ConditionalBatchNorm2d:
        """Condition a trained norm; it is kept itself, with its affine, statistics, options and mode.

        Raises:
            ValueError: for anything that is no `nn.BatchNorm2d`.
        """
        if not isinstance(norm, nn.BatchNorm2d):
            raise ValueError(
                f"ConditionalBatchNorm2d.from_norm: expected nn.BatchNorm2d, got {type(norm).__name__}.\n"
                "For other layers put a FiLM(features, cond_dim) behind them."
            )
        tensors = [*norm.parameters(), *norm.buffers()]
        layer = cls(norm.num_features, cond_dim, device=tensors[0].device if tensors else None)
        layer.norm = norm
        return layer.train(norm.training)

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        condition: Float[Tensor, "*batch cond"] | None = None,
        *,
        modulation: Modulation | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        """Return the normalised, modulated features; arguments and errors as `FiLM.forward`."""
        return self.film(self.norm(x), condition, modulation=modulation)
