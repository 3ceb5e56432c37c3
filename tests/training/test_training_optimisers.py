from __future__ import annotations

import copy
from typing import Literal

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchfilm.training import TrainConfig
from torchfilm.training.optimisers import (
    WeightAverage,
    build_optimiser,
    optimiser_tensors,
    orthogonalised,
    restore_optimiser,
)


def small() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).double()


def backward(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    module.zero_grad()
    module(torch.randn(7, 3, dtype=torch.float64, generator=generator)).square().mean().backward()


def test_the_average_is_the_weighted_sum_of_all_weights() -> None:
    module = small()
    average = WeightAverage(module, decay=0.8)
    history = [copy.deepcopy(module.state_dict())]
    for _ in range(60):
        for p in module.parameters():
            p.data += torch.randn_like(p)
        module(torch.randn(4, 3, dtype=torch.float64))
        history.append(copy.deepcopy(module.state_dict()))
        average.update()
    decays = [min(0.8, (1 + t) / (10 + t)) for t in range(1, 61)]
    weights = [torch.tensor(decays, dtype=torch.float64).prod()]
    weights += [(1 - decays[t]) * torch.tensor([1.0, *decays[t + 1 :]]).double().prod() for t in range(60)]
    assert float(sum(weights)) == pytest.approx(1.0)
    for name in ("0.weight", "2.bias", "1.running_mean", "1.running_var"):
        expected = sum(w * state[name] for w, state in zip(weights, history, strict=True))
        torch.testing.assert_close(average.tensors[name], expected)
    assert average.tensors["1.num_batches_tracked"] == 60


def test_swapping_twice_changes_nothing_and_once_exchanges() -> None:
    module = small()
    average = WeightAverage(module, decay=0.5)
    for p in module.parameters():
        p.data += 1.0
    weights = {k: v.clone() for k, v in module.state_dict().items()}
    averages = {k: v.clone() for k, v in average.tensors.items()}
    average.swap()
    assert all(torch.equal(v, averages[k]) for k, v in module.state_dict().items())
    assert all(torch.equal(v, weights[k]) for k, v in average.tensors.items())
    average.swap()
    assert all(torch.equal(v, weights[k]) for k, v in module.state_dict().items())


def test_a_swap_for_which_memory_runs_out_changes_nothing() -> None:
    module = small()
    average = WeightAverage(module, decay=0.5)
    with torch.no_grad():
        for p in module.parameters():
            p += 1.0
    before = copy.deepcopy((module.state_dict(), average.tensors))

    class Full(TorchDispatchMode):
        """The second tensor that is made is too much."""

        made = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.made += func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.clone)
            if self.made == 2:
                raise torch.OutOfMemoryError
            return func(*args, **(kwargs or {}))

    with Full() as full:
        average.swap()
    assert full.made == 1
    average.swap()
    full.made = 1
    with full, pytest.raises(torch.OutOfMemoryError):
        average.swap()
    torch.testing.assert_close((module.state_dict(), average.tensors), before, rtol=0, atol=0)


def test_tied_weights_share_one_average() -> None:
    module = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    module["b"].weight = module["a"].weight
    average = WeightAverage(module, decay=0.5)
    before = module["a"].weight.detach().clone()
    with torch.no_grad():
        module["a"].weight += 1.0
    average.swap()
    assert torch.equal(module["b"].weight, before)
    assert torch.equal(average.tensors["b.weight"], before + 1.0)


def test_the_papers_adam_adds_the_decay_to_the_gradient() -> None:
    config = TrainConfig(
        steps=1, optimiser="adam_l2", lr=0.01, weight_decay=0.3, decay="all", betas=(0.9, 0.99), eps=1e-8
    )
    module = small()
    optimiser = build_optimiser(module, config)
    expected = [p.detach().clone() for p in module.parameters()]
    means = [torch.zeros_like(p) for p in expected]
    squares = [torch.zeros_like(p) for p in expected]
    for t in range(1, 4):
        backward(module, seed=t)
        for i, p in enumerate(module.parameters()):
            assert p.grad is not None
            g = p.grad + 0.3 * expected[i]
            means[i] = 0.9 * means[i] + 0.1 * g
            squares[i] = 0.99 * squares[i] + 0.01 * g * g
            step = (means[i] / (1 - 0.9**t)) / ((squares[i] / (1 - 0.99**t)).sqrt() + 1e-8)
            expected[i] = expected[i] - 0.01 * step
        optimiser.step()
    for p, e in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), e)


