"""Conditions changed on purpose: another sample's, none, the same in other words.

A condition, an input or an output is a tensor or array with one row per sample, a list or array of strings,
or any structure of them: (tokens, mask), a dict. Such a part is called a column here; None and single numbers
in a structure belong to all samples and stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

Paraphrase = Callable[[Any], Any] | Mapping[str, str] | tuple[Any, Any]
Order = NDArray[np.int64]


def is_words(value: Any) -> bool:
    """Return whether this is a column of texts: a list, a tuple, or an array of NumPy's."""
    if isinstance(value, np.ndarray):
        value = value.tolist() if value.ndim == 1 and not np.issubdtype(value.dtype, np.number) else ()
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(one, str) for one in value)


def is_empty(value: Any) -> bool:
    """Return whether this has no rows: an empty batch, as a loader may give at its end.

    Example:
        >>> is_empty(torch.rand(0, 3)), is_empty({"say": []}), is_empty(["up"])
        (True, True, False)
    """
    found = columns(value)
    return not any(map(len, found)) if found else not pytree.tree_leaves(value)


def columns(value: Any) -> list[Any]:
    """Return the parts of a structure that have one row per sample, in the order of its leaves."""
    return [leaf for leaf in pytree.tree_leaves(value, is_leaf=is_words) if _is_column(leaf)]


def of_samples(condition: Any) -> Any:
    """Return the condition; of a dict, in which one has a single row for all samples, the others alone.

    Example:
        >>> of_samples({"time": torch.tensor([[7.0]]), "say": ["up", "down"]})
        {'say': ['up', 'down']}
    """
    if not isinstance(condition, Mapping):
        return condition
    rows = {name: {len(column) for column in columns(value)} for name, value in condition.items()}
    most = max(map(max, filter(None, rows.values())), default=0)
    if most < 2 or not any(found <= {1} for found in rows.values()):
        return condition
    return {name: value for name, value in condition.items() if not rows[name] <= {1}}


def take(value: Any, order: Order) -> Any:
    """Return the structure with its rows picked, in this order.

    Example:
        >>> take({"say": ["up", "down"], "to": torch.tensor([1, 2])}, np.array([1, 0]))
        {'say': ['down', 'up'], 'to': tensor([2, 1])}
    """

    def picked(column: Any) -> Any:
        if isinstance(column, Tensor):
            return column[torch.from_numpy(order).to(column.device)]
        return column[order] if isinstance(column, np.ndarray) else type(column)([column[i] for i in order])

    return _mapped(picked, value)


def keys(condition: Any) -> list[tuple[Any, ...]]:
    """Return what each row says: equal keys, equal conditions. What a boolean mask hides does not count.

    Raises:
        ValueError: for a condition without columns, or with columns of different lengths.

    Example:
        >>> first, second, third = keys(torch.tensor([3, 1, 3]))
        >>> first == third, first == second
        (True, False)
    """
    found = [_plain(column) for column in columns(condition)]
    counts = {len(column) for column in found}
    if len(counts) != 1:
        raise ValueError(
            f"condition: expected one row per sample in every part, got {sorted(counts) or 'no'} rows.\n"
            f"Give a tensor [B, ...], a list of B strings, or a structure of them."
        )
    arrays = [column for column in found if isinstance(column, np.ndarray)]
    for mask in [array for array in arrays if array.dtype == bool and array.ndim == 2]:
        found = [_hidden(column, mask) for column in found]
    return [
        tuple(row.tobytes() if isinstance(row, np.ndarray | np.generic) else row for row in rows)
        for rows in zip(*found, strict=True)
    ]


