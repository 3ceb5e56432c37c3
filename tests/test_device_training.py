"""Steps on a device that is simulated: where the host waits for it, and that nothing else changes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from simulated_device import IS_THERE, NAME, Simulated
from torchfilm.blocks import text
from torchfilm.systems import diffusion_policy, visual_reasoning
from torchfilm.systems.diffusion_policy.data import Told
from torchfilm.training import Loss, TrainConfig
from torchfilm.training.distributed import Ranks
from torchfilm.training.interruption import StopRequest
from torchfilm.training.loop import _Run

pytest.importorskip("diffusers")
pytestmark = pytest.mark.skipif(not IS_THERE, reason="this torch cannot be told of a device in Python")

LENGTHS = torch.tensor([3, 6, 2, 5, 1])
WORDS = torch.arange(30).view(5, 6) % 5 + 1


def second_step(module: nn.Module, loss, batch, place: str) -> tuple[list[str], dict[str, float]]:
    """What happens in a training step, waits and copies by file, and gradients; the means of two steps."""
    with Simulated():
        module.to(place)
        config = TrainConfig(steps=3, batch_size=5, ema=None)
        run = _Run(module, loss, lambda draw: batch, config, Path("unwritten"), Ranks())
        run._step(0.0, StopRequest())
    with Simulated() as device:
        for parameter in run.trained:
            parameter.register_post_accumulate_grad_hook(lambda _: device.waits.append("gradient"))
        run._step(0.0, StopRequest())
    return [one.split(":")[0] for one in device.waits], run.window.result()


def squared_error(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Loss:
    error = (module(batch[0]) - batch[1]).square()
    return Loss(
        error.mean(), len(error), {"largest": error.max(), "right": (error < 0.1).sum(), "share": 0.1}
    )


def policy_and_batch():
    torch.manual_seed(0)
    config = diffusion_policy.PolicyConfig(
        observation=17,
        widths=(8, 16),
        step_dim=6,
        encoder="things",
        encoder_width=10,
        things=(3, 2, 5),
        relative=True,
        vocabulary=("push", "the", "red", "thing", "slowly"),
        vectors=(("force", 3),),
        reasoning=4,
        sample_steps=3,
    )
    heard = {"instruction": Told(WORDS, LENGTHS), "force": torch.rand(5, 3)}
    batch = diffusion_policy.Batch(torch.rand(5, 2, 17), torch.rand(5, 16, 2), heard)
    return diffusion_policy.build(config), batch


def reasoner_and_batch():
    torch.manual_seed(0)
    config = visual_reasoning.ReasonerConfig(
        vocabulary=13,
        word_dim=3,
        encoder_width=5,
        input="maps",
        input_channels=4,
        input_height=6,
        input_width=9,
        blocks=2,
        channels=7,
        dilations=(1,),
        projection=8,
        hidden=10,
        answers=11,
    )
    rows = torch.arange(5)
    batch = visual_reasoning.Batch(torch.rand(5, 4, 6, 9), WORDS, LENGTHS, rows, rows)
    return visual_reasoning.build(config), batch


class MeanState(nn.Module):
    """In place of a recurrent network, for which the device has no kernel."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, width)

    def forward(self, words: Tensor) -> tuple[None, Tensor]:
        return None, self.linear(words.mean(dim=1))[None]


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    def words_alone(words: Tensor, lengths: Tensor, **options: bool) -> Tensor:
        assert lengths.is_cpu
        return words

    monkeypatch.setattr(text, "pack_padded_sequence", words_alone)
    monkeypatch.setitem(text.CELLS, "gru", MeanState)


def line_and_batch():
    torch.manual_seed(0)
    return nn.Linear(3, 2), (torch.rand(5, 3), torch.rand(5, 2))


@pytest.mark.parametrize(
    ("build", "loss", "sent"),
    [
        (line_and_batch, squared_error, 2),
        (reasoner_and_batch, visual_reasoning.loss, 4),
        (policy_and_batch, diffusion_policy.loss, 4),
    ],
)
@pytest.mark.plain
@pytest.mark.usefixtures("unpacked")
def test_a_training_step_waits_once_and_after_the_gradients(build, loss, sent: int) -> None:
    happened, means = second_step(build()[0], loss, build()[1], NAME)
    assert happened[:sent] == ["_to_copy at batches.py"] * sent  # the batch is sent, and not waited for
    if build is policy_and_batch:
        assert happened.pop(sent) == "_to_copy at text.py"  # lengths are sent too, for the bag of words
    assert set(happened[sent:-1]) == {"gradient"}
    assert happened[-1] == "_to_copy at loop.py"
    assert means == pytest.approx(second_step(build()[0], loss, build()[1], "cpu")[1], rel=1e-5)


@pytest.mark.plain
@pytest.mark.usefixtures("unpacked")
def test_lengths_on_a_device_are_fetched_once() -> None:
    encoder = text.WordEncoder(6, 3, 5)
    with Simulated():
        encoder.to(NAME)
        words, lengths = WORDS.to(NAME), LENGTHS.to(NAME)
    with Simulated() as device:
        encoder(words, lengths)
    assert len(device.waits) == 1


def test_a_control_step_waits_only_to_see_that_observations_are_finite() -> None:
    policy, batch = policy_and_batch()
    torch.manual_seed(1)
    expected = policy.eval().sample(batch.observations, {})
    with Simulated():
        policy.to(NAME)
        seen = batch.observations.to(NAME)
        policy.sample(seen, {})
    torch.manual_seed(1)
    with Simulated() as device:
        actions = policy.sample(seen, {})
    torch.testing.assert_close(actions.held, expected)
    # The schedule's numbers are on the CPU, and go along with each operation.
    waits = [
        one.split(":")[0] for one in device.waits if not one.startswith(("mul ", "div ", "sub ", "add "))
    ]
    assert waits == ["_local_scalar_dense at model.py"]
