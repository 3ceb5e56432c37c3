"""Steps on a device that is simulated: where the host waits for it, and that nothing else changes."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils import backend_registration

from torchfilm.blocks import text
from torchfilm.systems import diffusion_policy
from torchfilm.systems.diffusion_policy.data import Told

pytest.importorskip("diffusers")
if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("a device can be simulated from a later torch on", allow_module_level=True)
from simulated_device import NAME, Waits

LENGTHS = torch.tensor([3, 6, 2, 5, 1])
WORDS = torch.arange(30).view(5, 6) % 5 + 1


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


@pytest.mark.usefixtures("unpacked")
def test_lengths_on_a_device_are_fetched_once() -> None:
    encoder = text.WordEncoder(6, 3, 5)
    with Waits():
        encoder.to(NAME)
        words, lengths = WORDS.to(NAME), LENGTHS.to(NAME)
    with Waits() as waits:
        encoder(words, lengths)
    assert len(waits.found) == 1


def test_a_control_step_waits_only_to_see_that_observations_are_finite() -> None:
    policy, batch = policy_and_batch()
    torch.manual_seed(1)
    expected = policy.eval().sample(batch.observations, {})
    with Waits():
        policy.to(NAME)
        seen = batch.observations.to(NAME)
        policy.sample(seen, {})
    torch.manual_seed(1)
    with Waits() as waits:
        actions = policy.sample(seen, {})
    torch.testing.assert_close(actions.held, expected)
    assert [one.split(":")[0] for one in waits.found] == ["_local_scalar_dense at model.py"]
