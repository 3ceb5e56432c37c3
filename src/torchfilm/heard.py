"""Is the condition heard? What happens to output, loss and success when conditions are exchanged.

A network that ignores its condition trains without a complaint: the loss falls, and only an exchange shows
that the instruction had no part in it. `heard` asks the counterfactual question of anything that is called as
`model(x, cond=...)`, conditioned by this library or not: a network, or a function that runs a whole episode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from torchfilm.counterfactual import (
    Paraphrase,
    blanked,
    is_empty,
    keys,
    of_samples,
    others,
    reworded,
    take,
)
from torchfilm.heard_report import Effect, Hearing
from torchfilm.heard_tally import RIGHT, Score, Tally
from torchfilm.injection import film_of
from torchfilm.intervals import FEWEST_RESAMPLES
from torchfilm.restoring import fresh, in_mode, same_chance
from torchfilm.several import Masked, Maybe, Several
from torchfilm.upstream import START, untouched

Flags = NDArray[np.bool_]

_FEW = 20


def heard(
    model: Callable[..., Any],
    batches: Iterable[Sequence[Any]],
    *,
    loss: Score | None = None,
    success: Score | None = None,
    blank: Callable[[Any], Any] | None = None,
    paraphrase: Paraphrase | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Hearing:
    """Measure how much conditions matter, by swapping, blanking and paraphrasing them.

    Every sample keeps its x and its target, and gets another sample's condition, always a different one: of
    the different ones in its batch, each with equal chance. A network that listens gives another output and a
    worse loss; one that ignores the condition does not.

        change = sqrt(mean_i |y(x_i, c_p(i)) - y(x_i, c_i)|^2 / mean_ij |y(x_i, c_i) - y(x_j, c_j)|^2)

    where j is every other sample of the batch; a batch of one sample has no part in what is below. Conditions
    too are exchanged within a batch, so shuffle the samples before they are batched: a batch of one class or
    one scene differs by less than all samples do, and one with a single condition has none to exchange. Of
    several outputs the mean is taken over those in which samples differ. The change of an output that is the
    same for all samples is without bound, and counts where no other one changes.

    Every call starts from the same random state of torch, so dropout or sampling noise is the same on both
    sides, and gets copies of its inputs: what it writes into them (x.div_(255), a cache of keys and values, a
    simulator that steps) no other call sees, nor do you. What is left is measured by the row "repeat": chance
    from elsewhere, what a network keeps on itself, and inputs that cannot be copied, as generators.
    A module is measured as it predicts, in eval mode and without gradients, and gets its own modes back.

    Intervals are of 95 %, by a bootstrap over samples that is widened for what samples share (each takes part
    once with its own x and again where its condition is given away) and for small numbers of them. Zeros and
    ones (in a loss: both) have those of Wilson and, for changes, of Agresti and Min. Samples have to be
    independent: of several frames of an episode, or questions about a scene, give the group too, or a single
    one. Where few samples make most of the loss, no interval of their mean is right before there are many.

    Args:
        model: called as `model(x, cond=condition)`; any function may stand here, also one that rolls out
            episodes. It may return tensors, lists of words, or a structure of them, with one row per sample.
        batches: of (x, condition), or (x, condition, target) for loss and success to read. Of samples that
            are not independent, (x, condition, target, group): a number or text for the episode or scene
            that each is of, or one for all. Whole groups are resampled; target may be None. Several inputs
            are a tuple (data loaders make lists): ((x, t), condition) calls model(x, t, cond=condition); (x,
            t, condition) would exchange t. A condition is a tensor, a list of strings, or a structure of them
            (tokens and mask, a dict), one row per sample; a batch of none is left out. What has a single row
            in a dict, such as a time step, stays as it is. Where the network's encoder is `Several`, each
            condition is exchanged by itself too, as "swap NAME".
        loss: loss(output, target) -> [B], one number per sample (reduction="none").
        success: success(output, target) -> [B], true or false or 0..1.
        blank: condition -> an empty one. Without it, a network whose condition may be missing (`Maybe`,
            `Several`) is given none; else floating-point conditions become zero, words become "", and
            conditions of integers are not blanked.
        paraphrase: condition -> the same in other words; or a dict of texts, whose keys are the whole text of
            a sample; or a pair of conditions, row i of the second saying the same as row i of the first.
            `notes` say how many samples it has words for, where not for all.
        resamples: how many bootstrap resamples make the intervals, at least 40.
        seed: of the exchanges, the resamples, and each call.

    Raises:
        ValueError: for no batches; too few resamples; no batch with two different conditions; outputs,
            losses, successes or groups without one row per sample; what is not finite; a success beyond 0..1;
            a loss without targets.

    Example:
        >>> x, z = torch.rand(5, 3), torch.rand(5, 3)
        >>> heard(lambda x, cond: x * cond, [(x, z)]).verdict
        'heard'
    """
    if not isinstance(resamples, Integral) or resamples < FEWEST_RESAMPLES:
        raise ValueError(
            f"heard: expected at least {FEWEST_RESAMPLES} resamples, got {resamples!r}.\n"
            f"The intervals are the middle 95 % of resamples: leave resamples= out for 1000."
        )
    rng = np.random.default_rng(seed)
    tally = Tally(loss, success, (rng, int(resamples)))
    predicting = in_mode(model, training=False) if isinstance(model, nn.Module) else nullcontext()
    with predicting, torch.no_grad():
        for number, batch in enumerate(batches):
            if not is_empty(_parts(batch)[1]):
                _measure(tally, model, batch, rng, seed + number, (blank, paraphrase))
    if "swap" not in tally.found:
        raise ValueError(_nothing_to_swap(tally.found))
    effects = {name: tally.effect(name) for name in tally.found if name != RIGHT}
    left_out = effects["repeat"].output.n - effects["swap"].output.n
    notes = tuple(_notes(effects, tally.units, paraphrase))
    return Hearing(effects, *tally.levels(), left_out, notes, _remedy(model))


def _notes(effects: Mapping[str, Effect], units: int, paraphrase: Any) -> Iterator[str]:
    """Yield what was not measured, or not well, and why."""
    samples, swapped = effects["repeat"].output.n, effects["swap"].output.n
    if units == 1:
        yield "n: the swapped samples are all of one group; without a second one there is no interval."
    elif units < _FEW:
        yield f"n: {units} independent samples are few; a small effect cannot be seen with so few."
    if "blank" not in effects:
        yield "blank: not measured, since a class has no zero; give blank=."
    if swapped < samples:
        yield (
            f"swap: {samples - swapped} of {samples} samples are in batches with a single condition, "
            f"where there is no other one to give."
        )
    known = effects["paraphrase"].output.n if "paraphrase" in effects else 0
    if paraphrase is not None and known < samples:
        missed = "" if known else "not measured, since "
        yield (
            f"paraphrase: {missed}{known} of {samples} samples have a condition among its keys; "
            f"a key is the whole text of a sample."
        )


def _measure(
    tally: Tally,
    model: Callable[..., Any],
    batch: Sequence[Any],
    rng: np.random.Generator,
    seed: int,
    given: tuple[Callable[[Any], Any] | None, Paraphrase | None],
) -> None:
    """Call the model with each change of a batch's conditions."""
    x, condition, target, group = _parts(batch)
    own = of_samples(condition)
    blank, paraphrase = given
    blank = blank or _nothing(model)
    rows = np.arange(len(keys(own)))
    everyone = np.ones(len(rows), dtype=bool)

    def run(with_condition: Any) -> Any:
        inputs, cond = fresh((x if type(x) is tuple else (x,), with_condition))
        with same_chance(seed):
            return model(*inputs, cond=cond)

    def run_with(changed: Any) -> Any:
        in_part = isinstance(condition, Mapping) and changed.keys() != condition.keys()
        return run({**condition, **changed} if in_part else changed)

    tally.begin(run(condition), target, group, len(rows))
    tally.add("repeat", run(condition), rows, everyone)
    for name, part in _exchanged(model, own).items():
        giver = others(keys(part), rng)
        moved = giver != rows
        if moved.any():
            tally.add(name, run_with(take(part, giver)), giver, moved)
    if blank:
        tally.add("blank", run(blank(fresh(condition))), rows, everyone)
    elif (empty := blanked(own)) is not None:
        tally.add("blank", run_with(empty), rows, everyone)
    if callable(paraphrase):
        tally.add("paraphrase", run(paraphrase(fresh(condition))), rows, everyone)
    elif paraphrase is not None:
        other, known = reworded(own, paraphrase)
        if known.any():
            tally.add("paraphrase", run_with(other), rows, known)
    tally.end()


