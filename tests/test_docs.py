"""What the pages promise: their code runs, their tables are those of the code."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchfilm as tf
from catalogue import randomise
from torchfilm.converters import LAYOUTS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def run(page: Path) -> dict[str, Any]:
    """Run the code of a page from top to bottom; return the names that it leaves."""
    names: dict[str, Any] = {}
    for code in blocks(page.read_text(encoding="utf-8")):
        exec(compile(code, str(page), "exec"), names)
    return names


def blocks_with_packages(page: Path) -> list[tuple[str, str]]:
    """Return the packages behind `python` at the head of a block, and its code."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^```python (.+?)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_from_top_to_bottom(page: Path):
    run(page)


@pytest.mark.filterwarnings("default")  # those of others
@pytest.mark.parametrize(("packages", "code"), blocks_with_packages(ROOT / "docs" / "packages.md"))
def test_the_code_for_packages_runs_after_that_for_all_where_they_are_installed(packages: str, code: str):
    for package in packages.split():
        pytest.importorskip(package)
    exec(compile(code, packages, "exec"), run(ROOT / "docs" / "packages.md"))


def test_the_table_of_layouts_is_that_of_the_code():
    text = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    rows = [
        f"| `{name}` | {layout.order} | {' '.join(layout.trunk) or '-'} | {layout.where} |"
        for name, layout in LAYOUTS.items()
    ]
    table = text.split("<!-- table: layouts -->")[1].split("<!-- /table -->")[0]
    assert table.strip().splitlines()[2:] == rows


def test_guidance_as_the_page_has_it_leaves_the_learned_variance_conditional():
    guide_noise = run(ROOT / "docs" / "migration.md")["guide_noise"]
    parts = {"time": tf.Scalars(1, 6), "class": tf.Maybe(tf.Classes(11, 5), dropout=0.1)}
    net = nn.Sequential(nn.Conv2d(4, 3, 1), nn.GroupNorm(1, 3), nn.Conv2d(3, 8, 1))
    model = randomise(tf.condition(net, "1", tf.Several(parts))).eval()
    x, cond = torch.randn(2, 4, 5, 7), {"time": torch.rand(2, 1), "class": torch.tensor([3, 9])}
    given, none = model(x, cond=cond), model(x, cond={"time": cond["time"]})
    y = guide_noise(model, x, cond=cond, scale={"class": 4.0})
    torch.testing.assert_close(y[:, :4], none[:, :4] + 4 * (given[:, :4] - none[:, :4]))
    torch.testing.assert_close(y[:, 4:], given[:, 4:])
    assert not torch.allclose(y[:, 4:], none[:, 4:], atol=1e-2)


@pytest.mark.parametrize("name", ["dit", "expert"])
def test_trained_blocks_with_gates_as_the_page_has_them_are_those_of_others(name: str):
    """x + gate * branch(scale * norm(x) + norm(x) + shift), by the trained projections, block by block."""
    page = run(ROOT / "docs" / "migration.md")
    net, x = page[name].double(), torch.randn(2, 5, 64, dtype=torch.float64)
    z = torch.randn(2, 512 if name == "dit" else 256, dtype=torch.float64)
    y = net(x, cond=z)
    for layer in (page["blocks"] if name == "dit" else page["dense"]).values():
        layer.double()
    with tf.unconditioned(net):
        expected = (
            dit_by_hand(net, page["blocks"], x, z)
            if name == "dit"
            else openpi_by_hand(net, page["dense"], x, z)
        )
    torch.testing.assert_close(y, expected)
    assert (y - x).abs().mean() > 0.1


def dit_by_hand(net: Any, blocks: Any, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    for block, projection in zip(net, blocks.values(), strict=False):
        packed = projection(z * torch.sigmoid(z)).unsqueeze(1)
        shift1, scale1, gate1, shift2, scale2, gate2 = packed.split(64, dim=-1)
        h = block.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * block.attention(h, h, h)[0]
        x = x + gate2 * block.mlp(block.norm2(x) * (1 + scale2) + shift2)
    return x


def openpi_by_hand(net: Any, dense: Any, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    def normed(norm: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        scale, shift, gate = dense[name](z).unsqueeze(1).split(64, dim=-1)
        return norm(x) * (1 + scale) + shift, gate

    for i in range(3):
        h, gate = normed(net[i].norm1, f"{i}.norm1")
        x = x + gate * net[i].attention(h, h, h)[0]
        h, gate = normed(net[i].norm2, f"{i}.norm2")
        x = x + gate * net[i].mlp(h)
    return normed(net[3], "3")[0]


@pytest.mark.parametrize(("cosines_first", "shift"), [(False, 1), (True, 0), (True, 1)])
def test_time_steps_as_the_page_has_them_are_those_of_others(cosines_first: bool, shift: int):
    """h frequencies, 10000 ** (-i / (h - shift)), sines or cosines first."""
    steps, half = torch.tensor([[0.0], [1.0], [37.0], [999.0]], dtype=torch.float64), 16
    angles = steps * 10000.0 ** (-torch.arange(half) / (half - shift))
    theirs = [angles.cos(), angles.sin()] if cosines_first else [angles.sin(), angles.cos()]
    longest = 10000 ** ((half - 1) / half) if shift == 0 else 10000
    time = tf.Scalars(1, 2 * half, min_period=2 * math.pi, max_period=2 * math.pi * longest)
    reads = nn.Linear(2 * half, 5).double()
    expected = reads(torch.cat(theirs, dim=1))
    if cosines_first:
        reads.weight.data = reads.weight.data.roll(half, dims=1)
    torch.testing.assert_close(reads(time(steps)), expected, rtol=1e-5, atol=1e-5)


def test_time_steps_of_diffusers_are_of_these_three_kinds():
    diffusers, angle = pytest.importorskip("diffusers"), torch.tensor([37.0])
    down, up = ("DownBlock2D",) * 2, ("UpBlock2D",) * 2
    unet = diffusers.UNet2DModel(
        32, 3, 3, down_block_types=down, up_block_types=up, block_out_channels=(32, 32)
    ).time_proj(angle)
    dit = diffusers.models.embeddings.CombinedTimestepLabelEmbeddings(10, 8).time_proj(angle)
    plain = diffusers.models.embeddings.get_timestep_embedding(angle, 256)
    few, many = torch.arange(16), torch.arange(128)
    torch.testing.assert_close(plain[:, :128], (angle * 10000.0 ** (-many / 127)).sin()[None])
    torch.testing.assert_close(unet[:, :16], (angle * 10000.0 ** (-few / 16)).cos()[None])
    torch.testing.assert_close(dit[:, :128], (angle * 10000.0 ** (-many / 127)).cos()[None])


def test_code_is_found():
    assert blocks("text\n```python\nx = 1\n```\n```\nno\n```\n") == ["x = 1\n"]
