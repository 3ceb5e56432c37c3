"""Acting: chunks, instructions in mid-episode, arms that are told different things, and clear refusals."""

import numpy as np
import pytest
import torch
from small_policy import small

from torchfilm.blocks.packing import PackedConv1d
from torchfilm.several import Masked
from torchfilm.systems.diffusion_policy.policy import Policy
from torchfilm.systems.diffusion_policy.reasoning import Vocabulary

pytest.importorskip("diffusers")

TOLD = ["push the red thing", None]


def state(seed, count=2):
    return torch.randn(count, 17, generator=torch.Generator().manual_seed(seed))


def started(texts=TOLD, network=None, **options):
    policy = Policy(small() if network is None else network, **options)
    policy.reset(list(texts))
    return policy


def acted(policy, steps, rows=None, first=0):
    """The actions [steps, rows, 2] of some steps."""
    seen = [state(i) if rows is None else state(i)[rows] for i in range(first, first + steps)]
    return torch.stack([policy.act(one, rows) for one in seen])


def noise(seed, row, number):
    drawn = np.random.SeedSequence((seed, row, number)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(drawn[0]))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_chunk_is_executed_from_the_action_of_the_last_observation_on(sampler):
    network = small(sampler=sampler)
    actions = acted(started(network=network, seed=5), 9)
    read = Vocabulary(network.config.vocabulary)(["push the red thing"] * 2)
    heard = {"instruction": Masked(read, torch.tensor([True, False]))}
    for number, seen in enumerate(([state(0)] * 2, [state(7), state(8)])):
        random = [noise(5, row, number) for row in range(2)]
        chunk = network.sample(torch.stack(seen, dim=1), heard, generator=random)
        found = actions[8 * number : 8 * number + 8]
        torch.testing.assert_close(found, chunk[:, 1 : 1 + len(found)].transpose(0, 1))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_same_episode_again_is_the_same_to_the_bit(sampler):
    policy = started(network=small(sampler=sampler), execution=3)
    first = acted(policy, 7)
    policy.reset(TOLD)
    assert torch.equal(acted(policy, 7), first)
    assert not torch.equal(acted(started(network=small(sampler=sampler), execution=3, seed=1), 7), first)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_an_arm_does_in_company_what_it_does_alone(sampler):
    network = small(sampler=sampler).double()
    together = acted(started(network=network), 10)
    for row in (0, 1):
        policy = started(network=network)
        alone = acted(policy, 10, torch.tensor([row]))
        torch.testing.assert_close(alone[:, 0], together[:, row], rtol=0, atol=1e-9)
        late = acted(policy, 10, torch.tensor([1 - row]))
        torch.testing.assert_close(late[:, 0], together[:, 1 - row], rtol=0, atol=1e-9)
    single = Policy(network)
    single.reset(TOLD[:1])
    torch.testing.assert_close(
        torch.stack([single.act(state(i)[:1]) for i in range(10)])[:, 0], together[:, 0], rtol=0, atol=1e-9
    )


def test_arms_and_chunks_have_noise_of_their_own():
    policy = started([None, None])
    same = state(0)[:1].expand(2, -1)
    assert not torch.allclose(*policy.act(same))
    still = started([None, None], execution=1)
    assert not torch.allclose(still.act(same), still.act(same))


def test_fewer_actions_of_a_chunk_may_be_executed():
    often, usual = started(execution=2), started()
    first, second = acted(often, 3), acted(usual, 3)
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[2], second[2])
    with pytest.raises(ValueError, match=r"expected an execution of 1 to .* = 15, got 16"):
        started(execution=16)


def test_a_new_instruction_is_obeyed_at_once_with_flush_and_after_the_chunk_without():
    for flush in (True, False):
        told, untold = started(), started()
        for i in range(3):
            assert torch.equal(told.act(state(i)), untold.act(state(i)))
        told.set_instruction("slowly", flush=flush)
        changed = []
        for i in range(3, 9):
            changed.append(not torch.equal(told.act(state(i))[0], untold.act(state(i))[0]))
        assert changed == ([True] * 6 if flush else [False] * 5 + [True])


