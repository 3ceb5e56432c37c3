"""Which operations a comparison counts: those that torch's counter leaves out, or computes in one, too."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from torchfilm.blocks.packing import PackedConv1d
from torchfilm.comparison import compare
from torchfilm.conditions import Vector
from torchfilm.injection import condition

COND = 7


class Self(nn.Module):
    """Attention of a sequence to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, need_weights=False)[0]


class Last(nn.LSTM):
    """States alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


ATTENTION = 4 * 8 * 8 + 2 * 7 * 8  # projections, scores and sums of one token among seven


@pytest.mark.parametrize(
    ("layer", "products"),
    [
        (Self(), ATTENTION),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), ATTENTION + 2 * 8 * 16),
        (Last(8, 8, batch_first=True), 2 * 8 * 32),
        (PackedConv1d(nn.Conv1d(7, 7, 3, padding=1)), 7 * 3 * 8),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layers_that_torch_computes_in_one_operation_are_counted(layer: nn.Module, products: int):
    backends = torch.backends
    before = backends.mha.get_fastpath_enabled(), backends.mkldnn.enabled, backends.cudnn.enabled
    model = condition(nn.Sequential(layer, nn.Linear(8, 3)), "1", Vector(COND))
    found = compare({"film": model}, (torch.randn(2, 7, 8), torch.randn(2, COND)), rounds=1)
    assert found["unconditioned"].flops == 2 * 2 * 7 * (products + 8 * 3)
    assert found["film"].flops == found["unconditioned"].flops + 2 * 2 * COND * 6
    now = backends.mha.get_fastpath_enabled(), backends.mkldnn.enabled, backends.cudnn.enabled
    assert now == before


def test_recurrences_of_cudnn_are_counted_product_by_product():
    seen = []

    class Seen(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.backends.cudnn.enabled)
            return super().forward(x)

    model = condition(nn.Sequential(Seen(8, 3)), "0", Vector(COND))
    compare({"film": model}, (torch.randn(2, 8), torch.randn(2, COND)), rounds=1)
    assert False in seen
    assert torch.backends.cudnn.enabled


class Asked(nn.Module):
    """A function of the features, with a weight of its own."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.rand(11, 5))

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.function(x, self.weight)


LEFT_OUT = {
    "bilinear": (nn.Bilinear(5, 5, 13), 3 * 13 * 5 * 5),
    "mv": (lambda x, w: w @ x[0], 11 * 5),
    "addmv": (lambda x, w: torch.addmv(w[:, 0], w, x[0]), 11 * 5),
    "dot": (lambda x, w: torch.dot(w[0], x[0]), 5),
    "vdot": (lambda x, w: torch.vdot(w[0], x[0]), 5),
    "addbmm": (lambda x, w: torch.addbmm(x[:, :1] @ w[:, 0][None], x[None], w.T[None]), 3 * 11 + 3 * 5 * 11),
    "distances of few": (lambda x, w: torch.cdist(x, w), 3 * 11 * 5),
    "distances of many": (lambda x, w: torch.cdist(x, w.repeat(7, 1)), 3 * 77 * 5),
}


@pytest.mark.parametrize(("function", "products"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_products_that_torch_s_counter_leaves_out_are_counted(function: Callable, products: int):
    layer = Asked((lambda x, w: function(x, x)) if isinstance(function, nn.Module) else function)
    assert compare({"one": layer}, (torch.rand(3, 5), None), rounds=1)["one"].flops == 2 * products
