"""What does listening cost a network, run eagerly, each sample with a condition of its own?

The generator included; and what it costs without one, where the modulations were made before. Against the
network as it was before it was conditioned.

    python benchmarks/conditioning_speed.py
"""

import argparse

import torch

import torchfilm as tf
from measuring import against, save
from networks import NETWORKS, built, conditioned


def measured(name: str, batch: int, rounds: int, cond_dim: int) -> dict[str, object]:
    """Milliseconds and ratios for one network at one batch size; each way has weights of its own."""
    plain, again = built(name), built(name)
    live, given, off = (conditioned(name, cond_dim) for _ in range(3))
    x, cond = torch.randn(batch, *NETWORKS[name][2]), torch.randn(batch, cond_dim)
    film = tf.conditioning(live)
    modulations = film.modulations(cond)

    def unconditioned() -> torch.Tensor:
        with tf.unconditioned(off):
            return off(x)

    ways = {
        "unconditioned": lambda: plain(x),
        "conditioned": lambda: live(x, cond=cond),
        "modulations given": lambda: given(x, modulation=modulations),
        "generator alone": lambda: film.modulations(cond),
        "conditioned, switched off": unconditioned,
        "unconditioned again": lambda: again(x),
    }
    return {"sites": len(film.sites), **against("unconditioned", ways, rounds)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40, help="for batch 1; fewer for larger batches")
    parser.add_argument("--cond-dim", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    given = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        found = {
            f"{name}, batch {batch}": measured(
                name, batch, max(8, given.rounds // batch) if batch > 1 else given.rounds, given.cond_dim
            )
            for name in NETWORKS
            for batch in given.batches
        }
    save("conditioning_speed", {"rounds": given.rounds, "cond_dim": given.cond_dim, **found})


if __name__ == "__main__":
    main()
