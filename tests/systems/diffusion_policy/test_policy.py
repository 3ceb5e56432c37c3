"""Acting: chunks, instructions in mid-episode, arms that are told different things, and clear refusals."""

import pytest
import torch
from small_policy import small

from torchfilm.systems.diffusion_policy.policy import Policy

pytest.importorskip("diffusers")


def state(seed, count=2):
    return torch.randn(count, 17, generator=torch.Generator().manual_seed(seed))


def started(texts=("push the red thing", None), **options):
    policy = Policy(small(), **options)
    policy.reset(list(texts))
    return policy


def test_a_chunk_is_executed_from_the_action_of_the_last_observation_on():
    policy = started()
    actions = torch.stack([policy.act(state(i)) for i in range(8)])
    network, first = small(), state(0)
    random = torch.Generator().manual_seed(0)
    seen = first[:, None].expand(-1, 2, -1)
    from torchfilm.several import Masked
    from torchfilm.systems.diffusion_policy.reasoning import Vocabulary

    read = Vocabulary(network.config.vocabulary)(["push the red thing"] * 2)
    heard = {"instruction": Masked(read, torch.tensor([True, False]))}
    chunk = network.sample(seen, heard, generator=random)
    torch.testing.assert_close(actions, chunk[:, 1:9].transpose(0, 1))


def test_fewer_actions_of_a_chunk_may_be_executed():
    often, usual = started(execution=2), started()
    first, second = ([policy.act(state(i)) for i in range(3)] for policy in (often, usual))
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


def test_arms_hear_their_own_instruction_in_one_batch():
    one, other = started(["push the red thing", "slowly"]), started(["push the red thing", "blue"])
    first, second = one.act(state(0)), other.act(state(0))
    torch.testing.assert_close(first[0], second[0])
    assert not torch.allclose(first[1], second[1])


def test_rows_may_act_alone_and_a_reset_forgets():
    policy = started()
    both = policy.act(state(0))
    policy.reset(["push the red thing", None])
    alone = policy.act(state(0)[1:], torch.tensor([1]))
    assert alone.shape == (1, 2)
    assert both.shape == (2, 2)


def test_a_sensor_is_heard_from_the_next_chunk_on():
    policy, quiet = started(), started()
    policy.sense("force", torch.ones(2, 3))
    assert not torch.equal(policy.act(state(0)), quiet.act(state(0)))


def test_what_cannot_be_obeyed_is_refused_and_changes_nothing():
    policy, same = started(), started()
    for text, message in (
        ("", "expected words, got ''"),
        ("push the gred thing", "unknown word 'gred'; the nearest known words are red"),
    ):
        with pytest.raises(ValueError, match=message):
            policy.set_instruction(text)
    with pytest.raises(ValueError, match="expected vectors among \\['force'\\], got 'torque'"):
        policy.sense("torque", torch.ones(2, 3))
    with pytest.raises(ValueError, match="force: expected finite numbers"):
        policy.sense("force", torch.full((2, 3), torch.nan))
    with pytest.raises(ValueError, match="observations: expected finite numbers"):
        policy.act(torch.full((2, 17), torch.nan))
    with pytest.raises(ValueError, match=r"expected observations \(2, 17\)"):
        policy.act(torch.ones(2, 5))
    assert torch.equal(policy.act(state(0)), same.act(state(0)))


def test_acting_before_a_reset_is_refused():
    with pytest.raises(ValueError, match=r"expected reset\(\) to be called first"):
        Policy(small()).act(state(0))
