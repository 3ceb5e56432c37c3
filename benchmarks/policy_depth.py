"""Which part of the instruction does each layer of the shipped policy hear?

For every site, the share of the variance of gamma and beta over fresh instructions that each part explains
(`torchfilm inspect diffusion_policy` draws it).

    python benchmarks/policy_depth.py        (half a minute of one core)
"""

from measuring import parser_of, save
from torchfilm.systems.diffusion_policy import load
from torchfilm.systems.diffusion_policy.inspect_figures import shares_by_site


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--points", type=int, default=3000)
    points = parser.parse_args().points
    save("policy_depth", {"instructions": points, "sites": shares_by_site(load(), points=points, seed=0)})


if __name__ == "__main__":
    main()
