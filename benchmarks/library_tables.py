"""The table of what the library costs, against the limits that were set for it."""

from collections.abc import Callable, Iterator

from table_form import PENDING, Result, Results, measured_on, table

WITHIN = "medians of the ratios within a round"
OF_MEDIANS = "ratios of medians"
KERNELS = ", kernels"
"""How the name of a row ends that is measured with those of `torchfilm.native`."""
Row = tuple[str, str, float | None, float]
"""What against what, the case, the limit, and the ratio."""


def library_speed(results: Results) -> str:
    """Ratios in one process, in turn; a file that is not there gives no rows.

    A limit is judged by the number in the file, not by the one that is shown.
    """
    return _speed(results)


def library_speed_elsewhere(results: Results) -> str:
    """The same of files that were measured on another processor, by their names."""
    return _speed(results, "_elsewhere")


def _speed(results: Results, ending: str = "") -> str:
    rows, notes = [], ""
    for name, (make, statistic) in FILES.items():
        found = results.get(name + ending)
        if found is not None:
            rows += [_cells(*row) for row in make(found)]
            notes += f"- {name}.py, {statistic}: {measured_on(found)}"
    if not rows:
        return PENDING
    return table(["what / against", "case", "at most", "measured", "held"], rows, texts=2) + "\n" + notes


def library_limits(results: Results) -> str:
    """What has a limit: least and most over its cases, and how many hold it, without and with kernels."""
    found: dict[tuple[str, float], dict[bool, list[float]]] = {}
    for name, (make, _) in FILES.items():
        for what, _, limit, ratio in make(results[name]) if name in results else ():
            if limit is not None:
                ways = found.setdefault((what.removesuffix(KERNELS), limit), {False: [], True: []})
                ways[what.endswith(KERNELS)].append(ratio)
    if not found:
        return PENDING
    rows = [
        [what, f"{limit:.2f}", _span(ways[False], limit), _span(ways[True], limit)]
        for (what, limit), ways in found.items()
    ]
    return table(["what / against", "at most", "without kernels", "with kernels"], rows)


def _span(ratios: list[float], limit: float) -> str:
    if not ratios:
        return "–"
    low, high = (_shown(ratio, limit) for ratio in (min(ratios), max(ratios)))
    held = sum(ratio <= limit for ratio in ratios)
    share = f"**{held} of {len(ratios)}**" if held < len(ratios) else "all"
    return f"{low} to {high} ({share})"


def _cells(what: str, case: str, limit: float | None, ratio: float) -> list[str]:
    if limit is None:
        return [what, case, "–", f"{ratio:#.3g}", "–"]
    return [what, case, f"{limit:.2f}", _shown(ratio, limit), "yes" if ratio <= limit else "**no**"]


def _shown(ratio: float, limit: float) -> str:
    """Three digits, or one more where these would hide that the limit is passed."""
    shown = f"{ratio:#.3g}"
    return shown if ratio <= limit or float(shown) > limit else f"{ratio:.4f}"


def _folding(found: Result) -> Iterator[Row]:
    for name, ways in found["networks"].items():
        yield "folded / unconditioned, its norms folded", f"{name}, batch 1", 1.02, ways["folded"]["ratio"]
        yield "(the same network twice)", f"{name}, batch 1", None, ways["merged again"]["ratio"]


def _layers(found: Result) -> Iterator[Row]:
    for case, one in found["film_and_relu"].items():
        forward, backward = one["forward"], one["forward_and_backward"]
        four = one.get("four_in_one_graph", {"forward": {}, "forward_and_backward": {}})
        for what, ratios, way, limit in (
            ("film + ReLU / ReLU, compiled", forward, "compiled", 1.35),
            ("(the ReLU alone, compiled)", forward, "relu_compiled", None),
            ("film + ReLU / ReLU, compiled, four in one graph", four["forward"], "compiled", 1.35),
            ("film + ReLU / ReLU, eager", forward, "fused", 1.35),
            ("film + ReLU / ReLU, eager, kernels", forward, "kernels", 1.35),
            ("film + ReLU / ReLU, forward and backward, compiled", backward, "compiled", 1.35),
            (
                "film + ReLU / ReLU, forward and backward, compiled, four in one graph",
                four["forward_and_backward"],
                "compiled",
                1.35,
            ),
            ("film + ReLU / ReLU, forward and backward, eager", backward, "fused", 1.35),
            ("film + ReLU / ReLU, forward and backward, eager, kernels", backward, "kernels", 1.35),
        ):
            if f"{way}_over_relu" in ratios:
                yield what, case, limit, ratios[f"{way}_over_relu"]["median"]
    for case, one in found["conditional_norms"].items():
        limited, ratios = case.startswith("GroupNorm (64,"), one["forward_and_backward"]
        limit, what = (
            (1.1, "GroupNorm + FiLM / GroupNorm, batch 64") if limited else (None, "norm + FiLM / norm")
        )
        for name, way in (("", "ours"), (KERNELS, "kernels")):
            if f"{way}_over_norm" in ratios:
                yield f"{what}, forward and backward{name}", case, limit, ratios[f"{way}_over_norm"]["median"]


def _conditioning(found: Result) -> Iterator[Row]:
    for case, ways in found.items():
        if isinstance(ways, dict) and "conditioned" in ways:
            yield "conditioned / unconditioned, eager", case, 1.05, ways["conditioned"]["ratio"]
            if "conditioned, kernels" in ways:
                ratio = ways["conditioned, kernels"]["ratio"]
                yield "conditioned / unconditioned, eager, kernels", case, 1.05, ratio
            yield "(γ and β in hand, no generator)", case, None, ways["modulations given"]["ratio"]


def _generators(found: Result) -> Iterator[Row]:
    for one in found["policy"]:
        case = f"12 sites of a policy's U-Net, batch {one['batch']}"
        what = "tabulated generator / one Linear per layer"
        yield f"{what}, observation encoded before", case, 0.02, one["ratio"]["separable"]
        for steps, loop in one.get("encoded_anew", {}).items():
            yield f"{what}, encoded anew every {steps} steps", case, None, loop["ratio"]


WAYS = {"film": "", "film_by_kernels": KERNELS}


def _fusion(found: Result) -> Iterator[Row]:
    what = "added time, FiLM / cross-attention"
    for case, one in found.items():
        if not isinstance(one, dict) or "inside_batch_1" not in one:
            continue
        for measured, batch in (("inside", 1), ("inside", 8), ("whole", 1)):
            by = "by a stopwatch" if measured == "inside" else "whole passes"
            for way, name in WAYS.items():
                ratio = one[f"{measured}_batch_{batch}"].get(f"{way}_to_cross_attention")
                if ratio is not None:
                    yield f"{what}, {by}{name}", f"{case}, batch {batch}", 0.2, ratio


FILES: dict[str, tuple[Callable[[Result], Iterator[Row]], str]] = {
    "folding_speed": (_folding, f"{WITHIN}, quartiles in the file"),
    "layer_speed": (_layers, f"{WITHIN}, fastest calls in the file"),
    "conditioning_speed": (_conditioning, f"{WITHIN}, quartiles in the file"),
    "generator_speed": (_generators, f"{OF_MEDIANS}; where it is encoded anew {WITHIN}"),
    "fusion_speed": (
        _fusion,
        f"by the stopwatch {OF_MEDIANS}, by whole passes {WITHIN}; quartiles of the times in the file",
    ),
}
