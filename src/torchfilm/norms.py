"""Norms that listen: conditional batch, instance, group, layer and RMS norms.

y = gamma(z) * norm(x) + beta(z). Each takes the leading arguments of torch's norm, then `cond_dim`, and
starts as torch's norm, to the bit. `from_norm` conditions a trained norm relative to what it has learned. All
but the batch norms are subclasses of torch's own and keep its names in the state dict.

Where gamma and beta hold for a whole sample they are multiplied into the affine of the norm, which then costs
no more than without a condition (`torchfilm.absorption`): for group and instance norms at any batch, in
training too; for layer and RMS norms where all samples share one modulation.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torchfilm.absorption import absorbed
from torchfilm.layers import FiLM, GateStart, Listening
from torchfilm.modulation import Modulation

# Not typing.Self: the type checker of the test session does not take it in single methods.
_Batch = TypeVar("_Batch", bound="_ConditionalBatchNorm")
_Norm = TypeVar("_Norm", bound="ListeningNorm")


class _ConditionalBatchNorm(Listening):
    """What the conditional batch norms of each number of axes share."""

    _base: ClassVar[type[nn.modules.batchnorm._BatchNorm]]

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
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = self._base(num_features, eps, momentum, affine, track_running_stats, **options)
        self.film = FiLM(num_features, cond_dim, **options)

    def reset_parameters(self) -> None:
        """Return to the start: the norm with its statistics as torch's does, and gamma and beta."""
        self.norm.reset_parameters()
        self.film.reset_parameters()

    @classmethod
    def from_norm(cls: type[_Batch], norm: nn.Module, cond_dim: int) -> _Batch:
        """Condition a trained norm; it is kept itself, with its affine, statistics, options and mode.

        Raises:
            ValueError: for anything but torch's batch norm of this number of axes, or its synchronised form.
        """
        if not isinstance(norm, cls._base | nn.SyncBatchNorm):
            raise ValueError(_wrong_norm(cls.__name__, cls._base, norm))
        tensors = [*norm.parameters(), *norm.buffers()]
        layer = cls(norm.num_features, cond_dim, device=tensors[0].device if tensors else None)
        layer.norm = norm
        return layer.train(norm.training)

    @property
    def weight(self) -> Tensor | None:
        """The learned factors of the norm itself; init hooks that go by class names ask for them."""
        return self.norm.weight

    @property
    def bias(self) -> Tensor | None:
        """The learned shifts of the norm itself."""
        return self.norm.bias

    def modulation(self, condition: Float[Tensor, "*batch cond"]) -> Modulation:
        """Return gamma and beta for a condition, without applying them."""
        return self.film.modulation(condition)

    def modulated(self, x: Tensor, modulation: Modulation) -> Tensor:
        """Return gamma * norm(x) + beta."""
        return self.film(self.norm(x), modulation=modulation)


class ConditionalBatchNorm2d(_ConditionalBatchNorm):
    """Normalise each channel of images over the batch, then modulate it: y = gamma(z) * BN(x) + beta(z).

    The paper's place for FiLM (Perez et al. 2018, section 2.2, with affine=False) and, with the trained
    affine of a pretrained norm kept inside BN, conditional batch normalisation (de Vries et al. 2017, arXiv
    1707.00683), whose change of the affine is read here as a factor on it: at the start the output is BN's
    own, to the bit.

    The norm is a child named `norm` and not a base class: `SyncBatchNorm.convert_sync_batchnorm` replaces
    whatever is a batch norm, and would drop the condition with it.

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
        >>> pretrained = ConditionalBatchNorm2d.from_norm(nn.BatchNorm2d(64), cond_dim=512)
    """

    _base = nn.BatchNorm2d


class ConditionalBatchNorm1d(_ConditionalBatchNorm):
    """Conditional batch norm of vectors [B, C] or sequences [B, C, T]; all else as `ConditionalBatchNorm2d`.

    Example:
        >>> layer = ConditionalBatchNorm1d(64, cond_dim=512)
        >>> y = layer(torch.rand(2, 64), torch.rand(2, 512))
    """

    _base = nn.BatchNorm1d


class ConditionalBatchNorm3d(_ConditionalBatchNorm):
    """Conditional batch norm of volumes [B, C, D, H, W]; all else as `ConditionalBatchNorm2d`.

    Example:
        >>> layer = ConditionalBatchNorm3d(64, cond_dim=512)
        >>> y = layer(torch.rand(2, 64, 3, 5, 5), torch.rand(2, 512))
    """

    _base = nn.BatchNorm3d


