"""What does listening cost a network, run eagerly, each sample with a condition of its own?

The generator included; and what it costs without one, where the modulations were made before. Against the
network as it was before it was conditioned. `kernels`: with those of `torchfilm.native`.

    python benchmarks/conditioning_speed.py        (`--device cuda` where there is one)
"""

import torch

import torchfilm as tf
from measuring import against, arguments, by_kernels, clock_of, in_one_place, kernels_for, save
from speed_networks import NETWORKS, built, conditioned


def measured(name: str, batch: int, rounds: int, cond_dim: int, device: str) -> dict[str, object]:
    """Milliseconds and ratios for one network at one batch size, all ways with the same weights."""
    plain, again = built(name, device), built(name, device)
    live, by, given, off = (conditioned(name, cond_dim, device) for _ in range(4))
    in_one_place(plain, again, live, by, given, off)
    x = torch.randn(batch, *NETWORKS[name][2], device=device)
    cond = torch.randn(batch, cond_dim, device=device)
    film = tf.conditioning(live)
    modulations = film.modulations(cond)

    def unconditioned() -> torch.Tensor:
        with tf.unconditioned(off):
            return off(x)

    ways = {
        "unconditioned": lambda: plain(x),
        "conditioned": lambda: live(x, cond=cond),
        "modulations given": lambda: given(x, modulation=modulations),
        "generator alone": lambda: film(cond),
        "conditioned, switched off": unconditioned,
        "unconditioned again": lambda: again(x),
    }
    kernels = kernels_for(device)
    if kernels is not None:
        ways["conditioned, kernels"] = by_kernels(lambda: by(x, cond=cond), kernels)
    return {"sites": len(film.sites), **against("unconditioned", ways, rounds, clock=clock_of(device))}


def main() -> None:
    parser = arguments(__doc__, rounds=200, rounds_help="for batch 1; fewer for larger batches")
    parser.add_argument("--cond-dim", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    given = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        found = {
            f"{name}, batch {batch}": measured(
                name,
                batch,
                max(8, given.rounds // batch) if batch > 1 else given.rounds,
                given.cond_dim,
                given.device,
            )
            for name in NETWORKS
            for batch in given.batches
        }
    numbers = {"rounds": given.rounds, "cond_dim": given.cond_dim, **found}
    save("conditioning_speed", numbers, device=given.device)


if __name__ == "__main__":
    main()
