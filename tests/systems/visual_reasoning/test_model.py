"""Laws of the FiLM network: the paper's sizes, no dependence on neighbours, ablations do as they say."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from torchfilm import Modulation
from torchfilm.blocks.vision import coordinate_maps
from torchfilm.systems.visual_reasoning.model import Reasoned, ReasonerConfig, VisualReasoner

SMALL = ReasonerConfig(
    vocabulary=13,
    word_dim=3,
    encoder_width=5,
    input="maps",
    input_channels=4,
    input_height=6,
    input_width=9,
    blocks=3,
    channels=7,
    dilations=(1, 2),
    projection=8,
    hidden=10,
    answers=11,
)
PIXELS = replace(SMALL, input="pixels", input_channels=3, input_height=32, input_width=48)


def count(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)


def network(**changes) -> VisualReasoner:
    """A small network in float64 whose BatchNorm statistics are not their start."""
    torch.manual_seed(1)
    model = VisualReasoner(replace(SMALL, **changes)).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.running_mean = torch.randn_like(module.running_mean)
            module.running_var = torch.rand_like(module.running_var) + 0.5
    return model.eval()


def questions(batch: int = 5, time: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, time + 1, (batch,), generator=generator)
    return torch.randint(0, 13, (batch, time), generator=generator), lengths


def maps(scenes: int = 5, config: ReasonerConfig = SMALL) -> Tensor:
    size = (scenes, config.input_channels, config.input_height, config.input_width)
    return torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [(1, 1_974_944), (2, 2_139_296), (4, 2_468_000), (5, 2_632_352), (12, 3_782_816)],
)
def test_the_paper_network_has_the_parameters_of_the_original(blocks, expected):
    with torch.device("meta"):
        model = VisualReasoner(ReasonerConfig(blocks=blocks))
    assert count(model.network_parameters()) == expected


def test_the_paper_model_has_the_parameters_of_the_original_part_by_part():
    with torch.device("meta"):
        model = VisualReasoner(ReasonerConfig())
    assert count(model.encoder.embedding.parameters()) == 18_600
    assert count(model.encoder.rnn.parameters()) == 52_813_824
    assert count(model.generator.parameters()) == 4_195_328
    assert count(model.generator_parameters()) == 57_027_752
    assert count(model.stem.parameters()) == 1_182_336
    assert [count(block.parameters()) for block in model.blocks.values()] == [164_352] * 4
    assert count(model.classifier.parameters()) == 628_256
    assert count(model.parameters()) == 59_495_752


def test_the_pixel_network_has_the_parameters_of_the_original():
    with torch.device("meta"):
        model = VisualReasoner(
            ReasonerConfig(input="pixels", input_channels=3, input_height=224, input_width=224)
        )
    assert count(model.stem.parameters()) == 794_112
    assert count(model.network_parameters()) == 2_079_776
    assert model.config.grid == (14, 14)


def test_generator_and_network_split_all_parameters():
    model = network()
    parts = [*model.generator_parameters(), *model.network_parameters()]
    assert {id(p) for p in parts} == {id(p) for p in model.parameters()}
    assert len(parts) == len(list(model.parameters()))


def test_one_scene_for_many_questions_equals_the_scene_repeated():
    rows = torch.tensor([2, 0, 0, 1, 2])
    for placement in ("before_conv1", "after_conv2", "after_batchnorm", "after_relu2", "after_residual"):
        for filmed in (None, (2,), ()):
            model = network(placement=placement, filmed_blocks=filmed)
            shared = model(maps(3), *questions(), rows)
            torch.testing.assert_close(shared, model(maps(3)[rows], *questions()))


def test_training_statistics_are_the_same_for_shared_and_repeated_scenes():
    rows = torch.tensor([0, 0, 1, 1, 2, 2])
    shared, repeated = network().train(), network().train()
    a = shared(maps(3), *questions(6), rows)
    b = repeated(maps(3)[rows], *questions(6))
    torch.testing.assert_close(a, b)
    a.square().sum().backward()
    b.square().sum().backward()
    for (name, p), q in zip(shared.named_parameters(), repeated.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_an_answer_depends_on_its_own_question_only():
    model = network()
    tokens, lengths = questions()
    logits = model(maps(), tokens, lengths)
    tokens[3, : lengths[3]] = (tokens[3, : lengths[3]] + 1) % 13
    moved = (model(maps(), tokens, lengths) - logits).abs().amax(dim=1)
    assert moved[3] > 1e-3
    assert moved[[0, 1, 2, 4]].max() < 1e-12


def test_an_answer_depends_on_its_own_scene_only():
    model = network()
    images = maps()
    logits = model(images, *questions())
    images[1] += 1
    moved = (model(images, *questions()) - logits).abs().amax(dim=1)
    assert moved[1] > 1e-3
    assert moved[[0, 2, 3, 4]].max() < 1e-12


def test_padding_does_not_matter():
    model = network()
    tokens, lengths = questions()
    wider = torch.cat([tokens, torch.full((5, 4), 12)], dim=1)
    assert torch.equal(model.encode(tokens, lengths), model.encode(wider, lengths))


def test_the_steps_together_are_the_forward():
    model = network()
    features = model.features(maps())
    reasoned = model.reason(features, model.modulations(model.encode(*questions())))
    assert torch.equal(reasoned.logits, model(maps(), *questions()))
    assert reasoned.pooled_from.shape == (5, 8, 6, 9)
    assert reasoned.pooled_from.min() >= 0


def test_sites_are_the_blocks_in_order():
    model = network(blocks=4, filmed_blocks=(4, 1))
    assert list(model.modulations(torch.rand(2, 5).double())) == ["block1", "block4"]


def test_a_block_that_does_not_listen_has_an_affine_of_its_own():
    model = network(filmed_blocks=(2,))
    assert [block.norm.affine for block in model.blocks.values()] == [True, False, True]


def test_without_film_the_question_does_not_matter():
    model = network(filmed_blocks=())
    tokens, lengths = questions()
    assert torch.equal(model(maps(), tokens, lengths), model(maps(), (tokens + 1) % 13, lengths))
    assert list(model.parameters())


@pytest.mark.parametrize(
    ("changes", "low", "high"),
    [
        ({"emit": ("beta",)}, 1.0, 1.0),
        ({"bound": "sigmoid"}, 0.0, 1.0),
        ({"bound": "tanh"}, -1.0, 1.0),
        ({"bound": "exp"}, 0.0, float("inf")),
    ],
)
def test_gamma_is_where_the_ablation_wants_it(changes, low, high):
    for modulation in network(**changes).modulations(20 * torch.randn(50, 5).double()).values():
        assert low <= modulation.gamma.min()
        assert modulation.gamma.max() <= high
        assert modulation.beta.std() > 0


def test_gamma_only_leaves_beta_at_zero():
    for modulation in network(emit=("gamma",)).modulations(torch.rand(2, 5).double()).values():
        assert modulation.beta.abs().max() == 0
        assert modulation.gamma.std() > 0


def test_unbounded_gamma_is_one_plus_what_the_head_says():
    model = network()
    z = torch.rand(2, 5).double()
    raw = model.generator.head(z).view(2, 3, 2, 7)
    for index, modulation in enumerate(model.modulations(z).values()):
        torch.testing.assert_close(modulation.gamma, 1 + raw[:, index, 0])
        torch.testing.assert_close(modulation.beta, raw[:, index, 1])


def test_the_network_computes_what_the_paper_says():
    """The whole network in eval mode against the equations, with plain convolutions and concatenation."""
    model = network()
    modulations = model.modulations(model.encode(*questions()))
    places = coordinate_maps(6, 9).double().expand(5, -1, -1, -1)

    def normal(x, norm):
        shape = (1, -1, 1, 1) if x.ndim == 4 else (1, -1)
        y = (x - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + norm.eps).sqrt()
        return y if norm.weight is None else y * norm.weight.view(shape) + norm.bias.view(shape)

    x = normal(model.stem.conv.conv(torch.cat([maps(), places], 1)), model.stem.norm).clamp(min=0)
    for name, block in model.blocks.items():
        x = block.project.conv(torch.cat([x, places], 1)).clamp(min=0)
        m = modulations[name]
        h = normal(block.conv.conv(x), block.norm) * m.gamma[:, :, None, None] + m.beta[:, :, None, None]
        x = x + h.clamp(min=0)
    head = model.classifier
    x = normal(head.project.conv(torch.cat([x, places], 1)), head.project_norm).clamp(min=0)
    x = x.flatten(2).max(2).values
    x = normal(head.hidden(x), head.hidden_norm).clamp(min=0)
    torch.testing.assert_close(model(maps(), *questions()), head.answer(x))


@pytest.mark.parametrize("pooling", ["mean", "max_and_mean"])
def test_pooling_takes_the_maximum_and_the_mean_times_the_root_of_the_cells(pooling):
    model = network(pooling=pooling)
    head = model.classifier
    reasoned: Reasoned = model.reason(model.features(maps()), model.modulations(torch.rand(5, 5).double()))
    flat = reasoned.pooled_from.flatten(2)
    mean = flat.sum(2) / flat.shape[2] ** 0.5
    pooled = mean if pooling == "mean" else torch.cat([flat.max(2).values, mean], dim=1)
    torch.testing.assert_close(reasoned.logits, head.answer(head.hidden_norm(head.hidden(pooled)).relu()))


def test_coordinates_enter_only_where_the_config_says():
    def inputs(**changes):
        model = network(**changes)
        convs = [model.stem.conv, *(b.project for b in model.blocks.values()), model.classifier.project]
        return [conv.conv.in_channels for conv in convs]

    assert inputs() == [6, 9, 9, 9, 9]
    assert inputs(coordinates_in_stem=False) == [4, 9, 9, 9, 9]
    assert inputs(coordinates_in_blocks=False) == [6, 7, 7, 7, 9]
    assert inputs(coordinates_in_classifier=False) == [6, 9, 9, 9, 7]


def test_without_coordinates_and_wide_kernels_positions_do_not_matter():
    """The paper's ablation of 1x1 convolutions only: a shuffled picture gets the same answer."""
    plain = {
        "kernel_size": 1,
        "stem_kernel": 1,
        "coordinates_in_stem": False,
        "coordinates_in_blocks": False,
        "coordinates_in_classifier": False,
    }
    shuffled = maps().flatten(2)[:, :, torch.randperm(54)].view_as(maps())
    model = network(**plain)
    torch.testing.assert_close(model(shuffled, *questions()), model(maps(), *questions()))
    for removed in plain:
        seeing = network(**{name: value for name, value in plain.items() if name != removed})
        assert (seeing(shuffled, *questions()) - seeing(maps(), *questions())).abs().max() > 1e-6


