from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_sequence

from torchfilm.training import Draw, EpochOrder
from torchfilm.training.batches import GlobalRandomState, seed_everything, to_device


def draw(step: int, *, seed: int = 3, batch_size: int = 5, rank: int = 0, world_size: int = 1) -> Draw:
    return Draw(step, seed, 0.0, batch_size, rank, world_size)


def test_an_order_keeps_two_epochs_of_its_own_however_many_orders_there_are() -> None:
    orders = [EpochOrder(5 + i) for i in range(6)]
    for step in range(9):
        for order in orders:
            order.indices(Draw(step, 0, 0.0, 3))
    before = [dict(order._cached) for order in orders]
    for order in orders:
        order.indices(Draw(8, 0, 0.0, 3))
    assert all(len(kept) == 2 for kept in before)
    assert all(
        order._cached[key] is kept[key] for order, kept in zip(orders, before, strict=True) for key in kept
    )


@given(items=st.integers(0, 60), world_size=st.integers(1, 9))
def test_the_shares_are_a_partition_in_order(items: int, world_size: int) -> None:
    shares = [
        list(range(items))[draw(0, rank=r, world_size=world_size).share(items)] for r in range(world_size)
    ]
    assert [i for share in shares for i in share] == list(range(items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_every_item_comes_once_per_epoch_in_a_new_order() -> None:
    order = EpochOrder(7)
    seen = np.concatenate([order.indices(draw(step)) for step in range(21)])  # 105 = 15 epochs of 7
    epochs = seen.reshape(15, 7)
    assert all(Counter(epoch.tolist()) == Counter(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 10


def test_the_order_is_a_function_of_seed_and_step_alone() -> None:
    forward, backward = EpochOrder(7), EpochOrder(7)
    first = {step: forward.indices(draw(step)).tolist() for step in range(30)}
    second = {step: backward.indices(draw(step)).tolist() for step in reversed(range(30))}
    assert first == second
    assert first != {step: forward.indices(draw(step, seed=4)).tolist() for step in range(30)}


def test_ranks_take_together_what_one_process_takes() -> None:
    order = EpochOrder(11)
    for step in range(9):
        parts = [order.indices(draw(step, rank=r, world_size=3)) for r in range(3)]
        assert np.concatenate(parts).tolist() == order.indices(draw(step)).tolist()


def test_a_draw_has_random_numbers_of_its_own_equal_on_all_ranks() -> None:
    one, other = draw(2, rank=0, world_size=3).rng(), draw(2, rank=1, world_size=3).rng()
    assert one.integers(1 << 60, size=5).tolist() == other.integers(1 << 60, size=5).tolist()
    assert draw(2).rng().integers(1 << 60) != draw(3).rng().integers(1 << 60)


def test_no_items_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"EpochOrder: expected at least one item, got 0\. Is the data empty\?"
    ):
        EpochOrder(0)


def sample() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


def test_random_state_is_a_function_of_seed_step_and_rank() -> None:
    with GlobalRandomState():
        found = {}
        for key in [(1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3)]:
            seed_everything(*key)
            found[key] = sample()
        seed_everything(1, 2, 3)
        assert sample() == found[1, 2, 3]
        assert len({value for triple in found.values() for value in triple}) == 12


def test_the_callers_random_state_is_put_back() -> None:
    with GlobalRandomState():
        seed_everything(5, 0, 0)
        expected = sample()
        seed_everything(5, 0, 0)
        with GlobalRandomState():
            seed_everything(6, 0, 0)
        assert sample() == expected


@dataclass(frozen=True)
class Pair:
    x: torch.Tensor
    names: tuple[str, ...]


class Named(NamedTuple):
    pair: Pair
    rest: dict[str, list[torch.Tensor]]


@dataclass(frozen=True)
class Words:
    words: torch.Tensor
    lengths: torch.Tensor

    on_cpu = ("lengths",)


@dataclass
class Where:
    x: torch.Tensor
    on_cpu: bool


class Told(NamedTuple):
    words: torch.Tensor
    lengths: torch.Tensor

    on_cpu = ("lengths",)


def test_every_tensor_of_a_nested_batch_is_moved() -> None:
    batch = Named(Pair(torch.ones(2), ("a", "b")), {"k": [torch.zeros(3, dtype=torch.long)]})
    moved = to_device(batch, torch.device("meta"))
    assert moved.pair.x.is_meta
    assert moved.rest["k"][0].is_meta
    assert moved.rest["k"][0].shape == (3,)
    assert moved.pair.names == ("a", "b")
    assert type(moved) is Named


@pytest.mark.parametrize("kind", [Words, Told])
def test_what_is_read_on_the_cpu_stays_there(kind: type[Words] | type[Told]) -> None:
    batch = kind(torch.ones(2, 3), torch.tensor([3, 1]))
    moved = to_device({"told": batch}, torch.device("meta"))["told"]
    assert type(moved) is kind
    assert moved.words.is_meta
    assert moved.lengths is batch.lengths


def test_a_field_that_is_called_on_cpu_is_a_field() -> None:
    moved = to_device(Where(torch.ones(2), on_cpu=True), torch.device("meta"))
    assert moved.x.is_meta
    assert moved.on_cpu


def test_the_sizes_of_a_packed_sequence_stay_on_the_cpu() -> None:
    moved = to_device(pack_sequence([torch.ones(3, 2), torch.ones(1, 2)]), torch.device("meta"))
    assert moved.data.is_meta
    assert moved.batch_sizes.tolist() == [2, 1, 1]


@pytest.mark.parametrize(("kind", "pinned"), [("cuda", 1), ("cpu", 0), ("meta", 0)])
def test_what_goes_to_cuda_is_pinned(monkeypatch: pytest.MonkeyPatch, kind: str, pinned: int) -> None:
    copies: list[torch.Tensor] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        copies.append(tensor.clone())
        return copies[-1]

    def to(tensor: torch.Tensor, device: torch.device, *, non_blocking: bool) -> torch.Tensor:
        assert device.type == kind
        assert non_blocking
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    batch = torch.ones(2)
    moved = to_device(batch, torch.device(kind))
    assert len(copies) == pinned
    assert moved is (copies[0] if pinned else batch)
