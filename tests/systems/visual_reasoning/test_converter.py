"""A checkpoint in the original's format gives the answers that the original's equations give."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as functional

from torchfilm.systems.visual_reasoning.bundle import load_bundle
from torchfilm.systems.visual_reasoning.converter import convert, from_original, main
from torchfilm.systems.visual_reasoning.model import ReasonerConfig, VisualReasoner

SMALL = ReasonerConfig(
    vocabulary=13,
    word_dim=3,
    encoder_width=5,
    input_channels=4,
    input_height=6,
    input_width=6,
    blocks=3,
    channels=7,
    projection=8,
    hidden=10,
    answers=11,
)
PIXELS = replace(SMALL, input="pixels", input_channels=3, input_height=32, input_width=32)


def original(config: ReasonerConfig) -> tuple[dict, dict]:
    """Random state dicts with the names and shapes of the original's modules."""
    random = torch.Generator().manual_seed(5)

    def values(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64) / 2

    c, d = config.channels, config.encoder_width
    generator = {
        "encoder_embed.weight": values(config.vocabulary, config.word_dim),
        "encoder_rnn.weight_ih_l0": values(3 * d, config.word_dim),
        "encoder_rnn.weight_hh_l0": values(3 * d, d),
        "encoder_rnn.bias_ih_l0": values(3 * d),
        "encoder_rnn.bias_hh_l0": values(3 * d),
        "decoder_linear.weight": values(config.blocks * 2 * c, d),
        "decoder_linear.bias": values(config.blocks * 2 * c),
    }
    network = {}

    def conv(name, out, into, *kernel):
        network[f"{name}.weight"], network[f"{name}.bias"] = values(out, into, *kernel), values(out)

    def norm(name, width, *, affine=True):
        network[f"{name}.running_mean"], network[f"{name}.running_var"] = values(width), values(width).exp()
        if affine:
            network[f"{name}.weight"], network[f"{name}.bias"] = values(width), values(width)

    if config.input == "pixels":
        for layer in range(4):
            conv(f"stem.{3 * layer}", c, config.input_channels if layer == 0 else c, 4, 4)
            norm(f"stem.{3 * layer + 1}", c)
    else:
        conv("stem.0", c, config.input_channels + 2, 3, 3)
        norm("stem.1", c)
    for block in range(config.blocks):
        conv(f"{block}.input_proj", c, c + 2, 1, 1)
        conv(f"{block}.conv1", c, c, 3, 3)
        norm(f"{block}.bn1", c, affine=False)
    conv("classifier.0", config.projection, c + 2, 1, 1)
    norm("classifier.1", config.projection)
    conv("classifier.5", config.hidden, config.projection)
    norm("classifier.6", config.hidden)
    conv("classifier.8", config.answers, config.hidden)
    return generator, network


def read(generator: dict, question: list[int]) -> torch.Tensor:
    """The GRU, one word at a time, and the linear layer after it: gamma - 1 and beta of all blocks."""
    g = {name.removeprefix("encoder_rnn."): value for name, value in generator.items()}
    width = len(g["bias_hh_l0"]) // 3
    h = torch.zeros(width, dtype=torch.float64)
    for word in question:
        x = g["weight_ih_l0"] @ g["encoder_embed.weight"][word] + g["bias_ih_l0"]
        u = g["weight_hh_l0"] @ h + g["bias_hh_l0"]
        reset = torch.sigmoid(x[:width] + u[:width])
        update = torch.sigmoid(x[width : 2 * width] + u[width : 2 * width])
        new = torch.tanh(x[2 * width :] + reset * u[2 * width :])
        h = (1 - update) * new + update * h
    return g["decoder_linear.weight"] @ h + g["decoder_linear.bias"]


