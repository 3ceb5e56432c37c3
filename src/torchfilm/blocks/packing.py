"""Convolutions whose weights lie in the order that the kernel reads them in: inference on a CPU.

At batch 1 a wide convolution over a short sequence is nothing but the reading of its weights, and PyTorch's
eager one first writes them into oneDNN's own order, at every call. Packed, that is done once: half the time
(benchmarks/policy_speed.py). Narrow ones PyTorch computes otherwise, and packed they are slower (LOG.md).
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torchfilm.sites import is_patched

Module = TypeVar("Module", bound=nn.Module)

_LEAST = 2**17  # numbers in a weight

_OPS: Any = torch.ops.mkldnn  # what the compiler packs with, where this build has oneDNN


class PackedConv1d(nn.Conv1d):
    """An `nn.Conv1d` with the same parameters and results that keeps a packed copy of its weight.

    The copy is used on a CPU in float32 where no gradient is asked for, made at the first such call and again
    when the weight has changed; what is written through `.data` is not seen. Everything else, compiling,
    exporting and weights made in inference mode too, takes the plain way.

    Args:
        conv: whose parameters it shares.
    """

    def __init__(self, conv: nn.Conv1d) -> None:
        sizes: Any = conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding
        more: Any = conv.dilation, conv.groups, conv.bias is not None, conv.padding_mode
        super().__init__(*sizes, *more, device="meta")
        self.weight, self.bias = conv.weight, conv.bias
        self.train(conv.training)
        self._packed: tuple[tuple[int, int], Tensor] | None = None

    def forward(self, input: Float[Tensor, "batch c t"]) -> Float[Tensor, "batch d t2"]:
        """Return the convolution."""
        if not self._can_be_packed(input):
            return super().forward(input)
        pad, stride, dilation = [0, int(self.padding[0])], [1, self.stride[0]], [1, self.dilation[0]]
        key = self.weight.data_ptr(), self.weight._version
        if self._packed is None or self._packed[0] != key:
            size = [len(input), self.in_channels, 1, input.shape[-1]]
            weight = self.weight.detach().unsqueeze(2).contiguous()
            order = _OPS._reorder_convolution_weight(weight, pad, stride, dilation, self.groups, size)
            self._packed = key, order
        x, weight = input.unsqueeze(2), self._packed[1]
        y = _OPS._convolution_pointwise(
            x, weight, self.bias, pad, stride, dilation, self.groups, "none", [], ""
        )
        return y.squeeze(2)

    def _can_be_packed(self, x: Tensor) -> bool:
        asked = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        return not (
            asked
            or torch.compiler.is_compiling()
            or x.ndim != 3
            or (x.device.type, x.dtype, self.weight.dtype) != ("cpu", torch.float32, torch.float32)
            or torch.is_autocast_enabled("cpu")
            or self.weight.is_inference()  # changes of those are not counted
            or isinstance(self.padding, str)
            or self.padding_mode != "zeros"
            or not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": None}  # oneDNN's order is this machine's


def pack_convolutions(module: Module, least: int = _LEAST) -> Module:
    """Replace each wide `nn.Conv1d` inside, in place, by one that is packed; keys of the state dict stay.

    Costs a second copy of their weights. Subclasses of `nn.Conv1d` are left as they are, and so is one with
    hooks, a forward of its own, or a weight that is made from others at each call.

    Args:
        module: what is inferred from; training it goes on as before.
        least: numbers in the weight from which a convolution is wide.

    Example:
        policy = load()
        pack_convolutions(policy.unet)
    """
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Conv1d and child.weight.numel() >= least and not _does_more(child):
                setattr(parent, name, PackedConv1d(child))
    return module


def _does_more(conv: nn.Conv1d) -> bool:
    """Whether a convolution runs code besides its own, which its packed form would not run."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(vars(conv)[name] for name in hooks) or is_patched(conv) or "weight" not in conv._parameters
