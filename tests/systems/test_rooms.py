"""What holds in every room of `systems`: a folder that is not its own is refused, with the file's name."""

import json
import shutil

import pytest

from torchfilm.app import cli
from torchfilm.systems import SYSTEMS, diffusion_policy, visual_reasoning

pytest.importorskip("diffusers")

SHIPPED = {"diffusion_policy": diffusion_policy.SHIPPED, "visual_reasoning": visual_reasoning.SHIPPED}
PAIRS = [(name, other) for name in SYSTEMS for other in SHIPPED if other != name]
OTHER = r"config\.json: expected the fields of 'network', got .*'\w+'.*\. Is it a run of another system\?"


@pytest.mark.parametrize(("name", "other"), PAIRS)
def test_a_room_refuses_what_another_has_trained(name, other):
    with pytest.raises(ValueError, match=OTHER):
        SYSTEMS[name].load(SHIPPED[other])


@pytest.mark.parametrize("command", ["eval", "inspect"])
@pytest.mark.parametrize(("name", "other"), PAIRS)
def test_commands_say_so_on_one_line(command, name, other, capsys):
    assert cli.main([command, name, str(SHIPPED[other])]) == 2
    assert "Is it a run of another system?" in capsys.readouterr().err


def test_all_that_take_a_run_refuse_one_of_another_system(tmp_path, capsys):
    run = str(SHIPPED["diffusion_policy"])
    picture = str(tmp_path / "a.png")
    for arguments in (["ask", picture, "What", "--model", run], ["serve", "--model", run]):
        assert cli.main(arguments) == 2
        assert "Is it a run of another system?" in capsys.readouterr().err


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", r"config\.json: expected an entry 'network', got none at all\. .* has its training finished"),
        ('{"train": 3, "extra": 2}', r"expected an entry 'network', got train, extra\. Is it the folder"),
        ('{"network": {"wid', r"config\.json: expected a JSON object, got something else .*cut short"),
        ("[2, 3]", r"config\.json: expected a JSON object, got something else"),
    ],
)
def test_a_config_that_says_no_network_is_named(name, text, said, tmp_path):
    for file in ("weights.safetensors", "vocab.json"):
        if (SHIPPED[name] / file).is_file():
            shutil.copy(SHIPPED[name] / file, tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        SYSTEMS[name].load(tmp_path)


@pytest.mark.parametrize("value", [None, -1, "x", 10**6, 10**12])
@pytest.mark.parametrize(
    ("name", "size"), [("visual_reasoning", "word_dim"), ("diffusion_policy", "step_dim")]
)
def test_a_size_that_the_weights_do_not_have_is_refused_before_it_costs_memory(name, size, value, tmp_path):
    shutil.copytree(SHIPPED[name], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["network"][size] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"(config\.json: |weights\.safetensors do not fit)") as caught:
        SYSTEMS[name].load(tmp_path)
    assert "enforce fail" not in str(caught.value)
