"""A conditioned network in two processes: DistributedDataParallel and FSDP2 give one process's gradients."""

import copy
import os
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import torchfilm as tf
from catalogue import randomise
from networks import SITES, Net, inputs

pytestmark = pytest.mark.plain

SITE = "blocks.0.bn"
LABELS = torch.tensor([3, 0, 4, 1])
KNOWS_UNBIND = torch.__version__ >= "2.10"


def of_classes() -> nn.Module:
    """Return a network in evaluation, in every process the same, whose condition has parameters."""
    torch.manual_seed(3)
    model = tf.condition(Net(), SITES, tf.Maybe(tf.Classes(5, 4)))
    randomise(model.film)
    return model.eval()


def missing_in_the_first(model: nn.Module, x: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the loss of a process's half, of which the first has no condition."""
    half = slice(2 * rank, 2 * rank + 2)
    return model(x[half], cond=tf.Masked(None) if rank == 0 else LABELS[half]).square().mean()


def built() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Return the same trained network and batch in every process; the condition may be missing."""
    torch.manual_seed(3)
    model = tf.condition(Net(), SITES, tf.Maybe(tf.Vector(13)))
    randomise(model.film)
    return model.eval(), *inputs(4)


# Which samples have their condition; the second process has none with one, later.
PRESENT = torch.tensor([True, False, False, False])


def loss(model: nn.Module, x: torch.Tensor, z: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    return model(x, cond=tf.Masked(z, present)).square().mean()


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def refusal(call) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def sharded_and_used(model: nn.Module, x: torch.Tensor, z: torch.Tensor, half: slice) -> dict[str, object]:
    """Return what sharded networks give in `using`, `film` sharded apart or not, before a step or after."""
    mesh, given, results = init_device_mesh("cpu", (2,)), tf.Masked(z, PRESENT), {}
    for apart in (True, False):
        for trained in (True, False):
            used = copy.deepcopy(model)
            for part in (*used.blocks, *([tf.conditioning(used)] if apart else [])):
                fully_shard(part, mesh=mesh)
            fully_shard(used, mesh=mesh)
            if trained:
                loss(used, x[half], z[half], PRESENT[half]).backward()
            with torch.no_grad(), tf.using(used, cond=given):
                results[f"FSDP2 using {apart} {trained}"] = (used(x), used(x))
            results[f"FSDP2 after {apart} {trained}"] = used(x, cond=given)
    used = fully_shard(copy.deepcopy(model), mesh=mesh)
    results["FSDP2 modulations refused"] = refusal(lambda: tf.modulations(used, given))
    values = tf.modulations(model, given)
    with tf.using(used, modulation=values), tf.using(used, cond=given):
        results["FSDP2 part refused"] = refusal(lambda: used.blocks[0].bn(torch.ones(2, 3, 5, 7)))
    used.unshard()
    results["FSDP2 modulations"] = tf.modulations(used, given)[SITE].gamma
    return results


def replicated() -> dict[str, object]:
    """Return what a network gives whose tensors are distributed, whole in each process, and what it did."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(5)
    model = randomise(tf.condition(nn.Sequential(nn.Linear(3, 5)), "0", tf.Vector(7)))
    x, z = torch.randn(2, 3), torch.randn(2, 7)
    expected = model(x, cond=z), tf.modulations(model, z)["0"].gamma
    distribute_module(model, mesh)
    x, z = (distribute_tensor(one, mesh, [Replicate()]) for one in (x, z))
    with torch.no_grad(), tf.using(model, cond=z):
        found = full(model[0](x)), full(tf.modulations(model, z)["0"].gamma)
    return {"replicated": (found, expected)}


def run(rank: int, folder: str) -> None:
    """Train one step by halves in two processes; rank 0 writes the gradients and what was refused."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, x, z = built()
    half = slice(2 * rank, 2 * rank + 2)
    results: dict[str, object] = {}

    wrapped = DistributedDataParallel(copy.deepcopy(model))
    loss(wrapped, x[half], z[half], PRESENT[half]).backward()
    results["DDP"] = [p.grad for p in wrapped.module.parameters()]
    with torch.no_grad(), tf.using(wrapped, cond=tf.Masked(z, PRESENT)):
        results["DDP using"] = wrapped(x)
    without = DistributedDataParallel(of_classes())
    missing_in_the_first(without, x, rank).backward()
    results["DDP missing"] = [p.grad for p in without.module.parameters()]
    results["DDP refused"] = refusal(
        lambda: tf.condition(DistributedDataParallel(Net()), "module.head", tf.Vector(13))
    )

    mesh = init_device_mesh("cpu", (2,))
    sharded = copy.deepcopy(model)
    for part in (*sharded.blocks, sharded.head, tf.conditioning(sharded)):
        fully_shard(part, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    loss(sharded, x[half], z[half], PRESENT[half]).backward()
    results["FSDP2"] = [full(p.grad) for p in sharded.parameters()]
    results["FSDP2 kind"] = type(sharded).__name__
    tf.save(sharded, Path(folder) / "adapter")
    half_precision = tf.condition(Net().bfloat16(), SITES, tf.Vector(13)).eval()
    for part in (tf.conditioning(half_precision), half_precision):
        fully_shard(part, mesh=mesh)
    results["FSDP2 bfloat16"] = half_precision(x.bfloat16(), cond=z)
    plain = Net().eval()
    for block in plain.blocks:
        fully_shard(block, mesh=mesh)
    tf.condition(plain, SITES, tf.Vector(13))
    fully_shard(plain, mesh=mesh)
    with tf.unconditioned(plain):
        base = plain(x)
    results["FSDP2 blocks first"] = (base, plain(x, cond=z))
    results |= sharded_and_used(model, x, z, half)
    if KNOWS_UNBIND:
        results |= replicated()
    refused = fully_shard(Net(), mesh=mesh)
    results["FSDP2 refused"] = refusal(lambda: tf.condition(refused, "head", tf.Vector(13)))
    if rank == 0:
        torch.save(results, Path(folder) / "results.pt")
    distributed.barrier()
    # Before their group: else freeing them may wait for a thread that waits for the interpreter.
    del wrapped, without
    distributed.destroy_process_group()
    os._exit(0)  # FSDP keeps the group's threads, and one that wants the interpreter while it ends aborts


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(run, args=(str(folder),), nprocs=2)
    return {**torch.load(folder / "results.pt", weights_only=False), "adapter": folder / "adapter"}


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_two_processes_have_the_gradients_of_one(results: dict, kind: str):
    model, x, z = built()
    loss(model, x, z, PRESENT).backward()
    for (name, p), grad in zip(model.named_parameters(), results[kind], strict=True):
        torch.testing.assert_close(grad, p.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_a_condition_that_is_missing_in_one_process_has_gradients_in_evaluation_too(results: dict):
    model, (_, x, _) = of_classes(), built()
    (sum(missing_in_the_first(model, x, rank) for rank in (0, 1)) / 2).backward()
    for (name, p), grad in zip(model.named_parameters(), results["DDP missing"], strict=True):
        torch.testing.assert_close(grad, p.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_using_looks_through_the_wrapper(results: dict):
    model, x, z = built()
    torch.testing.assert_close(results["DDP using"], model(x, cond=tf.Masked(z, PRESENT)))


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("apart", [True, False])
def test_a_sharded_network_is_used(results: dict, apart: bool, trained: bool):
    model, x, z = built()
    expected = model(x, cond=tf.Masked(z, PRESENT))
    every = *results[f"FSDP2 using {apart} {trained}"], results[f"FSDP2 after {apart} {trained}"]
    for found in every:
        torch.testing.assert_close(found, expected)


def test_a_sharded_network_makes_values_in_its_calls_alone(results: dict):
    assert "expected an active condition, got none" in results["FSDP2 part refused"]
    assert "expected parameters that are whole" in results["FSDP2 modulations refused"]
    assert "Call model.unshard() first" in results["FSDP2 modulations refused"]
    model, _, z = built()
    expected = tf.modulations(model, tf.Masked(z, PRESENT))[SITE].gamma
    torch.testing.assert_close(results["FSDP2 modulations"], expected)


@pytest.mark.skipif(not KNOWS_UNBIND, reason="distributed tensors know no unbind before torch 2.10")
def test_a_network_that_each_process_has_whole_makes_values_anywhere(results: dict):
    for found, expected in zip(*results["replicated"], strict=True):
        torch.testing.assert_close(found, expected)


def test_sharding_puts_its_class_on_top_of_ours(results: dict):
    assert results["FSDP2 kind"] == "FSDPNet"
    base, heard = results["FSDP2 blocks first"]
    assert torch.equal(base, heard)


def test_what_is_sharded_is_saved_whole(results: dict):
    model, x, z = built()
    given = tf.Masked(z, PRESENT)
    expected = model(x, cond=given)
    loaded = tf.load(tf.remove(model), results["adapter"])
    torch.testing.assert_close(loaded(x, cond=given), expected)


def test_a_base_in_half_precision_is_sharded_apart_from_what_listens(results: dict):
    assert results["FSDP2 bfloat16"].dtype == torch.bfloat16
    assert torch.isfinite(results["FSDP2 bfloat16"]).all()


def test_wrapped_networks_are_not_conditioned_afterwards(results: dict):
    assert "inside of DistributedDataParallel.\nCondition it, then wrap it" in results["DDP refused"]
    assert "expected a network that is not sharded yet" in results["FSDP2 refused"]
