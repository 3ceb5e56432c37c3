"""The network as one graph: compiled without a break, and exported for any batch, with words in it."""

import pytest
import torch
from small_policy import CONFIG, observations, small

from torchfilm.blocks.unet1d import ConditionalUnet1d
from torchfilm.systems.diffusion_policy.reasoning import Vocabulary

TEXTS = ["push the red thing slowly", "blue", "the thing"]


def unet(batch):
    torch.manual_seed(1)
    net = ConditionalUnet1d(2, 5, widths=(8, 16), step_dim=6).eval()
    return net, (torch.randn(batch, 16, 2), torch.arange(batch), torch.randn(batch, 5))


def policy(batch, **changes):
    read = Vocabulary(CONFIG.vocabulary)(TEXTS[:batch])
    x = torch.randn(batch, 16, 2, generator=torch.Generator().manual_seed(2))
    heard = {"instruction": tuple(read)}
    if "vectors" not in changes:
        heard["force"] = torch.ones(batch, 3)
    return small(**changes), (x, torch.arange(batch) * 3, observations(batch), heard)


def policy_word_by_word(batch):
    return policy(batch, fusion="cross_attention", vectors=())


MADE = [unet, policy, policy_word_by_word]


@pytest.mark.parametrize("made", MADE)
def test_it_compiles_as_one_graph(made):
    net, inputs = made(3)
    torch.compiler.reset()
    with torch.no_grad():
        expected = net(*inputs)
        found = torch.compile(net, backend="eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("made", MADE)
def test_it_is_exported_for_any_batch(made):
    net, inputs = made(3)
    batch = torch.export.Dim("batch", min=1)
    dynamic = torch.utils._pytree.tree_map(lambda _: {0: batch}, inputs)
    with torch.no_grad():
        graph = torch.export.export(net, inputs, dynamic_shapes=dynamic).module()
        few = torch.utils._pytree.tree_map(lambda one: one[:2], inputs)
        for some in (inputs, few):
            torch.testing.assert_close(graph(*some), net(*some), rtol=1e-4, atol=1e-5)