def test_adamw_shrinks_matrices_only() -> None:
    module = small()
    optimiser = build_optimiser(module, TrainConfig(steps=1, lr=0.1, weight_decay=0.5))
    before = [p.detach().clone() for p in module.parameters()]
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimiser.step()
    for p, old in zip(module.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old * (0.95 if p.ndim == 2 else 1.0))


def test_frozen_parameters_are_left_out_and_a_frozen_module_is_refused() -> None:
    module = small()
    module[0].requires_grad_(False)
    config = TrainConfig(steps=1)
    trained = [p for group in build_optimiser(module, config).param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in [*module[1].parameters(), *module[2].parameters()]}
    with pytest.raises(ValueError, match=r"expected trainable parameters, got a Sequential with none"):
        build_optimiser(module.requires_grad_(False), config)


class Listening(nn.Module):
    """Words, a kernel, a matrix and an answer."""

    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(7, 4)
        self.conv = nn.Conv2d(4, 6, 3)
        self.mix = nn.Linear(6, 11)
        self.answer = nn.Linear(11, 5)


def test_muon_is_torchs_for_matrices_and_kernels_and_adamw_for_the_rest() -> None:
    torch.manual_seed(5)
    config = TrainConfig(steps=1, optimiser="muon", outputs=("answer",), lr=0.02, weight_decay=0.3)
    module = Listening()
    twin = copy.deepcopy(module)
    flat = nn.Parameter(twin.conv.weight.detach().flatten(1).clone())
    theirs = torch.optim.Muon(
        [flat, twin.mix.weight], lr=0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"
    )
    decayed = [twin.word.weight, twin.answer.weight]
    rest = [twin.conv.bias, twin.mix.bias, twin.answer.bias]
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}], lr=0.02
    )
    ours = build_optimiser(module, config)
    for _ in range(3):
        for p, q in zip(module.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        assert twin.conv.weight.grad is not None
        flat.grad = twin.conv.weight.grad.flatten(1)
        for optimiser in (ours, theirs, adam):
            optimiser.step()
    torch.testing.assert_close(module.conv.weight, flat.view_as(module.conv.weight))
    for name in ("word.weight", "mix.weight", "answer.weight", "conv.bias", "mix.bias", "answer.bias"):
        torch.testing.assert_close(module.get_parameter(name), twin.get_parameter(name))
    with pytest.raises(ValueError, match="expected outputs among the modules of Listening, got last"):
        build_optimiser(module, TrainConfig(steps=1, optimiser="muon", outputs=("last",)))


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (9, 9)])
def test_an_orthogonalised_matrix_keeps_its_directions_and_loses_its_scales(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    matrix = torch.randn(shape)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalised(matrix)
    scales = (u.T @ found @ v.T).diagonal()
    assert float(scales.min()) > 0.5
    assert float(scales.max()) < 1.35
    torch.testing.assert_close((u * scales) @ v, found, atol=0.05, rtol=0)
    assert not orthogonalised(torch.zeros(shape)).any()


@pytest.mark.parametrize("optimiser", ["adamw", "adam_l2", "muon"])
def test_named_state_put_back_gives_the_same_next_step(
    optimiser: Literal["adamw", "adam_l2", "muon"],
) -> None:
    module, config = small(), TrainConfig(steps=1, optimiser=optimiser)
    first = build_optimiser(module, config)
    for t in range(3):
        backward(module, seed=t)
        first.step()
    twin = copy.deepcopy(module)
    other = build_optimiser(twin, config)
    restore_optimiser(twin, other, optimiser_tensors(module, first))
    for m, o in ((module, first), (twin, other)):
        backward(m, seed=9)
        o.step()
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), twin.parameters(), strict=True))


def test_state_that_does_not_fit_is_refused_and_nothing_is_changed() -> None:
    module, config = small(), TrainConfig(steps=1)
    optimiser = build_optimiser(module, config)
    backward(module, seed=0)
    optimiser.step()
    tensors = optimiser_tensors(module, optimiser)
    kept = {k: v.clone() for k, v in tensors.items()}
    with pytest.raises(ValueError, match=r"'9\.weight/exp_avg', the module trains no parameter '9\.weight'"):
        restore_optimiser(module, optimiser, {**tensors, "9.weight/exp_avg": torch.ones(2)})
    with pytest.raises(ValueError, match=r"shape \(5, 2\), parameter '0\.weight' has \(5, 3\)"):
        restore_optimiser(module, optimiser, {**tensors, "0.weight/exp_avg": torch.ones(5, 2)})
    assert all(torch.equal(v, kept[k]) for k, v in optimiser_tensors(module, optimiser).items())
