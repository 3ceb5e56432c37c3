"""Words are learned from what they mean, in a world of two colours, before anything is done."""

import numpy as np
import pytest
import torch
from small_policy import CONFIG, observations, small

from torchfilm.systems.diffusion_policy import build, loss
from torchfilm.systems.diffusion_policy.data import Batch, Recordings, Windows
from torchfilm.systems.diffusion_policy.reasoning import Vocabulary
from torchfilm.systems.diffusion_policy.running import hold
from torchfilm.systems.diffusion_policy.understanding import (
    Asked,
    Questions,
    Understanding,
    thinned,
    understanding_loss,
)
from torchfilm.training import Draw

WORDS = Vocabulary(CONFIG.vocabulary)


def episodes(count=40):
    """One-frame episodes with a red and a blue thing, told about one of them, slowly to a place or not."""
    rng = np.random.default_rng(0)
    seen = torch.from_numpy(rng.normal(size=(count, 17)).astype(np.float32))
    red, wanted, slow = rng.integers(2, size=(3, count))
    for thing in range(2):
        seen[:, 6 + 5 * thing] = torch.from_numpy((red == thing).astype(np.float32))
        seen[:, 7 + 5 * thing] = torch.from_numpy((red != thing).astype(np.float32))
    texts = [
        f"push the {'red' if w == r else 'blue'} thing{' slowly' if s else ''}"
        for r, w, s in zip(red, wanted, slow, strict=True)
    ]
    recordings = Recordings(seen, torch.zeros(count, 2), np.arange(count + 1), {"instruction": WORDS(texts)})
    labels = {
        "which": torch.from_numpy(wanted),
        "where": torch.from_numpy(2 * slow),
        "manner": torch.from_numpy(slow),
    }
    return Questions(Windows(recordings, 2, 16), labels)


def test_colours_and_manners_are_learned_in_a_toy_world():
    torch.manual_seed(0)
    asked, module = episodes(), Understanding(build(CONFIG), {"which": 2, "manner": 2})
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for step in range(150):
        optimiser.zero_grad()
        loss = understanding_loss(module, asked(Draw(step, 0, 0.0, 40)))
        loss.value.backward()
        optimiser.step()
    module.eval()
    right = understanding_loss(module, asked(Draw(0, 1, 0.0, 40))).metrics
    assert right["which"] == 1
    assert right["where"] == 1
    assert right["manner"] == 1


@pytest.mark.parametrize("head", ["linear", "lowrank:3", "shared"])
def test_what_is_understood_stays_while_acting_is_learned(head):
    policy = small(head=head, vectors=())
    hold(policy)
    seen, told = observations(6), {"instruction": WORDS(["push the red thing"] * 6)}

    def understood():
        z = policy.reason(told, 6)
        shares = policy.attention(seen, z)
        ways = policy.ways(seen, z, *(logits.softmax(dim=1) for logits in shares))
        return [*shares, *(way.logits for way in ways)]

    before = understood()
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0)
    condition = policy.prepare(seen, told).condition.detach()
    policy.train()
    for _ in range(3):
        optimiser.zero_grad()
        batch = Batch(seen, torch.randn(6, 16, 2), told)
        loss(policy, batch).value.backward()
        optimiser.step()
    policy.eval()
    for old, new in zip(before, understood(), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)
    assert not torch.equal(policy.prepare(seen, told).condition, condition)


def test_half_of_what_is_seen_is_the_beginning_of_an_episode():
    frames = torch.arange(12.0)[:, None]
    heard = {"instruction": WORDS(["push", "the", "red"])}
    recordings = Recordings(frames, frames, np.array([0, 4, 8, 12]), heard)
    batch = Questions(Windows(recordings, 1, 1), {"which": torch.arange(3)})(Draw(0, 0, 0.0, 600))
    frame = batch.observations[:, 0, 0]
    assert torch.equal((frame // 4).long(), batch.labels["which"])
    assert float((frame % 4 == 0).double().mean()) == pytest.approx(5 / 8, abs=0.06)


def test_words_are_left_out_evenly_in_their_order_and_one_stays():
    rng = np.random.default_rng(0)
    tokens = torch.arange(1, 6).repeat(2000, 1)
    lengths = torch.full((2000,), 5)
    tokens[::2, 3:], lengths[::2] = 0, 3
    found, left = thinned((tokens, lengths), 0.3, rng)
    assert float(left[1::2].double().mean() / 5) == pytest.approx(0.7, abs=0.02)
    for row, length, most in zip(found.tolist(), left.tolist(), lengths.tolist(), strict=True):
        words = row[:length]
        assert length >= 1
        assert words == sorted(set(words) & set(range(1, most + 1)))
        assert not any(row[length:])
    same, all_of_them = thinned((tokens, lengths), 0.0, rng)
    assert torch.equal(same, tokens)
    assert torch.equal(all_of_them, lengths)
    assert thinned((tokens, lengths), 0.999, rng)[1].min() == 1


def test_the_loss_is_the_sum_of_the_cross_entropies():
    module = Understanding(small(), {"which": 2, "manner": 3})
    labels = {"which": torch.tensor([0, 1]), "manner": torch.tensor([2, 0])}
    asked = Asked(observations(2), {"instruction": WORDS(["push", "red"])}, labels)
    logits = {name: value.detach().double().numpy() for name, (value, _) in module(asked).items()}
    expected = 0.0
    for name, value in logits.items():
        for row, label in zip(value, labels[name].tolist(), strict=True):
            expected += (np.log(np.exp(row).sum()) - row[label]) / 2
    assert understanding_loss(module, asked).value.item() == pytest.approx(expected, abs=1e-5)


def test_ways_are_asked_of_someone_who_knows_thing_and_place_and_where_there_is_one():
    module, seen = Understanding(small(solids=(0.05,)), {}), observations(3)
    labels = {"which": torch.tensor([0, 1, 1]), "where": torch.tensor([2, 0, 2])}
    heard = {"instruction": WORDS(["push", "red", "the"])}
    turns = torch.tensor([[6, 0], [-1, 4], [-1, -1]])
    answers = module(Asked(seen, heard, labels, turns))
    choices = module.policy.ways(
        seen,
        module.policy.reason(heard, 3),
        torch.eye(2)[labels["which"]],
        torch.eye(3)[labels["where"]],
        torch.tensor([6, 0, 0]),
    )
    expected = understanding_loss(module, Asked(seen, heard, labels)).value
    for column, (name, choice) in enumerate(zip(("thing's way", "finger's way"), choices, strict=True)):
        logits, right = answers[name]
        torch.testing.assert_close(logits, choice.logits)
        assert torch.equal(right, turns[:, column])
        rows = right >= 0
        expected = expected + torch.nn.functional.cross_entropy(logits[rows], right[rows])
    whole = understanding_loss(module, Asked(seen, heard, labels, turns))
    torch.testing.assert_close(whole.value, expected)
    nowhere = understanding_loss(module, Asked(seen, heard, labels, torch.full((3, 2), -1)))
    torch.testing.assert_close(nowhere.value, understanding_loss(module, Asked(seen, heard, labels)).value)


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(ValueError, match="expected a policy that hears something"):
        Understanding(small(vocabulary=(), vectors=()), {"which": 2})
    flat = small(encoder="flat", relative=False)
    asked = Asked(observations(1), {}, {"which": torch.tensor([0])})
    with pytest.raises(ValueError, match="expected encoder='things', got 'flat'"):
        Understanding(flat, {"which": 2})(asked)
