"""What lies in several processes: parts that are sharded, tensor parallelism, and the page about these."""

import copy
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import torchfilm as tf
from catalogue import randomise
from networks import SITES, Net, inputs
from torchfilm.sharding import beside

pytestmark = pytest.mark.plain

PAGE = Path(__file__).resolve().parents[1] / "docs" / "distributed.md"
MIXING = ("concat", "low_rank", "cross_attention")
PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}
BY_STEPS = {
    "": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Shard(1),)),
    "norm": SequenceParallel(),
    "up": ColwiseParallel(input_layouts=Shard(1)),
    "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=True),
}
PARALLEL = {
    "columns": ("up", {}, PLAN),
    "rows": ("down", {}, PLAN),
    "a plain norm": ("norm", {}, PLAN),
    "all": ("norm|up|down", {}, PLAN),
    "inputs": ("up|down", {"where": "input"}, PLAN),
    "mixing": ("up|down", {"fusion": "concat"}, PLAN),
    "steps": ("norm|up|down", {}, BY_STEPS),
}


class Perceptron(nn.Module):
    """A block as tensor parallelism takes it apart."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 14), nn.Linear(14, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))


class Encoder(nn.Module):
    """A condition with parameters."""

    dim = 5

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(13, 5)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.layer(z)


def conditioned(cond: nn.Module, **options: Any) -> nn.Module:
    torch.manual_seed(3)
    return randomise(tf.condition(Net(), SITES, cond, **options)).eval()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return inputs(4)


def apart(model: nn.Module) -> nn.Module:
    for part in (*model.blocks, model.film, model):
        fully_shard(part)
    return model


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(model: nn.Module, x: torch.Tensor, z: torch.Tensor) -> list[torch.Tensor]:
    model(x, cond=z).square().mean().backward()
    return [full(p.grad) for p in model.parameters()]


def refusal(call: Any) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def in_parallel(rank: int, site: str, options: dict[str, Any], plan: dict[str, Any]) -> tuple[Any, Any]:
    """Return outputs and gradients in two processes, and in one; of a single sample without gradients too."""
    torch.manual_seed(5)
    model = randomise(tf.condition(Perceptron(), site, tf.Vector(7), **options)).double()
    x, z, alone = torch.randn(3, 4, 6).double(), torch.randn(3, 7).double(), copy.deepcopy(model)
    parallelize_module(model, init_device_mesh("cpu", (2,)), dict(plan))
    part = slice(2 * rank, 2 * rank + 2) if plan is BY_STEPS else slice(None)
    with torch.no_grad():
        one = model(x[:1, part], cond=z[:1]) + 0, alone(x[:1], cond=z[:1])[:, part]  # + 0: waits for it
    y, expected = model(x[:, part], cond=z), alone(x, cond=z)
    y.square().sum().backward()
    expected.square().sum().backward()
    found = [full(p.grad) for p in model.parameters()]
    if plan is BY_STEPS:  # what a process does not share out sees its own steps alone
        found = [p.grad.full_tensor() for p in model.parameters() if hasattr(p.grad, "full_tensor")]
        names = [name for name, p in model.named_parameters() if hasattr(p.grad, "full_tensor")]
        wanted = [alone.get_parameter(name).grad for name in names]
    else:
        wanted = [p.grad for p in alone.parameters()]
    return (y.detach() + 0, one[0], found), (expected[:, part].detach(), one[1], wanted)


def older(folder: Path) -> dict[str, str]:
    """Return what is said of torch's first FSDP."""
    device = torch.device("cpu")
    wrapped = FullyShardedDataParallel(conditioned(tf.Vector(13)), use_orig_params=True, device_id=device)
    plain = FullyShardedDataParallel(Net(), use_orig_params=True, device_id=device)
    return {
        "condition": refusal(lambda: tf.condition(plain, ".*head", tf.Vector(13))),
        "condition inner": refusal(lambda: tf.condition(plain.module, "head", tf.Vector(13))),
        "save": refusal(lambda: tf.save(wrapped, folder)),
        "save inner": refusal(lambda: tf.save(wrapped.module, folder)),
    }