class ListeningNorm(Listening):
    """A norm of torch's, its base class, with a FiLM as the child `film`."""

    _base: ClassVar[type[nn.Module]]
    _dim: ClassVar[int]
    film: FiLM

    def reset_parameters(self) -> None:
        """Return to the start: the norm as torch's does, and the modulation as `FiLM.reset_parameters`."""
        super().reset_parameters()  # type: ignore[misc]
        if "film" in self._modules:  # torch's norm starts before there is one
            self.film.reset_parameters()

    @classmethod
    def around(cls: type[_Norm], norm: nn.Module, cond_dim: int, gate: GateStart | None = None) -> _Norm:
        """Build around the parameters and buffers of a trained norm, with its options and its mode.

        Raises:
            ValueError: for another kind of norm.
        """
        if type(norm) is not cls._base:
            raise ValueError(_wrong_norm(cls.__name__, cls._base, norm, gated=gate is not None))
        tensors = [*norm.parameters(), *norm.buffers()]
        device = tensors[0].device if tensors else None
        film = FiLM(channels_of(cls.__name__, norm), cond_dim, cls._dim, gate=gate, device=device)
        layer = cls.__new__(cls)
        layer.__dict__.update(
            {name: copy.copy(v) if isinstance(v, dict | set) else v for name, v in vars(norm).items()}
        )
        layer.film = film.train(norm.training)
        return layer

    def modulated(self, x: Tensor, modulation: Modulation) -> Tensor:
        """Return gamma * norm(x) + beta, in one call of the norm where that can be."""
        y = absorbed(self._base, self, x, modulation)
        return self.film.modulated(self._base.forward(self, x), modulation) if y is None else y

    def modulation(self, condition: Float[Tensor, "*batch cond"]) -> Modulation:
        """Return gamma, beta and the gate where there is one for a condition, without applying them."""
        return self.film.modulation(condition)


class _ConditionalNorm(ListeningNorm):
    """What the conditional instance, group, layer and RMS norms share."""

    @classmethod
    def from_norm(cls: type[_Norm], norm: nn.Module, cond_dim: int) -> _Norm:
        """Condition a trained norm: its parameters and buffers themselves, its options and its mode.

        gamma and beta act on the trained output, gamma * norm(x) + beta, so that it is kept at the start.

        Raises:
            ValueError: for anything but torch's norm of this kind. A subclass may compute something else, as
                those that normalise channels-first: put a FiLM behind it.
        """
        return cls.around(norm, cond_dim)