def test_without_batch_norm_none_is_left():
    for config in (SMALL, PIXELS):
        model = VisualReasoner(replace(config, batch_norm=False))
        assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)]
        assert model(maps(5, config).float(), *questions()).isfinite().all()


def test_dilations_repeat_over_the_blocks():
    model = network(blocks=5, dilations=(1, 2, 3))
    assert [block.conv.conv.dilation[0] for block in model.blocks.values()] == [1, 2, 3, 1, 2]


def test_the_bag_of_words_is_added_over_the_words():
    model = network(bag_of_words=True)
    tokens, lengths = questions()
    plain = network()
    plain.encoder.load_state_dict(model.encoder.state_dict(), strict=False)
    bag = torch.stack(
        [model.encoder.bag.weight[row[:length]].sum(0) for row, length in zip(tokens, lengths, strict=True)]
    )
    torch.testing.assert_close(model.encode(tokens, lengths), plain.encode(tokens, lengths) + 0.3 * bag)


def test_the_identity_like_start_passes_the_trunk_on():
    """With no noise, no coordinates' weights and an open gamma, a block returns its input plus its branch."""
    model = network(identity_noise=0.0, gamma_offset=1.0, generator_std=0.0)
    modulations = model.modulations(torch.rand(2, 5).double())
    x = torch.rand(2, 7, 6, 9, dtype=torch.float64)
    for name, block in model.blocks.items():
        assert modulations[name].gamma.eq(1).all()
        assert modulations[name].beta.eq(0).all()
        torch.testing.assert_close(block.project(x), x)
        silent = Modulation(0 * modulations[name].gamma, modulations[name].beta)
        torch.testing.assert_close(block(x, silent), x)


