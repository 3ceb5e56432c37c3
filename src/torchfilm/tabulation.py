"""For a condition that takes few values, known in advance: look modulations up, do not generate them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchfilm.filling import Conditioning
from torchfilm.injection import Network, conditioning
from torchfilm.lookup import Row, Table
from torchfilm.modulation import Modulation
from torchfilm.restoring import fresh


def tabulate(model: Network, conds: Any) -> Network:
    """Make the modulations for K conditions once, and drop what made them; afterwards `model(x, cond=index)`.

    For a fixed set of tasks, classes or styles, or for the time steps of a sampler's schedule, in the order
    in which they come: `tabulate(model, conds=scheduler.timesteps[:, None])`, then `cond=k` at step k. The
    encoder of the condition and the generator, often more parameters than the network, are replaced by a
    table of K rows. Nothing else changes: recording, editing and folding work as before.

    Args:
        model: a conditioned network; changed in place, and for good (copy it first to keep the generator).
        conds: K conditions as one batch, as the network takes them; or a list of single ones, of which each
            may have another size (sentences).

    Returns:
        The model itself. It takes an index from 0 to K - 1: an int for all samples, or int64 [B], one for
        each.

    Raises:
        ValueError: for a fusion whose values are more than a modulation, for values that are not one per
            condition, for no conditions, and for NaN or infinity; the model is then as it was.

    Example:
        >>> from torch import nn
        >>> from torchfilm.conditions import Vector
        >>> from torchfilm.injection import condition
        >>> model = condition(nn.Sequential(nn.Linear(3, 5)), "0", Vector(7))
        >>> model = tabulate(model, conds=torch.rand(11, 7))
        >>> y = model(torch.rand(2, 3), cond=torch.tensor([10, 0]))
    """
    film = conditioning(model)
    with torch.inference_mode(mode=False):  # training and loading refuse tensors of that mode
        table, layout = _packed(film, conds)
    _check_finite(table)
    made = {"cond": Row(len(table)), "generator": Table(table, layout)}
    film._modules.update({name: one.train(film.training) for name, one in made.items()})  # both or neither
    return model


def _packed(film: Conditioning, conds: Any) -> tuple[Tensor, dict[str, tuple[int, int]]]:
    """Return the modulations of all sites side by side, one row per condition, and how they lie."""
    single = isinstance(conds, list)
    if single:
        _check_some(conds)
    with torch.no_grad():
        each = [film.modulations(fresh(cond)) for cond in (conds if single else [conds])]
    columns: list[Tensor] = []
    layout: dict[str, tuple[int, int]] = {}
    for name, site in film.sites.items():
        given = [values[name] for values in each]
        if not all(isinstance(one, Modulation) for one in given):
            raise ValueError(
                f"tabulate, site '{name}': expected a Modulation for each condition, got "
                f"{type(given[0]).__name__}.\n"
                f"Fusions whose values hold weights of their own ({type(film.fusion).__name__}) need their "
                f"generator; with one condition, fold(model, cond=z) drops it."
            )
        fields = [one.present() for one in given]
        for field in zip(*fields, strict=True):
            columns.append(torch.stack([_row(f, name, site.features) for f in field]) if single else field[0])
        layout[name] = (site.features, len(fields[0]))
    sizes = {tuple(column.shape[:-1]) for column in columns}
    if len(sizes) != 1 or columns[0].ndim != 2:
        raise ValueError(
            f"tabulate: expected K conditions in a batch, one modulation each, got modulations of shapes "
            f"{sorted({tuple(column.shape) for column in columns})}.\n"
            f"Give conditions [K, ...], or a list of single ones."
        )
    _check_some(columns[0])
    return torch.cat(columns, dim=-1), layout


def _check_some(rows: Sequence[Any] | Tensor) -> None:
    if not len(rows):
        raise ValueError(
            "tabulate: expected at least one condition, got none.\n"
            "The table takes the place of the generator for good: give all conditions that will be asked for."
        )


def _check_finite(table: Tensor) -> None:
    if table.is_meta:  # its numbers are still to come
        return
    if wrong := (~table.isfinite()).any(dim=-1).nonzero().flatten().tolist():
        raise ValueError(
            f"tabulate: expected finite modulations, got NaN or infinity for {len(wrong)} of {len(table)} "
            f"conditions, the first of them number {wrong[0]}.\n"
            f"The table takes the place of the generator for good: give conditions without them."
        )


def _row(field: Tensor, name: str, channels: int) -> Tensor:
    if field.numel() != channels:
        raise ValueError(
            f"tabulate, site '{name}': expected single conditions in the list, got a modulation of shape "
            f"{tuple(field.shape)} for {channels} channels.\nGive one condition in each entry."
        )
    return field.reshape(channels)
