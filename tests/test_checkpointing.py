"""A block that runs again in the backward pass hears what it heard at first."""

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import torchfilm as tf
from catalogue import randomise
from networks import SITES, Net, conditioned, inputs


class Checkpointed(Net):
    """A network that recomputes each block in the backward pass, with the keywords that it was given."""

    options: dict

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, **self.options) if self.options else block(x)
        return self.head(x.mean(dim=(2, 3)))


def checkpointed() -> Checkpointed:
    model = Checkpointed()
    model.options = {}
    tf.condition(model, SITES, tf.Vector(13))
    randomise(model.film)
    return model.eval()


def gradients(model: nn.Module, calls: int) -> list[torch.Tensor]:
    """Return the gradients of some forwards with different conditions before one backward."""
    torch.manual_seed(1)
    model.zero_grad()
    sum(model(x, cond=z).square().sum() for x, z in [inputs() for _ in range(calls)]).backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("calls", [1, 2])
def test_checkpointed_blocks_have_the_gradients_of_plain_ones(calls: int):
    model = checkpointed()
    expected = gradients(model, calls)
    model.options = {"use_reentrant": False, "context_fn": tf.checkpoint_context(model)}
    for one, other in zip(gradients(model, calls), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_whole_network_that_is_checkpointed_hears_again_what_was_active():
    model, given = conditioned(), [inputs() for _ in range(2)]
    context = tf.checkpoint_context(model)

    def gradients_of(call) -> list[torch.Tensor]:
        model.zero_grad()
        losses = []
        for x, z in given:
            with tf.using(model, cond=z), tf.edit(model, {".*": lambda m, z=z: m * float(z.sum())}):
                losses.append(call(x).square().sum())
                if len(losses) == 2:
                    sum(losses).backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients_of(model)
    found = gradients_of(lambda x: checkpoint(model, x, use_reentrant=False, context_fn=context))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match="expected an active condition"):
        model(given[0][0])


def test_a_recording_that_is_over_hears_no_second_run():
    model, (x, z) = conditioned(), inputs()
    context = tf.checkpoint_context(model)
    with tf.record(model) as rec:
        y = checkpoint(lambda x: model(x, cond=z), x, use_reentrant=False, context_fn=context)
    y.sum().backward()
    assert len(rec.calls) == 1


def test_a_checkpointed_network_goes_backwards_where_it_went_forwards():
    model, (x, z) = checkpointed(), inputs()
    model.stem.requires_grad_()

    def gradient() -> torch.Tensor:
        model.zero_grad()
        with tf.folded(model, cond=z[:1]):
            model(x).square().sum().backward()
        return model.stem.weight.grad.clone()

    expected = gradient()
    model.options = {"use_reentrant": False, "context_fn": tf.checkpoint_context(model)}
    torch.testing.assert_close(gradient(), expected)
    with tf.folded(model, cond=z[:1]):
        y = model(x)
    for block in (nullcontext(), tf.folded(model, cond=z[1:])):
        with (
            block,
            pytest.raises(ValueError, match=r"backward pass where the forward pass was(.|\n)*both outside"),
        ):
            y.sum().backward(retain_graph=True)


def test_a_backward_pass_may_recompute_twice():
    model, (x, z) = checkpointed(), inputs()
    model.options = {"use_reentrant": False, "context_fn": tf.checkpoint_context(model)}
    loss = model(x, cond=z).square().sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.film.parameters()]
    loss.backward()
    for p, one in zip(model.film.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * one)


@pytest.mark.parametrize(
    "block",
    [
        lambda model, z: tf.using(model, cond=z),
        lambda model, z: tf.folded(model, cond=z[:1], leftover="constant"),
        lambda model, z: tf.unconditioned(model),
    ],
    ids=["using", "folded", "unconditioned"],
)
def test_a_backward_pass_in_another_thread_hears_what_the_forward_pass_did(block):
    """As on an accelerator, where backward passes run in a thread of autograd's own."""
    model, (x, z) = checkpointed(), inputs()
    x.requires_grad_()
    with block(model, z):
        (expected := model(x).square().sum()).backward()
        wanted, x.grad = x.grad, None
        model.options = {"use_reentrant": False, "context_fn": tf.checkpoint_context(model)}
        loss = model(x).square().sum()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(loss.backward).result()
            assert pool.submit(lambda: model.film.local.fixed).result() is None
    assert torch.equal(loss, expected)
    torch.testing.assert_close(x.grad, wanted)


@pytest.mark.plain
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_without_the_context_is_an_error(reentrant: bool):
    model, (x, z) = checkpointed(), inputs()
    model.options = {"use_reentrant": reentrant}
    loss = model(x.requires_grad_(), cond=z).sum()
    with pytest.raises(ValueError, match=r"use_reentrant=False and context_fn=checkpoint_context"):
        loss.backward()


@pytest.mark.plain
@pytest.mark.parametrize("own", [False, True])
def test_a_backward_pass_inside_of_the_block_is_no_way_around_the_context(own: bool):
    model, (x, z) = checkpointed(), inputs()
    cond = {"cond": 2 * z} if own else {}

    def gradients_of() -> list[torch.Tensor]:
        model.zero_grad()
        with tf.using(model, cond=z):
            model(x, **cond).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients_of()
    model.options = {"use_reentrant": False}
    with pytest.raises(
        ValueError, match=r"'blocks.1.bn': expected an active (.|\n)*context_fn=checkpoint_cont"
    ):
        gradients_of()
    model.options["context_fn"] = tf.checkpoint_context(model)
    for one, other in zip(gradients_of(), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_part_that_is_checkpointed_hears_again_what_was_lent_to_it():
    model, (x, z) = conditioned(), inputs()
    context = tf.checkpoint_context(model)

    def gradients_of(part) -> list[torch.Tensor]:
        model.zero_grad()
        with tf.using(model, cond=z):
            y = part(model.stem(x))
        with tf.using(model, cond=-z):
            y.square().sum().backward()
            assert torch.equal(part(model.stem(x)), model.blocks[0](model.stem(x)))
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients_of(model.blocks[0])
    part = lambda x: checkpoint(model.blocks[0], x, use_reentrant=False, context_fn=context)  # noqa: E731
    for one, other in zip(gradients_of(part), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.plain
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("regional", [False, True])
def test_compiled_checkpointed_networks_have_the_same_gradients(regional: bool):
    torch._dynamo.reset()
    model = checkpointed()
    expected = gradients(model, 1)
    model.options = {"use_reentrant": False}
    if regional:
        model.options["context_fn"] = tf.checkpoint_context(model)
        for block in model.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
    else:
        model.compile(fullgraph=True, backend="aot_eager")
    for one, other in zip(gradients(model, 1), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_copy_of_a_checkpointed_network_recomputes_with_its_own_conditions():
    model = checkpointed()
    expected = gradients(model, 1)
    model.options = {"use_reentrant": False, "context_fn": tf.checkpoint_context(model)}
    for one, other in zip(gradients(copy.deepcopy(model), 1), expected, strict=True):
        torch.testing.assert_close(one, other)