def sharded(rank: int, folder: Path, x: torch.Tensor, z: torch.Tensor) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for fusion in MIXING:
        results[fusion] = gradients(apart(conditioned(tf.Vector(13), fusion=fusion)), x, z)
    cold = apart(conditioned(tf.Vector(13)))
    results["cold"] = refusal(lambda: tf.modulations(cold, z))
    results["guided cold"] = refusal(
        lambda: tf.guide(cold, x, cond=z, null=0 * z, scale=2.0, space="modulation")
    )
    results["warm"] = cold(x, cond=z), tf.modulations(cold, z)["blocks.0.bn"].gamma
    results["fold"] = refusal(lambda: tf.fold(cold, cond=z[:1]))
    results["compare"] = refusal(lambda: tf.compare({"film": cold}, (x, z)))
    whole = fully_shard(conditioned(tf.Vector(13)))
    whole.unshard()
    results["fold unsharded"] = refusal(lambda: tf.fold(whole, cond=z[:1]))
    pair = init_device_mesh("cpu", (2,))
    split = parallelize_module(tf.condition(Perceptron(), "up", tf.Vector(13)), pair, PLAN)
    results["fold columns"] = refusal(lambda: tf.fold(split, cond=z[:1]))
    lies = distribute_tensor(x, pair)
    results["beside"] = beside(lies, {"own": lies})["own"] is lies
    encodes = conditioned(tf.Maybe(Encoder()))
    fully_shard(encodes.film.cond.condition)
    apart(encodes)
    encodes(x, cond=tf.Masked(z, torch.zeros(4, dtype=torch.bool)))
    results["missing"] = refusal(lambda: encodes(x, cond=tf.Masked(None)))
    with torch.device("meta"):
        fresh = tf.condition(Net(), SITES, tf.Scalars(1, 12, learned=True))
    apart(fresh).to_empty(device="cpu")
    fresh.film.cond.reset_parameters()
    results["frequencies"] = full(fresh.film.cond.frequencies).detach()
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("stages", "parts"))
    tf.save(fully_shard(conditioned(tf.Vector(13)), mesh=mesh["parts"]), folder / f"mesh{rank}")
    return results


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x, z = batch()
    results = sharded(rank, Path(folder), x, z) | {"FSDP1": older(Path(folder))}
    results |= {name: in_parallel(rank, *case) for name, case in PARALLEL.items()}
    names: dict[str, Any] = {"folder": Path(folder)}
    for code in re.findall(r"^```py\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL):
        exec(compile(code, str(PAGE), "exec"), names)
    results["page"] = {name: full(names[name].film.generator.head.weight) for name in ("net", "again")}
    results["page"] |= {name: full(names[name]) for name in ("exact", "gamma")}
    torch.save(results, Path(folder) / f"results{rank}.pt")
    distributed.barrier()
    os._exit(0)  # FSDP keeps the group's threads, and one that wants the interpreter while it ends aborts


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sharded")
    multiprocessing.spawn(run, args=(str(folder),), nprocs=2)
    every = [torch.load(folder / f"results{rank}.pt", weights_only=False) for rank in (0, 1)]
    return [one | {"folder": folder} for one in every]


@pytest.mark.parametrize("fusion", MIXING)
def test_weights_that_leave_the_generator_outlive_its_call(both: list[dict[str, Any]], fusion: str):
    expected = gradients(conditioned(tf.Vector(13), fusion=fusion), *batch())
    for found in both:
        torch.testing.assert_close(found[fusion], expected)


def test_a_part_is_not_called_before_its_root(both: list[dict[str, Any]]):
    model, (x, z) = conditioned(tf.Vector(13)), batch()
    for found in both:
        for refused in (found["cold"], found["guided cold"]):
            assert "of which FSDP2 has a part by itself" in refused
            assert r"Run the network once first, model(x, cond=z)" in refused
        expected = model(x, cond=z), tf.modulations(model, z)["blocks.0.bn"].gamma
        torch.testing.assert_close(found["warm"], expected)


@pytest.mark.parametrize("done", ["fold", "fold unsharded", "fold columns", "compare"])
def test_a_network_in_parts_is_not_copied(both: list[dict[str, Any]], done: str):
    assert "that this process has whole, got one that lies in several" in both[0][done]
    assert (
        f"Let all of them save(model, folder), load that onto a plain base, and {done.split()[0]}"
        in both[0][done]
    )


def test_what_lies_in_several_processes_already_stays_as_it_is(both: list[dict[str, Any]]):
    assert all(found["beside"] for found in both)


def test_an_encoder_in_parts_has_to_be_called(both: list[dict[str, Any]]):
    assert "got 'layer.weight', of which FSDP2 holds a part" in both[0]["missing"]
    assert "Give Masked(value, present) with False for each sample" in both[0]["missing"]


def test_learned_frequencies_in_parts_start_as_whole_ones(both: list[dict[str, Any]]):
    for found in both:
        assert torch.equal(found["frequencies"], tf.Scalars(1, 12, learned=True).frequencies)


def test_the_first_process_of_each_mesh_saves(both: list[dict[str, Any]]):
    for stage in ("mesh0", "mesh1"):
        loaded = tf.load(tf.remove(conditioned(tf.Vector(13))), both[0]["folder"] / stage)
        saved = conditioned(tf.Vector(13))
        for found, expected in zip(loaded.parameters(), saved.parameters(), strict=True):
            assert torch.equal(found, expected)


def test_the_first_fsdp_is_refused(both: list[dict[str, Any]]):
    refused = both[0]["FSDP1"]
    for where in ("condition", "condition inner"):
        assert "after FullyShardedDataParallel.\nCondition it first, then fully_shard" in refused[where]
    for where in ("save", "save inner"):
        assert "got one with its parameters in one flat tensor" in refused[where]
        assert "Shard the conditioned network by fully_shard instead" in refused[where]


@pytest.mark.parametrize("case", PARALLEL)
def test_sites_of_tensor_parallelism_listen(both: list[dict[str, Any]], case: str):
    for one in both:
        found, expected = one[case]
        torch.testing.assert_close(found, expected)


def test_the_code_of_the_page_runs_in_two_processes(both: list[dict[str, Any]]):
    for one in both:
        assert torch.equal(one["page"]["again"], one["page"]["net"])
        assert torch.equal(one["page"]["exact"], one["page"]["gamma"])