def test_a_new_instruction_is_the_one_it_would_have_been_told_first():
    told, first = started(execution=1), started(["slowly", "blue"], execution=1)
    told.set_instruction("slowly", row=0)
    told.set_instruction("blue", row=1)
    assert torch.equal(acted(told, 2), acted(first, 2))


def test_arms_hear_their_own_instruction_in_one_batch():
    one, other = started(["push the red thing", "slowly"]), started(["push the red thing", "blue"])
    first, second = one.act(state(0)), other.act(state(0))
    torch.testing.assert_close(first[0], second[0])
    assert not torch.allclose(first[1], second[1])


def test_a_reset_forgets_what_was_seen_planned_and_felt():
    policy = started()
    policy.sense("force", torch.ones(2, 3))
    before = acted(policy, 3)
    policy.reset(TOLD)
    fresh = started()
    assert torch.equal(acted(policy, 9, first=20), acted(fresh, 9, first=20))
    assert not torch.equal(before[0], acted(started(), 1)[0])


def test_one_arm_begins_anew_and_the_other_goes_on():
    policy, kept = started(), started()
    for one in (policy, kept):
        one.sense("force", torch.ones(2, 3))
        acted(one, 3)
    policy.reset(["slowly"], rows=[1])
    found, expected = acted(policy, 9, first=3), acted(kept, 9, first=3)
    torch.testing.assert_close(found[:, 0], expected[:, 0])
    new = started(["push the red thing", "slowly"])
    torch.testing.assert_close(found[:, 1], acted(new, 9, first=3)[:, 1])
    mask = np.array([False, True])
    policy.reset(["slowly"], {"force": torch.ones(1, 3)}, rows=mask)
    assert not torch.allclose(acted(policy, 1, first=3)[0, 1], found[0, 1])


def test_arrays_are_taken_as_tensors_are():
    policy, same = started(), started()
    policy.sense("force", np.ones((2, 3)))
    same.sense("force", torch.ones(2, 3))
    assert torch.equal(policy.act(state(0).double().numpy()), same.act(state(0)))
    assert torch.equal(
        policy.act(state(1)[1:].numpy(), np.array([1])), same.act(state(1)[1:], torch.tensor([1]))
    )


def test_it_acts_in_the_precision_of_its_network():
    exact = started(network=small().double()).act(state(0))
    assert exact.dtype == torch.float64
    torch.testing.assert_close(started().act(state(0)), exact.float(), rtol=1e-4, atol=1e-5)


def test_a_sensor_is_heard_from_the_next_chunk_on_and_may_lack():
    policy, quiet = started(execution=1), started(execution=1)
    assert torch.equal(policy.act(state(0)), quiet.act(state(0)))
    policy.sense(
        "force", Masked(torch.tensor([[1.0, 2.0, 3.0], [torch.nan] * 3]), torch.tensor([True, False]))
    )
    felt, unfelt = policy.act(state(1)), quiet.act(state(1))
    assert not torch.allclose(felt[0], unfelt[0])
    torch.testing.assert_close(felt[1], unfelt[1])
    policy.sense("force", None)
    torch.testing.assert_close(policy.act(state(2)), quiet.act(state(2)))
    policy.reset(TOLD, {"force": None})
    quiet.reset(TOLD)
    assert torch.equal(policy.act(state(0)), quiet.act(state(0)))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_what_is_heard_is_made_once_and_anew_when_it_changes(guidance):
    network, made = small(), []
    for name, module in (("words", network.reasoning), *network.listeners.items()):
        module.register_forward_hook(lambda *_, name=name: made.append(name))
    policy, once = started(network=network, execution=1, guidance=guidance), int(guidance)
    acted(policy, 4)
    assert {name: made.count(name) for name in set(made)} == dict.fromkeys(
        ("words", "encoder", "blocks"), once
    )
    for change in (lambda: policy.set_instruction("blue"), lambda: policy.sense("force", torch.ones(2, 3))):
        made.clear()
        change()
        acted(policy, 3)
        assert {made.count(name) for name in ("words", "encoder", "blocks")} == {once}


