"""What a measurement leaves behind: nothing, also where it fails."""

import pytest
import torch
from torch import Tensor, nn

from torchfilm.restoring import in_mode, product_by_product, same_chance, unchanged, undisturbed


class Counting(nn.Module):
    """A layer that registers a buffer when it first runs, and counts its calls in it."""

    def forward(self, x: Tensor) -> Tensor:
        if "calls" not in self._buffers:
            self.register_buffer("calls", torch.zeros(()))
        self.calls += 1
        return x


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_gets_its_own_mode_back(fails: bool):
    models = nn.Sequential(nn.Dropout(), nn.Linear(2, 3)), nn.Sequential(nn.Dropout())
    models[0][1].eval()
    modes = [module.training for model in models for module in model.modules()]
    with pytest.raises(KeyError) if fails else torch.no_grad(), in_mode(*models, training=False):
        assert not any(module.training for model in models for module in model.modules())
        if fails:
            raise KeyError
    assert [module.training for model in models for module in model.modules()] == modes


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("later", [False, True])
def test_blocks_of_threads_that_overlap_give_the_modes_back_at_the_last_end(training: bool, later: bool):
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Dropout())).train(training)
    model[0].train(not training)
    before = [module.training for module in model.modules()]
    first, second = in_mode(model, training=False), in_mode(model[1], training=later)
    for block in (first, second):
        block.__enter__()
    first.__exit__(None, None, None)
    assert [model.training, model[0].training] == [training, not training]
    assert [module.training for module in model[1].modules()] == [later] * 3
    second.__exit__(None, None, None)
    assert [module.training for module in model.modules()] == before


def test_a_mode_that_cannot_be_set_leaves_the_modes_before():
    class Stubborn(nn.Dropout):
        def train(self, mode: bool = True) -> nn.Module:
            raise KeyError

    model = nn.Sequential(nn.Dropout(), Stubborn())
    for module in model.modules():
        module.training = False
    with pytest.raises(KeyError), in_mode(model, training=True):
        pass
    assert not any(module.training for module in model.modules())


class Merging(nn.Linear):
    """A layer whose `train` writes into its weights, as LoRA's does."""

    merged = False

    def train(self, mode: bool = True) -> nn.Module:
        if self.merged is mode:
            self.merged = not mode
            with torch.no_grad():
                self.weight += 1 if self.merged else -1
        return super().train(mode)


@pytest.mark.parametrize("training", [False, True])
def test_what_a_layer_writes_where_its_mode_is_set_is_undone_in_time(training: bool):
    model = nn.Sequential(Merging(2, 3))
    with torch.no_grad():
        model[0].weight.zero_()
    model.train(training)
    with in_mode(model, training=False), in_mode(model, training=True):
        assert not model[0].merged
    assert model.training is training
    model.train()
    assert not model[0].merged
    assert not model[0].weight.any()


class Following(nn.Dropout):
    """A layer that keeps its mode in an attribute of its own."""

    on = True

    def train(self, mode: bool = True) -> nn.Module:
        self.on = mode
        return super().train(mode)


@pytest.mark.parametrize("training", [False, True])
def test_a_layer_with_a_mode_of_its_own_has_it_back(training: bool):
    model = nn.Sequential(Following()).train(training)
    with in_mode(model, training=False), in_mode(model, training=True):
        assert model[0].on
    assert model[0].on is training


@pytest.mark.parametrize(
    "buffer", [torch.eye(3).to_sparse(), torch.eye(3, device="meta")], ids=["sparse", "meta"]
)
def test_buffers_of_any_layout_are_left_alone(buffer: Tensor):
    model = nn.Module()
    model.register_buffer("graph", buffer)
    with unchanged(model):
        pass
    assert model.graph is buffer


@pytest.mark.parametrize("number", [1.0, float("nan"), float("inf")])
def test_buffers_of_expanded_memory_are_left_alone(number: float):
    model, expected = nn.Module(), torch.full((2, 3), number)
    model.register_buffer("positions", expected[:1].expand(2, 3))
    with unchanged(model):
        pass
    torch.testing.assert_close(model.positions, expected, equal_nan=True)


def test_random_numbers_go_on_as_if_nothing_had_been_drawn():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with same_chance():
        torch.rand(5)
    assert torch.equal(torch.rand(3), expected)


def test_buffers_are_those_of_before_with_the_numbers_of_before():
    model = nn.Sequential(nn.BatchNorm1d(3), Counting())
    buffers = dict(model.named_buffers())
    numbers = {name: buffer.clone() for name, buffer in buffers.items()}
    versions = [buffer._version for buffer in buffers.values()]
    with unchanged(model):
        model(torch.randn(5, 3))
        written = [buffer._version for buffer in buffers.values()]
        model[0].running_mean = torch.ones(3)
    after = dict(model.named_buffers())
    assert list(after) == list(buffers)
    assert all(after[name] is buffers[name] for name in buffers)
    assert all(torch.equal(after[name], numbers[name]) for name in buffers)
    assert [buffer._version for buffer in buffers.values()] == written != versions


def test_switches_are_given_back_with_the_last_block_that_closed_them_in_whichever_order():
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    first, second = product_by_product(), product_by_product()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.backends.mkldnn.enabled
    second.__exit__(None, None, None)
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled) == before


def test_compiled_networks_run_eagerly_until_the_last_block_is_over():
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        compiled.append(graph)
        return graph

    torch._dynamo.reset()
    model = torch.compile(nn.Linear(3, 5), backend=backend)
    with undisturbed(model):
        with undisturbed(model):
            pass
        model(torch.randn(2, 3))
        assert not compiled
    model(torch.randn(2, 3))
    assert len(compiled) == 1


@pytest.mark.plain
def test_a_block_within_a_compiled_function_is_part_of_its_one_graph():
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Dropout(0.9)).train(), torch.randn(2, 3)

    @torch.compile(backend="eager", fullgraph=True)
    def predict(x: Tensor) -> Tensor:
        with in_mode(model, training=False):
            return model(x)

    assert torch.equal(predict(x), x)
    with in_mode(nn.Dropout(), training=False):
        assert torch.equal(predict(x), x)
    assert model[0].training


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_batch_norm_in_torchscript_is_left_as_it_was_too():
    model = torch.jit.script(nn.BatchNorm1d(3))
    with unchanged(model):
        model(torch.randn(5, 3))
    assert int(model.num_batches_tracked) == 0
    assert not model.running_mean.any()