def look(network: dict, image: torch.Tensor, raw: torch.Tensor, config: ReasonerConfig) -> torch.Tensor:
    """The network for one picture [C, H, W] and the generator's output, from the paper's description."""

    def with_places(x):
        height, width = x.shape[2:]
        columns = torch.linspace(-1, 1, width, dtype=x.dtype).repeat(height, 1)
        rows = torch.linspace(-1, 1, height, dtype=x.dtype).repeat(width, 1).t()
        return torch.cat([x, columns[None, None], rows[None, None]], dim=1)

    def conv(name, x, **options):
        return functional.conv2d(x, network[f"{name}.weight"], network[f"{name}.bias"], **options)

    def norm(name, x):
        mean, var = network[f"{name}.running_mean"], network[f"{name}.running_var"]
        return functional.batch_norm(x, mean, var, network.get(f"{name}.weight"), network.get(f"{name}.bias"))

    x = image[None]
    if config.input == "pixels":
        for layer in range(4):
            x = functional.relu(
                norm(f"stem.{3 * layer + 1}", conv(f"stem.{3 * layer}", x, stride=2, padding=1))
            )
    else:
        x = functional.relu(norm("stem.1", conv("stem.0", with_places(x), padding=1)))
    for block, part in enumerate(raw.chunk(config.blocks)):
        gamma, beta = 1 + part[: config.channels], part[config.channels :]
        x = functional.relu(conv(f"{block}.input_proj", with_places(x)))
        h = norm(f"{block}.bn1", conv(f"{block}.conv1", x, padding=1))
        x = x + functional.relu(h * gamma[None, :, None, None] + beta[None, :, None, None])
    x = functional.relu(norm("classifier.1", conv("classifier.0", with_places(x))))
    x = x.amax(dim=(2, 3))
    x = functional.relu(
        norm("classifier.6", x @ network["classifier.5.weight"].t() + network["classifier.5.bias"])
    )
    return (x @ network["classifier.8.weight"].t() + network["classifier.8.bias"])[0]


@pytest.mark.parametrize("config", [SMALL, PIXELS], ids=["features", "pixels"])
def test_converted_weights_answer_as_the_original_would(config):
    generator, network = original(config)
    model = VisualReasoner(config).double().eval()
    model.load_state_dict(from_original(generator, network, config))
    size = (2, config.input_channels, config.input_height, config.input_width)
    images = torch.rand(size, dtype=torch.float64)
    questions = [[1, 5, 6, 7, 2], [1, 9, 2]]
    padded = torch.tensor([questions[0], [*questions[1], 0, 0]])
    logits = model(images, padded, torch.tensor([5, 3]))
    for row, (image, question) in enumerate(zip(images, questions, strict=True)):
        torch.testing.assert_close(logits[row], look(network, image, read(generator, question), config))


def test_counters_and_prefixes_of_other_versions_are_accepted():
    generator, network = original(SMALL)
    network = {f"module.{name}": value for name, value in network.items()}
    network["module.stem.1.num_batches_tracked"] = torch.tensor(9)
    plain = from_original(*original(SMALL), SMALL)
    converted = from_original(generator, network, SMALL)
    assert converted.keys() == plain.keys() == VisualReasoner(SMALL).state_dict().keys()
    assert all(torch.equal(converted[name], plain[name]) for name in plain)


def test_what_is_missing_or_unknown_is_named():
    generator, network = original(SMALL)
    with pytest.raises(ValueError, match=r"missing 2\.conv1\.bias; unknown nothing"):
        from_original(generator, {k: v for k, v in network.items() if k != "2.conv1.bias"}, SMALL)
    with pytest.raises(ValueError, match=r"missing nothing; unknown 2\.bn1\.running_mean, .* and 1 more"):
        from_original(generator, network, replace(SMALL, blocks=2))
    with pytest.raises(ValueError, match=r"missing decoder_linear\.bias, .* and 2 more"):
        from_original({}, network, SMALL)


def test_another_shape_is_named():
    with pytest.raises(ValueError, match=r"classifier\.8\.weight is \(11, 10\), expected \(12, 10\)"):
        from_original(*original(SMALL), replace(SMALL, answers=12))