def test_the_three_parts_of_the_start_can_be_chosen_alone():
    def parts(**changes):
        torch.manual_seed(4)
        model = VisualReasoner(replace(SMALL, channels=70, blocks=1, encoder_width=40, **changes))
        conv, head = model.blocks["block1"].project.conv, model.generator.head
        near = bool((conv.weight[:, :70, 0, 0].diagonal() > 0.5).all()) and bool(conv.bias.eq(0).all())
        small = bool(abs(head.weight.std() - 0.1) < 0.01) and bool(head.bias.eq(0).all())
        return near, model.generator.gamma_offset, small

    assert parts() == (False, 1.0, False)
    assert parts(identity_noise=0.1) == (True, 1.0, False)
    assert parts(gamma_offset=0.5) == (False, 0.5, False)
    assert parts(generator_std=0.1) == (False, 1.0, True)


def test_initial_weights_are_kaiming_uniform_or_pytorchs():
    for start, bound in (("kaiming", 6**0.5), ("torch", 1.0)):
        weight = VisualReasoner(replace(SMALL, hidden=200, initial_weights=start)).classifier.hidden.weight
        assert weight.abs().max().item() == pytest.approx(bound * 8**-0.5, rel=0.02)


def test_uint8_pixels_are_read_as_0_to_255():
    model = VisualReasoner(PIXELS).eval()
    images = torch.randint(0, 256, (5, 3, 32, 48), dtype=torch.uint8)
    torch.testing.assert_close(model(images, *questions()), model(images / 255, *questions()))


