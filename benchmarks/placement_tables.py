"""The tables of docs/placement.md: which site, which start."""

from collections.abc import Mapping

from policy_tables import of_seeds
from table_form import PENDING, Result, Results, made_by, of, table

REASONING = {
    "unchanged": "behind the BatchNorm (the paper's place, and ours)",
    "after_relu2": "behind the ReLU",
    "after_conv2": "between convolution and BatchNorm",
    "before_conv1": "in front of the block",
    "after_residual": "behind the addition",
    "no_film_in_last_block": "left out of the last of five blocks",
    "no_film_in_last_two_blocks": "left out of the last two",
    "film_in_first_block_only": "in the first block alone",
    "no_film": "nowhere",
    "no_residual": "everywhere, without residual connections",
    "no_batch_norm": "everywhere, without BatchNorm",
    "beta_zero": "γ alone (β = 0)",
    "gamma_one": "β alone (γ = 1)",
    "gamma_tanh": "γ bounded by tanh",
    "gamma_sigmoid": "γ bounded by a sigmoid",
    "gamma_exp": "γ positive, by exp",
}
POLICY = {
    "film": "every block of the U-Net behind its activation, and the encoder",
    "film_before_activation": "the same, between norm and activation",
    "encoder_only": "the observation's encoder alone",
    "condition_only": "the one vector in front of the network",
    "scale": "as the first, γ alone",
    "bias": "as the first, β alone",
}


def placement_reasoning(results: Results) -> str:
    """Where the laptop's network for visual reasoning listens, and with which γ, early in training."""
    found = results.get("visual_reasoning_ablations")
    if found is None:
        return PENDING
    settings = found["settings"]
    later = results.get("visual_reasoning_ablations_later", {}).get("settings", {})
    base = settings["unchanged"]["accuracy"]
    rows = [
        [
            text,
            f"{100 * settings[name]['accuracy']:.1f}",
            f"{100 * (settings[name]['accuracy'] - base):+.1f}",
            f"{100 * later[name]['accuracy']:.1f}" if name in later else "–",
            f"{settings[name]['paper']:.1f}",
        ]
        for name, text in REASONING.items()
        if name in settings
    ]
    head = ["FiLM", "right, %", "minus the first row", "later, %", "the paper, at the end"]
    return table(head, rows) + f"\n{found['date']}: `{found['command'].split(' --only')[0]} ...`.\n"


@of("diffusion_policy_alternatives")
def placement_policy(found: Result) -> str:
    """Where a diffusion policy listens."""
    columns = ("reach", "push", "collisions_avoid", "push_collisions_avoid")
    rows = [
        [
            text,
            *(_spread(found["rows"][name][column]) for column in columns),
            f"{found['rows'][name]['time']:.2f}",
        ]
        for name, text in POLICY.items()
        if name in found["rows"]
    ]
    head = ["FiLM at", "reach, %", "push, %", "a reach told to avoid touches", "a push told to avoid touches"]
    note = f"\n{of_seeds(found['rows']).capitalize()}; {made_by(found)}"
    return table([*head, "control step"], rows) + note


@of("start")
def starts(found: Result) -> str:
    """Which start of the generator learns fastest."""
    rows = [
        [name, _spread(one["on_average"]), _spread(one["at_the_end"])] for name, one in found["rows"].items()
    ]
    head = ["start", "right while training, %", "right at the end, %"]
    note = (
        f"\n{found['steps']} steps of 64, {found['seeds']} seeds (mean, least and most), chance "
        f"{100 * found['chance']:.0f} %; {made_by(found)}"
    )
    return table(head, rows) + note


def _spread(value: Mapping[str, float]) -> str:
    low, mean, high = (f"{100 * value[key]:.0f}" for key in ("low", "mean", "high"))
    return mean if low == high else f"{mean} ({low} to {high})"