def test_wide_convolutions_are_packed_and_nothing_else_changes():
    wide, plain = (small(widths=(8, 256)) for _ in range(2))
    packed, unpacked = started(network=wide), started(network=plain, pack=False)
    kinds = [[isinstance(m, PackedConv1d) for m in net.unet.modules()] for net in (wide, plain)]
    assert any(kinds[0])
    assert not any(kinds[1])
    torch.testing.assert_close(packed.act(state(0)), unpacked.act(state(0)), rtol=0, atol=1e-6)
    assert any(m._packed is not None for m in wide.unet.modules() if isinstance(m, PackedConv1d))
    assert list(wide.state_dict()) == list(plain.state_dict())


REFUSED = {
    "no words": (lambda p: p.set_instruction(""), "expected words, got ''"),
    "unknown word": (
        lambda p: p.set_instruction("push the gred thing"),
        "'gred'; the nearest known words are red",
    ),
    "unknown vector": (lambda p: p.sense("torque", torch.ones(2, 3)), r"among \['force'\], got 'torque'"),
    "not finite": (
        lambda p: p.sense("force", torch.full((2, 3), torch.nan)),
        "force: expected finite numbers",
    ),
    "not finite though present": (
        lambda p: p.sense("force", Masked(torch.full((2, 3), torch.nan), torch.tensor([True, False]))),
        "force: expected finite numbers, got 3 that are not, of 3",
    ),
    "other size": (lambda p: p.sense("force", torch.ones(2, 5)), r"'force' as \(2, 3\), .*, got \(2, 5\)"),
    "too few rows": (lambda p: p.sense("force", torch.ones(1, 3)), r"'force' as \(2, 3\), .*, got \(1, 3\)"),
    "mask": (
        lambda p: p.sense("force", Masked(torch.ones(2, 3), torch.ones(3, dtype=torch.bool))),
        r"'force' present as 2 booleans, .*, got torch.bool \(3,\)",
    ),
    "rows of a reset": (
        lambda p: p.reset(TOLD, {"force": torch.ones(1, 3)}),
        r"'force' as \(2, 3\), .*, got \(1, 3\)",
    ),
    "row beyond": (
        lambda p: p.set_instruction("push", row=5),
        r"rows of arms from 0 to 1, each once, got \[5\]",
    ),
    "row before": (lambda p: p.set_instruction("push", row=-1), r"from 0 to 1, each once, got \[-1\]"),
    "row twice": (lambda p: p.act(state(0), [1, 1]), r"each once, got \[1, 1\]"),
    "letters": (lambda p: p.reset("push"), "expected a list of instructions, .*, got 'push'"),
    "no texts": (lambda p: p.reset([3, None]), r"expected a list of instructions, .*, got \[3, None\]"),
    "no arms": (lambda p: p.reset([]), "an instruction, and a scene if any, for each arm, got 0"),
    "scenes": (
        lambda p: p.reset(TOLD, scenes=["a"]),
        r"for each arm, got 2 instructions and the scenes \['a'\]",
    ),
    "instructions of rows": (lambda p: p.reset(TOLD, rows=[1]), "expected 1 instructions, .*, got 2"),
    "observations": (
        lambda p: p.act(torch.full((2, 17), torch.nan)),
        "observations: expected finite numbers",
    ),
    "size seen": (lambda p: p.act(torch.ones(2, 5)), r"expected observations \(2, 17\).*, got \(2, 5\)"),
    "one seen": (lambda p: p.act(torch.ones(17)), r"got \(17,\)\. Of one arm give observation\[None\]"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_obeyed_is_refused_and_changes_nothing(kind):
    policy, same = started(), started()
    for one in (policy, same):
        one.sense("force", torch.ones(2, 3))
        one.act(state(0))
    call, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        call(policy)
    assert torch.equal(acted(policy, 9, first=1), acted(same, 9, first=1))


@pytest.mark.parametrize(
    "call",
    [
        lambda p: p.act(state(0)),
        lambda p: p.sense("force", torch.ones(2, 3)),
        lambda p: p.set_instruction("push"),
        lambda p: p.reset(["push"], rows=[0]),
    ],
)
def test_nothing_is_done_before_a_reset(call):
    with pytest.raises(ValueError, match=r"expected reset\(\) to be called first"):
        call(Policy(small()))


def test_a_seed_below_zero_is_refused():
    with pytest.raises(ValueError, match="expected a seed of 0 or more, got -1"):
        Policy(small(), seed=-1)
