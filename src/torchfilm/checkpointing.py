"""Let activation checkpointing, which runs a block again in the backward pass, hear the condition again."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

from torch import nn

from torchfilm.applying import backward_pass
from torchfilm.filling import Conditioning, again_active
from torchfilm.injection import conditioning


def checkpoint_context(model: nn.Module) -> CheckpointContext:
    """Return the `context_fn` that gives the condition to reruns of activation checkpointing.

    Checkpointing reruns a block in the backward pass, when the call that had the condition is over. The
    context keeps the values of the sites from the first run: `checkpoint(block, x, use_reentrant=False,
    context_fn=checkpoint_context(model))`, or, with transformers, `model.gradient_checkpointing_enable(
    {"use_reentrant": False, "context_fn": checkpoint_context(model)})`. Without it a conditioned block
    raises, inside `using` too, unless the block is compiled by itself: then nothing detects it. Reentrant
    checkpointing cannot work, since it loses the gradient of the generator.

    Raises:
        ValueError: for a network that is not conditioned.

    Example:
        >>> from torchfilm.conditions import Vector
        >>> from torchfilm.injection import condition
        >>> model = condition(nn.Sequential(nn.Linear(3, 5)), "0", Vector(7))
        >>> context = checkpoint_context(model)
    """
    return CheckpointContext(conditioning(model))


class CheckpointContext:
    """Called by `torch.utils.checkpoint` at each first run of a block; is copied with the network."""

    def __init__(self, film: Conditioning) -> None:
        self.film = film

    def __call__(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Return the context of the first run, an empty one, and that of the second."""
        return nullcontext(), _Again(self.film)


class _Again(AbstractContextManager[None]):
    """Make active, and fill the slots with, what was there when this was made; may be entered again."""

    def __init__(self, film: Conditioning) -> None:
        self.film = film
        local = film.local
        self.active, self.values, self.fixed = local.active, local.values, local.fixed
        self.transforms, self.lent, self.folded = list(local.transforms), local.lent, film.folded
        self.entered: list[ExitStack] = []

    def __enter__(self) -> None:
        film, local = self.film, self.film.local
        if film.folded is not self.folded:
            raise ValueError(
                "checkpoint: expected the backward pass where the forward pass was, inside or outside of "
                "`folded`, whose weights are others.\nPut both into the block, or both outside."
            )
        with ExitStack() as stack:
            stack.enter_context(again_active(film, self.active))
            # On an accelerator backward passes run in a thread of autograd's own, in which nothing is fixed.
            stack.callback(vars(local).update, transforms=local.transforms, fixed=local.fixed)
            local.transforms, local.fixed = list(self.transforms), self.fixed
            film.fill(self.values)
            film.relend(self.lent and self.lent._replace(backward=backward_pass()), film.edits)
            self.entered.append(stack.pop_all())

    def __exit__(self, *error: Any) -> None:
        self.entered.pop().__exit__(*error)