class _ConditionalInstanceNorm(_ConditionalNorm):
    def __init__(
        self,
        num_features: int,
        cond_dim: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self._base.__init__(self, num_features, eps, momentum, affine, track_running_stats, **options)
        self.film = FiLM(num_features, cond_dim, self._dim, **options)


class ConditionalInstanceNorm2d(_ConditionalInstanceNorm, nn.InstanceNorm2d):
    """Normalise each channel of each image, then modulate it: y = gamma(z) * IN(x) + beta(z).

    Conditional instance normalisation, a style per condition (Dumoulin et al. 2017, eq. 5, arXiv 1610.07629);
    with a predicted condition, AdaIN (Huang and Belongie 2017, arXiv 1703.06868). A mixture of styles is a
    mixture of their modulations: `layer(x, modulation=0.3 * a + 0.7 * b)`.

    Args:
        num_features: channels of x, C.
        cond_dim: size of the condition's last axis.
        eps: added to the variance.
        momentum: weight of the current batch in the running statistics, where they are kept.
        affine: give the norm learned factors and shifts of its own, which gamma and beta do not need.
        track_running_stats: normalise by running statistics in evaluation.
        device: where parameters and statistics live.
        dtype: their precision.

    Example:
        >>> layer = ConditionalInstanceNorm2d(64, cond_dim=512)
        >>> y = layer(torch.rand(2, 64, 7, 7), torch.rand(2, 512))
    """

    _base = nn.InstanceNorm2d
    _dim = -3


class ConditionalInstanceNorm1d(_ConditionalInstanceNorm, nn.InstanceNorm1d):
    """Conditional instance norm of sequences [B, C, T]; all else as `ConditionalInstanceNorm2d`.

    Example:
        >>> layer = ConditionalInstanceNorm1d(64, cond_dim=512)
        >>> y = layer(torch.rand(2, 64, 7), torch.rand(2, 512))
    """

    _base = nn.InstanceNorm1d
    _dim = -2


class ConditionalInstanceNorm3d(_ConditionalInstanceNorm, nn.InstanceNorm3d):
    """Conditional instance norm of volumes [B, C, D, H, W]; all else as `ConditionalInstanceNorm2d`.

    Example:
        >>> layer = ConditionalInstanceNorm3d(64, cond_dim=512)
        >>> y = layer(torch.rand(2, 64, 3, 5, 5), torch.rand(2, 512))
    """

    _base = nn.InstanceNorm3d
    _dim = -4


class ConditionalGroupNorm(_ConditionalNorm, nn.GroupNorm):
    """Normalise groups of channels of each sample, then modulate: y = gamma(z) * GN(x) + beta(z).

    Adaptive group normalisation of diffusion models (Dhariwal and Nichol 2021, section 3, arXiv 2105.05233).

    Args:
        num_groups: groups that the channels are divided into.
        num_channels: channels of x, C.
        cond_dim: size of the condition's last axis.
        eps: added to the variance.
        affine: give the norm learned factors and shifts of its own, which gamma and beta do not need.
        device: where the parameters live.
        dtype: their precision.

    Raises:
        ValueError: torch's own, for channels that the groups do not share evenly.

    Example:
        >>> layer = ConditionalGroupNorm(8, 64, cond_dim=512)
        >>> y = layer(torch.rand(2, 64, 7, 7), torch.rand(2, 512))
    """

    _base = nn.GroupNorm
    _dim = 1

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        cond_dim: int,
        *,
        eps: float = 1e-5,
        affine: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.GroupNorm.__init__(self, num_groups, num_channels, eps, affine, device=device, dtype=dtype)
        self.film = FiLM(num_channels, cond_dim, device=device, dtype=dtype)


class ConditionalLayerNorm(_ConditionalNorm, nn.LayerNorm):
    """Normalise each token, then modulate each feature: y = gamma(z) * LN(x) + beta(z).

    Args:
        normalized_shape: features of a token, C or (C,), on the last axis of x.
        cond_dim: size of the condition's last axis; a condition [B, T, cond_dim] has a row for each token.
        eps: added to the variance.
        elementwise_affine: give the norm learned factors and shifts of its own, besides gamma and beta.
        device: where the parameters live.
        dtype: their precision.

    Raises:
        ValueError: for a normalized_shape of more than one axis, which has no channel axis.

    Example:
        >>> layer = ConditionalLayerNorm(64, cond_dim=512)
        >>> y = layer(torch.rand(2, 7, 64), torch.rand(2, 512))
    """

    _base = nn.LayerNorm
    _dim = -1

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        cond_dim: int,
        *,
        eps: float = 1e-5,
        elementwise_affine: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.LayerNorm.__init__(self, normalized_shape, eps, elementwise_affine, device=device, dtype=dtype)  # type: ignore
        features = channels_of(type(self).__name__, self)
        self.film = FiLM(features, cond_dim, dim=-1, device=device, dtype=dtype)


class ConditionalRMSNorm(_ConditionalNorm, nn.RMSNorm):
    """Divide each token by its root mean square, then modulate: y = gamma(z) * RMS(x) + beta(z).

    Args:
        normalized_shape: features of a token, C or (C,), on the last axis of x.
        cond_dim: size of the condition's last axis; a condition [B, T, cond_dim] has a row for each token.
        eps: added to the mean square; None for the machine epsilon, as torch does.
        elementwise_affine: give the norm learned factors of its own, besides gamma.
        device: where the parameters live.
        dtype: their precision.

    Raises:
        ValueError: for a normalized_shape of more than one axis, which has no channel axis.

    Example:
        >>> layer = ConditionalRMSNorm(64, cond_dim=512)
        >>> y = layer(torch.rand(2, 7, 64), torch.rand(2, 512))
    """

    _base = nn.RMSNorm
    _dim = -1

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        cond_dim: int,
        *,
        eps: float | None = None,
        elementwise_affine: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.RMSNorm.__init__(self, normalized_shape, eps, elementwise_affine, device=device, dtype=dtype)  # type: ignore
        features = channels_of(type(self).__name__, self)
        self.film = FiLM(features, cond_dim, dim=-1, device=device, dtype=dtype)


def channels_of(owner: str, norm: nn.Module) -> int:
    """Return the channels of one of torch's norms.

    Raises:
        ValueError: for a layer or RMS norm over more than one axis, which has no channel axis.
    """
    if isinstance(norm, nn.LayerNorm | nn.RMSNorm):
        if len(norm.normalized_shape) != 1:
            raise ValueError(
                f"{owner}: expected a normalized_shape of one axis, the channels, "
                f"got {tuple(norm.normalized_shape)}.\n"
                f"Put a FiLM(features, cond_dim, dim=...) behind the norm: its dim is the axis modulated."
            )
        return norm.normalized_shape[0]
    return norm.num_channels if isinstance(norm, nn.GroupNorm) else int(norm.num_features)  # type: ignore


def _wrong_norm(owner: str, wanted: type, norm: nn.Module, *, gated: bool = False) -> str:
    kind = type(norm).__name__ if type(norm) is not wanted else "something else"
    remedy = (
        "put a FiLM(features, cond_dim, dim=...) behind it, or condition the network there: "
        "condition(model, 'norm', cond)."
    )
    if gated:
        remedy = (
            "condition the network there, with the gate at the end of the branch: condition(model, "
            "'norm|mlp', cond, emit={'norm': ('gamma', 'beta'), 'mlp': ('gate',)}, gate_start=1)."
        )
    leave = "Another norm may compute something else. Leave it as it is, and"
    return f"{owner}.from_norm: expected nn.{wanted.__name__}, got {kind}.\n{leave} {remedy}"
