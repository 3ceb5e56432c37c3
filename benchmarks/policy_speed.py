"""What does it cost a diffusion policy to make gamma and beta, per control step, and what does listening add?

The U-Net is the paper's (256/512/1024, 65.8 M parameters with a condition of 40 numbers); a control step is
ten denoising steps for one observation, without the scheduler. Ratios are to the original's form: Mish and
Linear in every block, at every step.

All predict the same (a reasoning vector is the identity at the start), which is checked first.

- original: its form, with the same weights.
- tables: the steps' part from a table, the observation's once; exact.
- blocks: gamma and beta in hand: what is left when generators cost nothing.
- reasoning: as tables, and gamma(l), beta(l) of a reasoning vector of 128 numbers composed into every block.
- reasoning, condition: the vector modulates the condition alone, as the released DiffusionVLA.
- folded: as reasoning, for one vector that stays, in the weights of the generators' heads.
- generators: what is left of them at every step with tables, alone: gamma and beta of all blocks.
- packed: as tables, with the convolutions' weights packed (`torchfilm.blocks.packing`).
- packed, reasoning: both.

    python benchmarks/policy_speed.py        (a minute of one core)
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from generator_speed import one_by_one
from measuring import against, parser_of, save
from torchfilm.blocks.packing import pack_convolutions
from torchfilm.blocks.unet1d import ConditionalUnet1d
from torchfilm.fusion import resolve
from torchfilm.modulation import Modulation
from torchfilm.systems.diffusion_policy import PolicyConfig, build
from torchfilm.systems.diffusion_policy.fixing import fixed

STEPS = torch.arange(90, -1, -10)


class Original(nn.Module):
    """The modulations of all blocks in the original's form: Mish and Linear of step and condition, each."""

    def __init__(self, unet: ConditionalUnet1d) -> None:
        super().__init__()
        self.unet = unet
        self.layers = one_by_one(unet.generator)

    def forward(self, x: Tensor, step: Tensor, condition: Tensor) -> Tensor:
        z = torch.cat([self.unet.step_encoder(step[:, None]), condition], dim=-1)
        made = {}
        for name, layer in zip(self.unet.sites, self.layers, strict=True):
            gamma, beta = layer(nn.functional.mish(z)).chunk(2, dim=-1)
            made[name] = Modulation(gamma, beta)
        return self.unet.denoise(x, made)


@torch.no_grad()
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    policy = build(PolicyConfig(vectors=(("thought", 128),), listens=("blocks",))).eval()
    unet = policy.unet
    original, x, condition = Original(unet).eval(), torch.randn(1, 16, 2), torch.randn(1, 40)
    z, table = torch.randn(1, 128), unet.step_rows(STEPS)
    blocks, place = resolve("film").build(128, unet.sites), resolve("film").build(128, {"condition": 40})
    made = [unet.generator.of_raw(row + unet.condition_rows(condition)) for row in table]

    packed = pack_convolutions(copy.deepcopy(unet))
    folded = fixed(policy, {"thought": z}).unet

    def tables(
        condition: Tensor = condition, injected: dict | None = None, unet: ConditionalUnet1d = unet
    ) -> Tensor:
        own = unet.condition_rows(condition)
        for row in table:
            y = unet.denoise(x, unet.generator.of_raw(row + own), injected=injected)
        return y

    def in_form() -> Tensor:
        for step in STEPS:
            y = original(x, step[None], condition)
        return y

    def in_hand() -> Tensor:
        for modulations in made:
            y = unet.denoise(x, modulations)
        return y

    def through_condition() -> Tensor:
        m = place(z)["condition"]
        return tables(m.gamma * condition + m.beta)

    def generators() -> None:
        own = unet.condition_rows(condition)
        for row in table:
            unet.generator.of_raw(row + own)

    candidates = {
        "original": in_form,
        "tables": tables,
        "blocks": in_hand,
        "reasoning": lambda: tables(injected=blocks(z)),
        "reasoning, condition": through_condition,
        "folded": lambda: tables(unet=folded),
        "packed": lambda: tables(unet=packed),
        "packed, reasoning": lambda: tables(injected=blocks(z), unet=packed),
    }
    worst = difference(candidates)
    found = against("original", candidates | {"generators": generators}, rounds)
    share = found["generators"]["ms"] / found["tables"]["ms"]
    save("policy_speed", {"candidates": found, "error": worst, "generators_share": round(share, 5)})


def difference(candidates: dict[str, Callable[[], Tensor]]) -> float:
    """The largest difference of what they predict from the first's; SystemExit beyond 1e-5 of its largest."""
    first, *others = [call() for call in candidates.values()]
    worst = max(float((y - first).abs().max()) for y in others)
    if worst > 1e-5 * float(first.abs().max()):
        raise SystemExit(
            f"expected the same output of every way, to 1e-5 of its largest number, got {worst:.1e}"
        )
    return worst


if __name__ == "__main__":
    main()
