"""Instructions read by Hugging Face models: tiny ones from a config, a tokenizer made by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_policy import observations, small

from torchfilm.data.table.episodes import sample_episode
from torchfilm.data.table.scenes import Scene, Thing
from torchfilm.systems.diffusion_policy import RECIPES, Batch, build, loss
from torchfilm.systems.diffusion_policy.looking import looks_of
from torchfilm.systems.diffusion_policy.policy import Policy
from torchfilm.systems.diffusion_policy.reasoning import Vocabulary
from torchfilm.systems.diffusion_policy.rollouts import roll_out, track
from torchfilm.systems.diffusion_policy.thinking import TextReader, Thinker, describe_scene

transformers = pytest.importorskip("transformers")
SPOKEN = (
    "Scene",
    "Instruction",
    "Reasoning",
    ":",
    "a",
    "the",
    "arm",
    "should",
    "push",
    "red",
    "ball",
    "slowly",
)
WORDS = ["[pad]", "[unk]", *SPOKEN, "go"]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[unk]")
    plain = tokenizers.Tokenizer(model)
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[pad]", unk_token="[unk]")


@pytest.fixture(scope="module")
def causal():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(WORDS), n_embd=12, n_layer=1, n_head=2, n_positions=128, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=7
    )
    return transformers.BertModel(config).eval()


def test_a_reader_pools_the_last_hidden_states_of_real_tokens(tokenizer, encoder):
    reader = TextReader(encoder, tokenizer)
    texts = ["push the red ball slowly", "go", "push the red ball slowly"]
    found = reader(texts, ["a ball"] * 3)
    with torch.no_grad():
        alone = encoder(**tokenizer(texts[1], return_tensors="pt")).last_hidden_state.mean(dim=1)[0]
    torch.testing.assert_close(found.vectors[1], alone, rtol=1e-4, atol=1e-5)
    assert found.vectors.shape == (3, reader.dim)
    assert torch.equal(found.vectors[0], found.vectors[2])
    assert found.texts == tuple(texts)


def test_many_texts_are_read_in_parts(tokenizer, encoder):
    texts = [" ".join(["go"] * n) for n in range(1, 7)]
    reader = TextReader(encoder, tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchfilm.systems.diffusion_policy.thinking._AT_ONCE", 2)
        parts = reader(texts)
    torch.testing.assert_close(parts.vectors, reader(texts).vectors, rtol=1e-4, atol=1e-5)


def t5():
    sizes = dict(vocab_size=len(WORDS), d_model=12, d_kv=6, d_ff=7, num_layers=1, num_heads=2)
    return transformers.T5Config(**sizes, decoder_start_token_id=0)


def gemma3():
    text = dict(vocab_size=len(WORDS), hidden_size=12, intermediate_size=7, num_hidden_layers=1)
    text |= dict(num_attention_heads=2, num_key_value_heads=1, head_dim=6)
    return transformers.Gemma3Config(
        text_config=text, vision_config=dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    )


@pytest.mark.parametrize(
    "kind", ["GPT2LMHeadModel", "T5Model", "T5EncoderModel", "BertForMaskedLM", "Gemma3Model"]
)
def test_models_with_heads_decoders_and_configs_in_parts_are_read(kind, tokenizer, causal, encoder):
    torch.manual_seed(0)
    made = {"T": t5, "G": gemma3}.get(kind[0])
    if kind == "GPT2LMHeadModel":
        model, states = causal, causal.transformer
    elif kind == "BertForMaskedLM":
        model = transformers.BertForMaskedLM(encoder.config).eval()
        states = model.bert
    else:
        model = getattr(transformers, kind)(made()).eval()
        states = model.get_encoder() if kind[0] == "T" else model
    found = TextReader(model, tokenizer)(["push the ball"]).vectors
    tokens = tokenizer(["push the ball"], return_tensors="pt")
    tokens.pop("token_type_ids", None)
    with torch.no_grad():
        expected = states(**tokens).last_hidden_state.mean(dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_thinker_keeps_what_it_wrote_and_pools_the_states_of_it(tokenizer, causal):
    thinker = Thinker(causal, tokenizer, most=5)
    thoughts = thinker(["push the ball", "go slowly"], ["a red ball", "a ball"])
    asked = tokenizer("Scene: a red ball\nInstruction: push the ball\nReasoning: the arm should")["input_ids"]
    ids = list(asked)
    with torch.no_grad():
        for _ in range(5):
            out = causal(torch.tensor([ids]), output_hidden_states=True)
            ids.append(int(out.logits[0, -1].argmax()))
            if ids[-1] == 0:
                break
        states = causal(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(thoughts.vectors[0], states[0, len(asked) :].mean(dim=0))
    assert thoughts.texts[0] == tokenizer.decode(ids[len(asked) :], skip_special_tokens=True).strip()
    assert thoughts.vectors.shape == (2, thinker.dim)
    assert not torch.allclose(thoughts.vectors[0], thoughts.vectors[1])


def test_a_scene_is_described_with_all_that_stands_on_it():
    scene = Scene((Thing("red", "ball", "small", 0.1, 0.4),), (0.2, 0.5), (-0.1, 0.3), ((0.0, 0.15),))
    assert (
        describe_scene(scene)
        == "a small red ball at (10, 40), an obstacle at (-10, 30), the goal at (20, 50)"
    )


def trained(readers, **changes):
    """A small policy after a few steps with what these readers make of two instructions."""
    sizes = tuple((name, reader.dim) for name, reader in readers.items())
    policy = small(vectors=sizes, **changes).train()
    texts, scenes = ["push the red ball", "go slowly"] * 4, ["a red ball"] * 8
    heard = {name: reader(texts, scenes).vectors for name, reader in readers.items()}
    if policy.config.vocabulary:
        heard["instruction"] = Vocabulary(policy.config.vocabulary)(texts)
    actions = torch.tensor([1.0, -1.0] * 4)[:, None, None].expand(8, 16, 2) * 0.3
    optimiser = torch.optim.Adam(policy.parameters(), lr=1e-2)
    torch.manual_seed(0)
    for _ in range(6):
        value = loss(policy, Batch(observations(8), actions, heard)).value
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
    return policy.eval()


@pytest.mark.parametrize("vocabulary", [("push", "the", "red", "ball", "go", "slowly"), ()])
def test_a_new_instruction_is_thought_about_at_once(vocabulary, tokenizer, causal):
    pytest.importorskip("diffusers")
    thinker = Thinker(causal, tokenizer, most=4)
    policy = Policy(trained({"thought": thinker}, vocabulary=vocabulary), readers={"thought": thinker})
    untold, seen = Policy(policy.network, readers={"thought": thinker}), observations(2)[:, 0]
    for one in (policy, untold):
        one.reset(["push the red ball", None], scenes=["a red ball", "a ball"])
        one.act(seen)
    before = policy.thoughts["thought"]
    policy.set_instruction("go slowly", flush=True)
    after = policy.thoughts["thought"]
    expected = thinker(["push the red ball", "go slowly"], ["a red ball"] * 2)
    assert (before[0], after[0]) == expected.texts
    assert before[1] is after[1] is None
    torch.testing.assert_close(policy._heard[0].vectors["thought"], expected.vectors[1])
    action, other = policy.act(seen), untold.act(seen)
    assert not torch.allclose(action[0], other[0])
    told = Policy(policy.network, readers={"thought": thinker})
    told.reset(["go slowly", None], scenes=["a red ball", "a ball"])
    assert torch.equal(
        policy.reason(["go slowly"], ["a red ball"]), told.reason(["go slowly"], ["a red ball"])
    )
    policy.set_instruction(None)
    assert policy.thoughts["thought"] == [None, None]
    assert "thought" not in policy._heard[0].vectors


def test_an_encoder_reads_in_place_of_own_words(tokenizer, encoder):
    pytest.importorskip("diffusers")
    reader = TextReader(encoder, tokenizer)
    policy = Policy(trained({"text": reader}, vocabulary=()), readers={"text": reader})
    actions = []
    for text in ("go", "push the ball", None):
        policy.reset([text])
        actions.append(policy.act(observations(1)[:, 0]))
    assert policy.reads
    assert not torch.allclose(actions[0], actions[1])
    assert not torch.allclose(actions[0], actions[2])


def test_what_plays_episodes_needs_a_policy_alone(tokenizer, causal, monkeypatch):
    pytest.importorskip("diffusers")
    pytest.importorskip("mujoco")
    thinker, heard = Thinker(causal, tokenizer, most=2), []

    class Spy:
        dim = thinker.dim

        def __call__(self, texts, scenes=None):
            heard.extend(zip(texts, scenes, strict=True))
            return thinker(texts, scenes)

    config = replace(RECIPES["tiny"].config, vectors=(("thought", thinker.dim),))
    torch.manual_seed(0)
    policy = Policy(build(config).eval(), readers={"thought": Spy()})
    episode = sample_episode(np.random.default_rng(0), arms=2)
    views = [describe_scene(episode.scene.seen_by(arm)) for arm in range(2)]
    monkeypatch.setattr("torchfilm.systems.diffusion_policy.rollouts.play", lambda *_: [(None,)])
    roll_out(policy, [episode])
    assert heard == list(zip([one.text for one in episode.told], views, strict=True))
    heard.clear()
    track(policy, [episode.scene], [episode.tasks[0]], ["go"])
    assert heard == [("go", views[0])]
    heard.clear()
    alone = sample_episode(np.random.default_rng(0)).scene
    looks_of(policy, [alone], ["go"])
    assert heard == [("go", describe_scene(alone))]
    assert views[0] != views[1]


def test_readers_that_do_not_fit_are_refused(tokenizer, encoder):
    reader, network = TextReader(encoder, tokenizer), small(vocabulary=())
    with pytest.raises(ValueError, match=r"vectors \{'force': 3\} that the network hears, got 'text' of 12"):
        Policy(network, readers={"text": reader})
    with pytest.raises(
        ValueError, match="an instruction that is heard, got 'go' for a network without words"
    ):
        Policy(network).reset(["go"])
    policy = Policy(small(vectors=(("text", 12),)), readers={"text": reader})
    with pytest.raises(ValueError, match=r"among \[\], got 'text'\. Its reader makes it"):
        policy.reset(["push"], {"text": torch.ones(1, 12)})


def test_what_cannot_be_read_is_refused(tokenizer, causal):
    with pytest.raises(ValueError, match=r"expected a prompt with \{scene\}"):
        Thinker(causal, tokenizer, prompt="{instruction}")
    with pytest.raises(ValueError, match=r"expected a Hugging Face model with config\.hidden_size"):
        TextReader(torch.nn.Linear(2, 3), tokenizer)
    with pytest.raises(ValueError, match="TextReader: expected texts, got none"):
        TextReader(causal, tokenizer)([])
    with pytest.raises(ValueError, match="TextReader: expected words, got ''"):
        TextReader(causal, tokenizer)([""])
    with pytest.raises(
        ValueError, match="TextReader: expected at most 128 tokens, the model's context, got 129"
    ):
        TextReader(causal, tokenizer)(["go " * 129])
    with pytest.raises(ValueError, match="Thinker: expected texts, got none"):
        Thinker(causal, tokenizer)([], [])
    with pytest.raises(ValueError, match="a scene in words for each of 2 instructions, got 1"):
        Thinker(causal, tokenizer)(["go", "push"], ["a ball"])
    with pytest.raises(ValueError, match=r"for each of 1 instructions, got None.* Policy\.reset"):
        Thinker(causal, tokenizer)(["go"])
    with pytest.raises(ValueError, match=r"at most 128 tokens, .*, got 132\..* smaller `most`"):
        Thinker(causal, tokenizer, most=120)(["go"], ["a ball"])
