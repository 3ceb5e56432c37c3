"""Where a NaN or an infinity comes from: the batch, a parameter, a layer, the loss, a gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class NonFiniteError(RuntimeError):
    """Training stopped at a NaN or an infinity; `step` (from 0) and `where` say when and in which layer."""

    def __init__(self, message: str, *, step: int, where: str) -> None:
        super().__init__(message)
        self.step = step
        self.where = where


Finding = tuple[int, str]
"""The order of appearance in a step, and what is not finite."""


def find_at_rest(module: nn.Module, batch: Any) -> Finding | None:
    """The first non-finite value that is there before the step: in a parameter, or in the batch."""
    for name, p in module.named_parameters():
        if not _finite(p):
            return 0, f"parameter {name!r} itself"
    for name, value in _tensors(batch, "batch"):
        if not _finite(value):
            return 1, f"the batch, in {name}"
    return None


def find_in_step(module: nn.Module, again: Callable[[], bool]) -> Finding:
    """The first non-finite value of a step that `again` computes again, forward and backward.

    `again` says whether the loss was finite, and goes backward only then. Watched are the outputs of the
    modules as they are called, then the gradients as they arrive at outputs and parameters.
    """
    findings: list[Finding] = []
    with _watched(module, findings), _eager(module):
        finite = again()
    if findings:
        return findings[0]
    if not finite:
        return 200_000, "the loss function: every module's output is finite"
    return 300_000, "nowhere when the step was computed again: not reproducible"


@contextmanager
def _watched(module: nn.Module, findings: list[Finding]) -> Iterator[None]:
    def watch_output(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
            label = f"{f'layer {name!r}' if name else 'the module'} ({type(layer).__name__})"
            for _, value in _tensors(output, ""):
                if not _finite(value):
                    findings.append((10 + len(findings), f"the output of {label}"))
                elif value.requires_grad:
                    value.register_hook(watch_gradient(f"the gradient that arrives at the output of {label}"))

        return hook

    def watch_gradient(what: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            if not _finite(gradient):
                findings.append((100_000 + len(findings), what))

        return hook

    handles = [layer.register_forward_hook(watch_output(name)) for name, layer in module.named_modules()]
    for name, p in module.named_parameters():
        if p.requires_grad:
            handles.append(p.register_hook(watch_gradient(f"the gradient of parameter {name!r}")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _eager(module: nn.Module) -> Iterator[None]:
    compiled = module._compiled_call_impl
    module._compiled_call_impl = None
    try:
        yield
    finally:
        module._compiled_call_impl = compiled


def _finite(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex()) or bool(torch.isfinite(value).all())


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{name}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{name}[{index}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for entry in dataclasses.fields(value):
            yield from _tensors(getattr(value, entry.name), f"{name}.{entry.name}")