def _exchanged(model: Callable[..., Any], own: Any) -> dict[str, Any]:
    """Return what is exchanged, by the name of the change: all, and of `Several` each by itself.

    Not of other structures: tokens and their mask belong together.
    """
    film = film_of(model)
    if film is None or not isinstance(film.cond, Several) or len(own) < 2:
        return {"swap": own}
    given = {
        name: part for name, part in own.items() if not isinstance(part, Masked) or part.value is not None
    }
    return {"swap": own} | {f"swap {name}": {name: part} for name, part in given.items()}


def _remedy(model: Callable[..., Any]) -> str:
    """Return what to do about a condition that is ignored; nothing is known of a plain function."""
    film = film_of(model)
    if film is None:
        return ""
    if untouched(film.generator):
        return START
    return "Run tf.doctor(model, x, cond=z), which names the sites that cannot be heard."


def _nothing(model: Callable[..., Any]) -> Callable[[Any], Any] | None:
    """Return what blanks a condition for a network that knows itself what is missing; None for others."""
    film = film_of(model)
    cond = None if film is None else film.cond
    if isinstance(cond, Several):
        required = cond.required
        return None if len(required) == len(cond.parts) else lambda given: {n: given[n] for n in required}
    return (lambda condition: Masked(None)) if isinstance(cond, Maybe) else None


def _parts(batch: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3, 4):
        size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise ValueError(
            f"heard: expected batches of (x, condition), (x, condition, target) or "
            f"(x, condition, target, group), got a {type(batch).__name__}{size}.\n"
            f"Give a list of batches, also for a single one: [(x, condition)]."
        )
    x, condition, target, group = (*batch, None, None)[:4]
    return x, condition, target, group


def _nothing_to_swap(found: Mapping[str, object]) -> str:
    if not found:
        return "heard: expected at least one batch, got none.\nAn iterator that was used before is empty."
    return (
        "heard: expected a batch with two different conditions, got none.\n"
        "Shuffle the samples, or make the batches larger: conditions are exchanged within a batch."
    )
