"""One instruction for good: folded into plain weights, with the same actions."""

import pytest
import torch
from small_policy import CONFIG, observations, small

from torchfilm.systems.diffusion_policy.fixing import fixed
from torchfilm.systems.diffusion_policy.policy import Policy
from torchfilm.systems.diffusion_policy.reasoning import Vocabulary

WORDS = Vocabulary(CONFIG.vocabulary)
KINDS = {
    "things": {},
    "flat": {"encoder": "flat"},
    "blocks alone, raw gamma": {"encoder": "none", "listens": ("blocks",), "start": "original"},
    "encoder alone": {"listens": ("encoder",)},
    "scale": {"fusion": "scale"},
    "gate, in front of the activation": {"fusion": "gate", "placement": "before_activation"},
    "low rank": {"head": "lowrank:2"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_fixed_acts_as_what_is_told(kind):
    pytest.importorskip("diffusers")
    policy, o = small(**KINDS[kind]).double(), observations(3).double()
    heard = {"instruction": WORDS(["push the red thing"]), "force": torch.ones(1, 3).double()}
    plain = fixed(policy, heard)
    assert not plain.config.conditions
    assert not list(plain.listeners.parameters())
    x, step = torch.randn(3, 16, 2).double(), torch.tensor([1, 7, 13])
    expected, silent = policy(x, step, o, heard), policy(x, step, o, {})
    torch.testing.assert_close(plain(x, step, o, {}), expected, rtol=0, atol=1e-9)
    assert not torch.allclose(silent, expected)
    told = policy.sample(o, heard, generator=torch.Generator().manual_seed(4))
    found = plain.sample(o, {}, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(found, told, rtol=0, atol=1e-9)


def test_in_single_precision_it_is_equal_to_five_digits_and_needs_no_words():
    pytest.importorskip("diffusers")
    policy, o = small(vectors=()), observations(2)[:, 0]
    told, plain = Policy(policy), Policy(fixed(policy, {"instruction": WORDS(["push the red thing"])}))
    told.reset(["push the red thing"] * 2)
    plain.reset([None, None])
    torch.testing.assert_close(plain.act(o), told.act(o), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fusion": "concat"}, "modulates encoder or blocks as gamma and beta, got fusion 'concat'"),
        ({"listens": ("condition",)}, r"got fusion 'film' on \('condition',\)"),
        ({"emit": ("beta",)}, r"emits gamma and beta without a bound, got \('beta',\)"),
    ],
)
def test_what_is_not_exact_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        fixed(small(**changes), {"instruction": WORDS(["push"])})


def test_several_instructions_are_refused():
    with pytest.raises(ValueError, match=r"expected conditions of 1 row, .*, got 2 rows"):
        fixed(small(vectors=()), {"instruction": WORDS(["push", "the red"])})
