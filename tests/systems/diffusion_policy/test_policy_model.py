"""The policy: where reasoning enters, what it leaves alone, and how chunks are sampled."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_policy import CONFIG, observations, small

from torchfilm.fusion import resolve
from torchfilm.systems.diffusion_policy import Batch, PolicyConfig, build, loss, predict
from torchfilm.systems.diffusion_policy.normalisation import MinMax
from torchfilm.systems.diffusion_policy.observing import Layout, Listened, ThingsEncoder, sides
from torchfilm.systems.diffusion_policy.reasoning import Vocabulary

WORDS = Vocabulary(CONFIG.vocabulary)


def said(*texts):
    return {"instruction": WORDS(texts)}


def noise(policy, count=5):
    torch.manual_seed(8)
    x = torch.randn(count, policy.config.horizon, 2)
    return x, torch.arange(count) * 3


@pytest.mark.parametrize("listens", [("encoder",), ("condition",), ("blocks",), ("encoder", "blocks")])
@pytest.mark.parametrize("fusion", ["film", "scale", "bias", "concat", "cross_attention"])
def test_wherever_reasoning_enters_it_changes_nothing_at_the_start_and_something_later(listens, fusion):
    torch.manual_seed(0)
    alone = {"vectors": ()} if fusion == "cross_attention" else {}
    policy = build(PolicyConfig(**{**vars(CONFIG), "listens": listens, "fusion": fusion, **alone})).eval()
    with torch.no_grad():
        policy.unet.generator.head.weight.normal_(std=0.1)
    x, step = noise(policy, 2)
    o = observations(2)

    def prediction(texts):
        return policy.denoise(x, step, policy.prepare(o, said(*texts)))

    first = prediction(["push the red", "slowly"])
    assert torch.equal(first, prediction(["the thing", "blue blue"]))
    with torch.no_grad():
        for parameter in policy.listeners.parameters():
            parameter.normal_(std=0.3)
    changed = prediction(["push the red", "slowly"])
    other = prediction(["push the red", "blue"])
    torch.testing.assert_close(changed[0], other[0])
    assert (changed[1] - other[1]).abs().max() > 1e-4
    assert not torch.allclose(changed, first)


def test_a_condition_that_lacks_is_a_learned_null_for_that_sample_alone():
    policy, o = small(), observations(3)
    force = torch.randn(3, 3)
    both = policy.reason(said("push", "the red", "slowly") | {"force": force}, 3)
    without = policy.reason({"force": force}, 3)
    assert torch.equal(both[:, 7:], without[:, 7:])
    assert torch.equal(without[0, :7], without[2, :7])
    assert not torch.allclose(both[:, :7], without[:, :7])
    assert policy.reason({}, 3).shape == (3, 14)
    assert policy.prepare(o, {}).condition.shape[0] == 3


def test_words_are_read_one_by_one_for_cross_attention_and_padding_is_not():
    policy = small(fusion="cross_attention", vectors=())
    tokens, mask = policy.reason(said("push the red thing", "push"), 2)
    assert tokens.shape == (2, 4, 7)
    assert mask.tolist() == [[True] * 4, [True, False, False, False]]
    o = observations(2)
    together = policy.prepare(o, said("push the red thing", "push")).condition
    alone = policy.prepare(o[1:], said("push")).condition
    torch.testing.assert_close(together[1:], alone)
    assert policy.prepare(o, {}).condition.shape[0] == 2
    with pytest.raises(ValueError, match=r"reads word by word, got 6 words and the vectors \['force'\]"):
        small(fusion="cross_attention")


@pytest.mark.parametrize("fusion", ["concat", "cross_attention"])
def test_an_alternative_of_matched_size_adds_as_many_parameters_as_film(fusion):
    def added(**changes):
        policy = small(vectors=(), widths=(32, 64), encoder_width=48, reasoning=32, **changes)
        return sum(p.numel() for p in policy.listeners.parameters())

    assert added(fusion=fusion, matched=True) == pytest.approx(added(), rel=0.05)
    assert added(fusion=fusion) != pytest.approx(added(), rel=0.05)


def test_a_call_is_a_denoising_after_preparing():
    policy, o = small(), observations(2)
    x, step = noise(policy, 2)
    heard = said("push", "the red")
    assert torch.equal(policy(x, step, o, heard), policy.denoise(x, step, policy.prepare(o, heard)))


def test_things_are_read_alike_in_whatever_order_they_come():
    policy, o = small(), observations(4)
    swapped = o.clone()
    swapped[..., 3:8], swapped[..., 8:13] = o[..., 8:13], o[..., 3:8]
    z = policy.reason(said("push", "red", "the blue", "slowly"), 4)
    first, second = (policy.look(seen, policy.listen(z)).condition for seen in (o, swapped))
    torch.testing.assert_close(first, second)


def test_relative_actions_move_with_the_finger():
    policy = small()
    o, actions = observations(3), torch.randn(3, 16, 2)
    moved, by = o.clone(), torch.tensor([0.3, -0.2])
    moved[:, -1, 1:3] += by
    torch.testing.assert_close(policy.scaled_actions(actions, o), policy.scaled_actions(actions + by, moved))


def meaning(encoder, spot):
    """Let an encoder mean all things alike, and one spot."""
    with torch.no_grad():
        encoder.score.weight.zero_()
        encoder.spot_score.weight.fill_(1.0)
        encoder.spot.weight.fill_(-1.0)[spot] = 20.0


def units(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def taken(choice, best):
    logits, directions = (value.double().detach() for value in choice)
    shares = torch.eye(logits.shape[1]).double()[logits.argmax(1)] if best else logits.softmax(1)
    return units((shares[..., None] * directions).sum(1).numpy())


@pytest.mark.parametrize(("learning", "held"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("spot", [0, 2, 3])
def test_the_finger_heads_for_a_thing_or_for_close_behind_one_that_has_to_go_somewhere(spot, learning, held):
    encoder, o = small(landmarks=((0.2, -0.4),)).encoder, observations(4)
    meaning(encoder, spot)
    encoder.train(learning).held = held
    best = held or not learning
    silent = Listened(resolve("film"), None)
    half, here = torch.full((4, 2), 0.5), torch.eye(4)[[spot] * 4]
    pushed, moved = encoder.ways(o, half, here, silent)
    np.testing.assert_allclose(
        encoder(o, o, silent).heading.detach().numpy(), taken(moved, best).astype(np.float32), atol=1e-4
    )
    rows = o[:, -1].double().numpy()
    finger, thing = rows[:, 1:3], (rows[:, 3:5] + rows[:, 8:10]) / 2
    along = 0 if spot == 0 else taken(pushed, best)
    straight = units(thing - 0.0375 * along - finger)
    np.testing.assert_allclose(moved.directions[:, 0].detach().numpy(), straight, atol=1e-4)


@pytest.mark.parametrize("spot", [0, 1, 3])
def test_things_and_fingers_have_ways_round_everything_but_themselves(spot: int):
    encoder, o = small(landmarks=((0.2, -0.4),), solids=(0.05,)).encoder, observations(4)
    o[..., [5, 10]] = torch.rand(4, 2, 2, generator=torch.Generator().manual_seed(1)) * 0.1  # radii
    turn = torch.tensor([0, 3, 6, 1])
    pushed, moved = encoder.ways(
        o, torch.eye(2)[[1] * 4], torch.eye(4)[[spot] * 4], Listened(resolve("film"), None), turn
    )
    assert pushed.logits.shape == moved.logits.shape == (4, 1 + 2 * 3)
    assert (pushed.logits.softmax(1)[:, [2, 5]] < 1e-4).all()  # a thing does not go round itself
    assert bool((moved.logits.softmax(1)[:, [2, 5]] < 1e-4).all()) == (spot == 0)  # a finger that pushes may
    row = o[:, -1].double().numpy()
    finger, thing, obstacle = row[:, 1:3], row[:, 8:10], row[:, 13:15]
    goal = {0: thing, 1: obstacle, 3: np.array([[0.2, -0.4]] * 4)}[spot]
    along = pushed.directions[torch.arange(4), turn].double().numpy()
    begin = thing if spot == 0 else thing - 0.075 * along
    for choice, start, end, radius in ((pushed, thing, goal, row[:, 10]), (moved, finger, begin, 0.012)):
        if start is goal:
            continue
        apart = np.linalg.norm(obstacle - start, axis=-1)
        beyond = np.linalg.norm(obstacle - end, axis=-1)
        held = np.minimum(0.05 + 0.018 + radius, 0.96 * np.minimum(apart, beyond))
        angle = np.arcsin(1.02 * held / apart)
        there = (obstacle - start) / apart[:, None]
        across = np.stack([-there[:, 1], there[:, 0]], axis=-1)
        for index, sign in ((3, 1), (6, -1)):
            expected = np.cos(angle)[:, None] * there + sign * np.sin(angle)[:, None] * across
            np.testing.assert_allclose(choice.directions[:, index].numpy(), expected, atol=1e-4)


def test_more_solids_than_positions_are_refused():
    with pytest.raises(ValueError, match="expected radii for at most 2 further positions, got 3"):
        small(solids=(0.1, 0.1, 0.1))


def test_looks_that_are_held_learn_nothing_from_acting():
    policy, o = small().train(), observations(3)
    encoder = policy.encoder
    looks = [encoder.score.weight, encoder.spot.weight, encoder.thing_0.weight]
    looks += [encoder.turning.score.weight]
    for held in (False, True):
        encoder.held = held
        condition = policy.prepare(o, said("push", "the red", "slowly")).condition
        found = torch.autograd.grad(condition.square().sum(), looks, allow_unused=True)
        assert [grad is None for grad in found] == [held] * 4


def test_what_is_beside_a_way_is_seen_finely_from_the_finger_and_from_the_thing():
    rng = np.random.default_rng(0)
    ways, spots, thing = rng.normal(size=(4, 3, 2)), rng.normal(size=(4, 5, 2)), rng.normal(size=(4, 2))
    found = sides(*map(torch.from_numpy, (ways, spots, thing))).numpy()
    assert found.shape == (4, 5, 14)
    for b in range(4):
        for n, spot in enumerate(spots[b]):
            along = [way @ spot for way in ways[b]] + [way[0] * spot[1] - way[1] * spot[0] for way in ways[b]]
            way, away = ways[b, 1], spot - thing[b]
            fine = [*along, way @ away, way[0] * away[1] - way[1] * away[0]]
            np.testing.assert_allclose(found[b, n], [*along, *np.tanh(np.array(fine) * 5)])


def test_a_goal_without_a_way_is_taken_to_lie_along_the_first_axis():
    encoder, o = small(landmarks=((0.0, 0.0),)).encoder, torch.zeros(1, 2, 17)
    seen = encoder(o, o, Listened(resolve("film"), None))
    assert float(seen.heading.norm()) == pytest.approx(1)
    assert seen.features.isfinite().all()


def test_the_network_acts_along_the_heading():
    policy, o = small(), observations(3)
    x, step = noise(policy, 3)
    prepared = policy.prepare(o, said("push the red"))
    ahead = prepared.heading[:, None].expand(-1, 16, -1)
    torch.testing.assert_close(prepared.turned(ahead), torch.tensor([1.0, 0.0]).expand(3, 16, 2))
    torch.testing.assert_close(prepared.turned(prepared.turned(x), back=True), x)
    around = replace(prepared, heading=-prepared.heading)
    torch.testing.assert_close(policy.denoise(-x, step, around), -policy.denoise(x, step, prepared))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_sampling_in_tables_is_sampling_step_by_step(sampler: str, prediction: str):
    pytest.importorskip("diffusers")
    from torchfilm.systems.diffusion_policy.schedule import sampling_schedule

    policy, o = small(prediction=prediction, sampler=sampler), observations(2)
    heard = said("push the red thing", "slowly")
    found = policy.sample(o, heard, generator=torch.Generator().manual_seed(4))
    schedule = sampling_schedule(20, prediction, sampler, 4)
    random = torch.Generator().manual_seed(4)
    x = torch.randn(2, 16, 2, generator=random)
    with torch.no_grad():
        for t in schedule.timesteps:
            predicted = policy.denoise(x, t.expand(2), policy.prepare(o, heard))
            x = schedule.step(predicted, t, x, generator=random).prev_sample
    expected = policy.action_scale.inverse(x) + o[:, -1:, 1:3]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_table_of_steps_is_made_once_and_anew_when_weights_change():
    pytest.importorskip("diffusers")
    policy, o = small(), observations(2)

    def chunk(**options):
        return policy.sample(o, {}, generator=torch.Generator().manual_seed(4), **options)

    first = chunk()
    kept = policy._table[1]
    assert torch.equal(chunk(), first)
    assert policy._table[1] is kept
    assert chunk(steps=5).shape == first.shape
    with torch.no_grad():
        policy.unet.step_encoder[1].weight.mul_(3)
    fresh = small()
    fresh.load_state_dict(policy.state_dict())
    expected = fresh.sample(o, {}, generator=torch.Generator().manual_seed(4))
    assert torch.equal(chunk(), expected)
    assert not torch.equal(expected, first)


def test_guidance_of_one_listens_as_trained_and_of_zero_not_at_all():
    pytest.importorskip("diffusers")
    policy, o = small(), observations(2)

    def chunk(heard, guidance):
        return policy.sample(o, heard, guidance=guidance, generator=torch.Generator().manual_seed(4))

    torch.testing.assert_close(chunk(said("push", "red"), 0.0), chunk({}, 1.0), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(chunk(said("push", "red"), 2.0), chunk(said("push", "red"), 1.0))


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_the_loss_is_that_of_the_schedulers_noise(prediction: str):
    pytest.importorskip("diffusers")
    policy = small(prediction=prediction)
    batch = Batch(observations(5), torch.randn(5, 16, 2) * 0.1, said(*["push the red"] * 5))
    torch.manual_seed(2)
    found = loss(policy, batch)
    torch.manual_seed(2)
    clean = policy.scaled_actions(batch.actions, batch.observations)
    eps, step = torch.randn_like(clean), torch.randint(20, (5,))
    times = np.arange(21) / 20
    bar = np.cos((times + 0.008) / 1.008 * np.pi / 2) ** 2
    alphas = np.cumprod(np.maximum(bar[1:] / bar[:-1], 1 - 0.999))
    a = torch.tensor(alphas[step.numpy()], dtype=torch.float32)[:, None, None]
    noisy = a.sqrt() * clean + (1 - a).sqrt() * eps
    y = policy.denoise(noisy, step, policy.prepare(batch.observations, batch.reasoning))
    expected = (y - (eps if prediction == "epsilon" else clean)).square().mean()
    torch.testing.assert_close(found.value, expected, rtol=1e-4, atol=1e-6)
    assert found.items == 5


def test_predict_gives_chunks_and_the_mode_back():
    pytest.importorskip("diffusers")
    policy = small().train()
    chunk = predict(policy, Batch(observations(2), torch.empty(2, 0, 2), said("push", "red")))
    assert chunk.shape == (2, 16, 2)
    assert policy.training


def test_numbers_are_scaled_by_least_and_largest_and_back():
    scale = MinMax(3)
    values = torch.tensor([[0.0, 5.0, 7.0], [4.0, -1.0, 7.0], [1.0, 2.0, 7.0]])
    scale.fit(values)
    y = scale(values)
    torch.testing.assert_close(y, torch.tensor([[-1.0, 1.0, 0.0], [1.0, -1.0, 0.0], [-0.5, 0.0, 0.0]]))
    torch.testing.assert_close(scale.inverse(y), values)
    assert {"low", "high"} == set(scale.state_dict())


def test_each_step_of_a_chunk_can_have_its_own_range():
    scale = MinMax(3, 2)
    near_to_far = torch.tensor([1.0, 2.0, 10.0])[:, None] * torch.tensor([[-1.0, -1.0], [1.0, 1.0]])[:, None]
    scale.fit(near_to_far)
    torch.testing.assert_close(scale(near_to_far[1:] / 2), torch.full((1, 3, 2), 0.5))
    with pytest.raises(ValueError, match=r"expected rows of \(3, 2\) numbers, got \(4, 2\)"):
        scale.fit(torch.ones(4, 2))


def test_ranges_of_the_wrong_size_or_not_finite_are_refused():
    with pytest.raises(ValueError, match=r"expected rows of \(2,\) numbers, got \(3, 5\)"):
        MinMax(2).fit(torch.ones(3, 5))
    with pytest.raises(ValueError, match="expected finite numbers, got 1 that are not"):
        MinMax(2).fit(torch.tensor([[1.0, torch.nan]]))


def test_observations_that_are_not_finite_or_of_another_size_are_refused():
    policy, o = small(), observations(2)
    with pytest.raises(ValueError, match=r"expected observations \(batch, 2, 17\), got \(2, 2, 5\)"):
        policy.prepare(o[..., :5], {})
    o[1, 0, 3] = torch.inf
    with pytest.raises(ValueError, match="expected finite observations, got 1 numbers"):
        policy.prepare(o, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"execution": 16}, "expected an execution of 1 to horizon - observations \\+ 1 = 15, got 16"),
        ({"encoder": "none"}, "expected an encoder that can listen"),
        ({"things": None}, "expected `things`, the layout of the state"),
        (
            {"action": 3},
            "expected actions of 2 numbers, .* for the encoder .things., got 3",
        ),
    ],
)
def test_configs_that_cannot_be_meant_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        PolicyConfig(**{**vars(CONFIG), **changes})


@pytest.mark.parametrize("size", [11, 14])
def test_a_layout_that_does_not_fit_is_refused(size: int):
    with pytest.raises(ValueError, match=f"expected 13 numbers for Layout.*, then pairs, got {size}"):
        ThingsEncoder(Layout(3, 2, 5), 2, size, 8)