def others(keys: Sequence[Any], rng: np.random.Generator) -> Order:
    """Return for every sample another one whose condition is different, each of these with equal chance.

    Equal keys are equal conditions. Several samples may be given the same one. Where all conditions are
    equal, every sample stays in its place.

    Example:
        >>> others(["a", "b"], np.random.default_rng(0)).tolist()
        [1, 0]
    """
    numbers: dict[Any, int] = {}
    group = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
    if len(numbers) < 2:
        return np.arange(len(keys))
    size = np.bincount(group)
    own, before = size[group], (np.cumsum(size) - size)[group]
    drawn = rng.integers(len(keys) - own)  # among all that are in front of the own group or behind it
    return np.argsort(group, kind="stable")[drawn + np.where(drawn < before, 0, own)]


def blanked(condition: Any) -> Any | None:
    """Return the condition with zeros for numbers and "" for words; None where zero would be a class.

    Example:
        >>> blanked(["up", "down"])
        ['', '']
    """
    tensors = [torch.as_tensor(column) for column in columns(condition) if not is_words(column)]
    if any(not (one.is_floating_point() or one.is_complex() or one.dtype == torch.bool) for one in tensors):
        return None

    def empty(column: Any) -> Any:
        if is_words(column):
            return _with_words(column, [""] * len(column))
        return column if torch.as_tensor(column).dtype == torch.bool else column * 0

    return _mapped(empty, condition)


def reworded(
    condition: Any, paraphrase: Mapping[str, str] | tuple[Any, Any]
) -> tuple[Any, NDArray[np.bool_]]:
    """Return the condition in other words, and for which rows there are any (the other rows are arbitrary).

    Args:
        condition: the right one.
        paraphrase: texts and their paraphrases, whatever structure the texts are in; or two conditions, row i
            of the second saying what row i of the first says.

    Raises:
        ValueError: for two conditions with different numbers of rows.

    Example:
        >>> other, known = reworded(["go", "stop"], {"stop": "halt"})
        >>> other[1], known.tolist()
        ('halt', [False, True])
    """
    if isinstance(paraphrase, Mapping):
        said = [column for column in columns(condition) if is_words(column)]
        known = [np.array([str(text) in paraphrase for text in column]) for column in said]
        other = _mapped(lambda column: _translated(column, paraphrase), condition)
        return other, np.any(known, axis=0) if known else np.zeros(len(keys(condition)), dtype=bool)
    said, other = map(of_samples, paraphrase)
    first, second = keys(said), keys(other)
    if len(first) != len(second):
        raise ValueError(
            f"paraphrase: expected as many rows as conditions, got {len(second)} for {len(first)}.\n"
            f"Row i of the second says what row i of the first says."
        )
    places = {key: row for row, key in enumerate(first)}
    wanted = keys(condition)
    order = np.array([places.get(key, 0) for key in wanted], dtype=np.int64)
    return take(other, order), np.array([key in places for key in wanted])


def _is_column(value: Any) -> bool:
    return is_words(value) or (isinstance(value, Tensor | np.ndarray) and value.ndim > 0)


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    return pytree.tree_map(lambda one: function(one) if _is_column(one) else one, value, is_leaf=is_words)


def _translated(column: Any, texts: Mapping[str, str]) -> Any:
    return _with_words(column, [texts.get(str(one), one) for one in column]) if is_words(column) else column


def _with_words(column: Any, words: list[str]) -> Any:
    """Return these words as a column of the same kind."""
    if isinstance(column, np.ndarray):
        return np.array(words, dtype=object if column.dtype == object else None)
    return type(column)(words)


def _plain(column: Any) -> Any:
    if is_words(column):
        return list(map(str, column))
    if isinstance(column, Tensor):
        wide = column.detach().cpu()
        column = (wide.float() if wide.dtype == torch.bfloat16 else wide).numpy()
    return column + 0.0 if column.dtype.kind in "fc" else column  # -0.0 is 0.0


def _hidden(column: Any, mask: NDArray[np.bool_]) -> Any:
    """Return the column with zeros where the mask of its rows and positions is False."""
    if not isinstance(column, np.ndarray) or column.dtype == bool or column.shape[:2] != mask.shape:
        return column
    wide = mask.reshape(mask.shape + (1,) * (column.ndim - 2))
    return np.where(wide, column, np.zeros((), column.dtype))
