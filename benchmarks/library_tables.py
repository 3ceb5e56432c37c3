"""The table of what the library costs, against the limits that were set for it."""

from collections.abc import Iterator

from table_form import PENDING, Result, Results, measured_on, table

FILES = ("folding_speed", "layer_speed", "conditioning_speed", "generator_speed", "fusion_speed")


def library_speed(results: Results) -> str:
    """Ratios in one process, in turn, medians; a file that is not there gives no rows."""
    rows: list[list[str]] = []
    for name, make in (
        ("folding_speed", _folding),
        ("layer_speed", _layers),
        ("conditioning_speed", _conditioning),
        ("generator_speed", _generators),
        ("fusion_speed", _fusion),
    ):
        if name in results:
            rows += [[what, case, limit, f"{ratio:.3g}"] for what, case, limit, ratio in make(results[name])]
    if not rows:
        return PENDING
    notes = "".join(f"- {name}.py: {measured_on(results[name])}" for name in FILES if name in results)
    return table(["what / against", "case", "at most", "measured"], rows, texts=2) + "\n" + notes


def _folding(found: Result) -> Iterator[tuple[str, str, str, float]]:
    for name, ways in found["networks"].items():
        yield "folded / unconditioned, its norms folded", f"{name}, batch 1", "1.02", ways["folded"]["ratio"]
        yield "(the same network twice)", f"{name}, batch 1", "–", ways["merged again"]["ratio"]


def _layers(found: Result) -> Iterator[tuple[str, str, str, float]]:
    for case, one in found["film_and_relu"].items():
        forward, backward = one["forward"], one["forward_and_backward"]
        for what, ratios, way, limit in (
            ("film + ReLU / ReLU, compiled", forward, "compiled", "1.35"),
            ("(the ReLU alone, compiled)", forward, "relu_compiled", "–"),
            ("film + ReLU / ReLU, eager, kernels", forward, "kernels", "1.35"),
            ("forward and backward, compiled", backward, "compiled", "1.35"),
            ("forward and backward, eager", backward, "fused", "1.35"),
            ("forward and backward, eager, kernels", backward, "kernels", "1.35"),
        ):
            if f"{way}_over_relu" in ratios:
                yield what, case, limit, ratios[f"{way}_over_relu"]["median"]
    for case, one in found["conditional_norms"].items():
        limit, ratios = "1.10" if case.startswith("GroupNorm (64,") else "–", one["forward_and_backward"]
        for what, way in (("", "ours"), (", kernels", "kernels")):
            if f"{way}_over_norm" in ratios:
                ratio = ratios[f"{way}_over_norm"]["median"]
                yield f"norm + FiLM / norm, forward and backward{what}", case, limit, ratio


def _conditioning(found: Result) -> Iterator[tuple[str, str, str, float]]:
    for case, ways in found.items():
        if isinstance(ways, dict) and "conditioned" in ways:
            yield "conditioned / unconditioned, eager", case, "1.05", ways["conditioned"]["ratio"]
            if "conditioned, kernels" in ways:
                ratio = ways["conditioned, kernels"]["ratio"]
                yield "conditioned / unconditioned, eager, kernels", case, "1.05", ratio
            yield "(γ and β in hand, no generator)", case, "–", ways["modulations given"]["ratio"]


def _generators(found: Result) -> Iterator[tuple[str, str, str, float]]:
    for one in found["policy"]:
        case = f"12 sites of a policy's U-Net, batch {one['batch']}"
        yield "tabulated generator / one Linear per layer", case, "0.02", one["ratio"]["separable"]
        for steps, loop in one["encoded_anew"].items():
            what = f"tabulated, observation encoded anew, {steps} steps / one Linear per layer"
            yield what, case, "–", loop["ratio"]


def _fusion(found: Result) -> Iterator[tuple[str, str, str, float]]:
    for case, one in found.items():
        if isinstance(one, dict) and "inside_batch_1" in one:
            for batch in (1, 8):
                for way, name in (("film", ""), ("film_by_kernels", ", kernels")):
                    ratio = one[f"inside_batch_{batch}"].get(f"{way}_to_cross_attention")
                    if ratio is not None:
                        yield (
                            f"added time, FiLM / cross-attention{name}",
                            f"{case}, batch {batch}",
                            "0.2",
                            ratio,
                        )