@pytest.mark.parametrize(
    "change",
    [
        {"filmed_blocks": (1,)},
        {"placement": "after_relu2"},
        {"bound": "tanh"},
        {"residual": False},
        {"pooling": "mean"},
        {"dilations": (1, 2)},
        {"gamma_offset": 0.5},
        {"emit": ("gamma",)},
        {"margins": (1, 0, 0, 0)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_layout_that_the_original_has_not_is_named(change):
    (name,) = change
    with pytest.raises(ValueError, match=rf"expected {name}=.* as in the paper's network, got"):
        from_original(*original(SMALL), replace(SMALL, **change))
    from_original(*original(SMALL), replace(SMALL, initial_weights="torch", local_start=True))


ARGS = {"gamma_option": "linear", "gamma_baseline": 1, "condition_method": "bn-film", "learning_rate": 3e-4}


def files(folder: Path, config: ReasonerConfig, words: int = 13, **args: object) -> tuple[Path, Path]:
    """A checkpoint and a vocabulary as the original's training and preprocessing leave them."""
    generator, network = ({k: v.float() for k, v in state.items()} for state in original(config))
    size = f"{config.input_channels},{config.input_height},{config.input_width}"
    content = {
        "args": ARGS | {"feature_dim": size} | args,
        "program_generator_state": generator,
        "program_generator_kwargs": {"hidden_dim": config.encoder_width},
        "execution_engine_state": network,
        "execution_engine_kwargs": {"module_dim": config.channels},
        "vocab": {"question_token_to_idx": {"<NULL>": 0}},
        "val_accs": [0.5, 0.9],
    }
    torch.save(content, folder / "film.pt")
    special = ["<NULL>", "<START>", "<END>", "<UNK>"]
    tables = {
        "question_token_to_idx": [*special, *(f"word{i}" for i in range(words - 4))],
        "program_token_to_idx": [*special, "scene"],
        "answer_token_to_idx": [*special, "yes", "no", *map(str, range(5))],
    }
    numbered = {key: {name: i for i, name in enumerate(names)} for key, names in tables.items()}
    (folder / "vocab.json").write_text(json.dumps(numbered))
    return folder / "film.pt", folder / "vocab.json"


@pytest.mark.parametrize("config", [SMALL, PIXELS], ids=["features", "pixels"])
def test_a_checkpoint_becomes_a_bundle_that_answers_as_the_original_would(config, tmp_path):
    checkpoint, vocabulary = files(tmp_path, config)
    convert(checkpoint, vocabulary, tmp_path / "bundle")
    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.network.config == config
    assert bundle.recipe == ("paper_pixels" if config.input == "pixels" else "paper")
    assert bundle.vocabulary.question_words[4] == "word0"
    generator, network = ({k: v.float() for k, v in state.items()} for state in original(config))
    image, question = torch.rand(config.input_channels, config.input_height, config.input_width), [1, 9, 7, 2]
    with torch.no_grad():
        logits = bundle.network(image[None], torch.tensor([question]), torch.tensor([4]))[0]
    raw = read({name: value.double() for name, value in generator.items()}, question)
    expected = look({name: value.double() for name, value in network.items()}, image.double(), raw, config)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"expected a new folder, found a config\.json"):
        convert(checkpoint, vocabulary, tmp_path / "bundle")


def test_a_checkpoint_that_does_not_convert_is_named(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"a run with gamma_option='linear' as the paper's, got 'sigmoid'"):
        convert(*files(tmp_path, SMALL, gamma_option="sigmoid"), out)
    with pytest.raises(ValueError, match=r"expected 13 words and 11 answers .* got 14 and 11"):
        convert(*files(tmp_path, SMALL, words=14), out)
    torch.save({"baseline_state": {}}, tmp_path / "film.pt")
    with pytest.raises(ValueError, match=r"found no program_generator_state and no execution_engine_state"):
        convert(tmp_path / "film.pt", tmp_path / "vocab.json", out)
    torch.save({"program_generator_state": Path("x")}, tmp_path / "film.pt")
    with pytest.raises(ValueError, match=r"expected a checkpoint of plain tensors, texts and numbers"):
        convert(tmp_path / "film.pt", tmp_path / "vocab.json", out)
    states = {name: {"a": torch.ones(1)} for name in ("program_generator_state", "execution_engine_state")}
    torch.save(states, tmp_path / "film.pt")
    with pytest.raises(ValueError, match=r"missing encoder_embed\.weight, .*Is it the paper's FiLM"):
        convert(tmp_path / "film.pt", tmp_path / "vocab.json", out)
    states["execution_engine_state"] = [3]
    torch.save(states, tmp_path / "film.pt")
    with pytest.raises(ValueError, match=r"film\.pt: expected the original's two state dicts .* got Attribu"):
        convert(tmp_path / "film.pt", tmp_path / "vocab.json", out)
    for size, said in ((5, "got TypeError"), ("6,14", "not enough values to unpack")):
        with pytest.raises(ValueError, match=rf"film\.pt: .*{said}"):
            convert(*files(tmp_path, SMALL, feature_dim=size), out)
    (tmp_path / "film.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"film\.pt: expected a checkpoint of plain tensors"):
        convert(tmp_path / "film.pt", tmp_path / "vocab.json", out)
    assert not out.exists()


def test_the_converter_is_a_command(tmp_path, monkeypatch, capsys):
    given = [*map(str, files(tmp_path, SMALL)), str(tmp_path / "bundle")]
    monkeypatch.setattr(sys, "argv", ["converter", *given])
    main()
    assert load_bundle(tmp_path / "bundle").recipe == "paper"
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "error: " in (said := capsys.readouterr().err)
    assert "expected a new folder" in said