def test_the_state_dict_round_trips():
    model, other = (
        network(bag_of_words=True),
        VisualReasoner(replace(SMALL, bag_of_words=True)).double().eval(),
    )
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(maps(), *questions()), other(maps(), *questions()))


def test_compiled_reasoning_equals_eager():
    model = network(blocks=1).float().to(memory_format=torch.channels_last)
    features = model.features(maps().float().to(memory_format=torch.channels_last)).detach()
    modulations = {name: m.detach() for name, m in model.modulations(torch.rand(4, 5)).items()}
    rows = torch.tensor([2, 0, 0, 1])
    compiled = torch.compile(model.reason, fullgraph=True, backend="aot_eager")(features, modulations, rows)
    eager = model.reason(features, modulations, rows)
    torch.testing.assert_close(compiled.logits, eager.logits)
    torch.testing.assert_close(compiled.pooled_from, eager.pooled_from)


def test_what_is_in_the_margins_is_not_seen():
    model, seen = network(margins=(1, 2, 3, 1)), maps()
    border = seen + 1
    border[:, :, 1:4, 3:8] = seen[:, :, 1:4, 3:8]
    assert torch.equal(model(border, *questions()), model(seen, *questions()))
    inside = seen.clone()
    inside[:, :, 3, 7] += 1
    assert not torch.allclose(model(inside, *questions()), model(seen, *questions()))


def test_maps_before_the_pool_lie_where_their_cells_do():
    features = network(margins=(1, 2, 3, 1)).features(maps())
    model = network(margins=(1, 2, 3, 1))
    pooled_from = model.reason(features, model.modulations(torch.rand(5, 5, dtype=torch.float64))).pooled_from
    assert pooled_from.shape[2:] == (6, 9)
    assert (pooled_from[:, :, 1:4, 3:8] > 0).any()
    outside = pooled_from.clone()
    outside[:, :, 1:4, 3:8] = 0
    assert not outside.any()


@pytest.mark.parametrize("fields", [{"margins": (3, 3, 0, 0)}, {"margins": (-1, 0, 0, 0)}])
def test_margins_leave_something(fields):
    with pytest.raises(ValueError, match=r"expected margins that leave cells of 6x9, and none over pixels"):
        replace(SMALL, **fields)


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match=r"expected maps \(scenes, 4, 6, 9\), got \(5, 9, 6, 4\)"):
        network().features(maps().transpose(1, 3))
    with pytest.raises(ValueError, match="expected filmed_blocks among"):
        replace(SMALL, filmed_blocks=(0,))
    with pytest.raises(ValueError, match="expected odd kernel_size"):
        replace(SMALL, kernel_size=2)
    with pytest.raises(ValueError, match="sides divisible by 16"):
        replace(PIXELS, input_width=40)


def perturbed(model, images, cell):
    """How much each cell of the maps before the pool changes when one cell of the input does."""
    questions = torch.ones(1, 3, dtype=torch.long)
    model.eval()
    modulations = model.modulations(model.encode(questions, torch.tensor([3])))
    other = images.clone()
    other[:, :, cell[0], cell[1]] += 1
    before, after = (model.reason(model.features(x), modulations).pooled_from for x in (images, other))
    return (before - after).abs().sum(dim=(0, 1))


def test_a_local_start_keeps_each_cell_to_itself_and_off_its_place():
    model = network(local_start=True, stem_kernel=1, coordinates_in_stem=False, context=True)
    images = maps()[:1]
    change = perturbed(model, images, (1, 2))
    assert change[1, 2] > 0
    change[1, 2] = 0
    assert change.max() == 0
    everywhere = images[:, :, :1, :1].expand_as(images)
    modulations = model.modulations(torch.rand(1, 5).double())
    seen = model.reason(model.features(everywhere), modulations).pooled_from.flatten(2)
    torch.testing.assert_close(seen, seen[:, :, :1].expand_as(seen))


def test_context_lets_every_cell_see_the_strongest():
    model = network(context=True, stem_kernel=1, kernel_size=1, dilations=(1,))
    images = maps()[:1]
    images[:, :, 1, 2] = 9.0
    assert (perturbed(model, images, (1, 2)) > 0).all()
    blind = network(context=False, stem_kernel=1, kernel_size=1, dilations=(1,))
    assert (perturbed(blind, images, (1, 2)) > 0).sum() == 1
