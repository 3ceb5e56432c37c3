"""Instructions read by Hugging Face models: tiny ones from a config, a tokenizer made by hand."""

import pytest
import torch

from torchfilm.data.table.scenes import Scene, Thing
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
        vocab_size=len(WORDS), n_embd=12, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
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
    found = reader(texts)
    with torch.no_grad():
        alone = encoder(**tokenizer(texts[1], return_tensors="pt")).last_hidden_state.mean(dim=1)[0]
    torch.testing.assert_close(found[1], alone, rtol=1e-4, atol=1e-5)
    assert found.shape == (3, reader.dim)
    assert torch.equal(found[0], found[2])


def test_a_thinker_keeps_what_it_wrote_and_pools_the_states_of_it(tokenizer, causal):
    thinker = Thinker(causal, tokenizer, most=5)
    thoughts = thinker(["a red ball", "a ball"], ["push the ball", "go slowly"])
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


def test_what_cannot_be_read_is_refused(tokenizer, causal):
    with pytest.raises(ValueError, match=r"expected a prompt with \{scene\}"):
        Thinker(causal, tokenizer, prompt="{instruction}")
    with pytest.raises(ValueError, match=r"expected a Hugging Face model with config\.hidden_size"):
        TextReader(torch.nn.Linear(2, 3), tokenizer)
    with pytest.raises(ValueError, match="expected texts, got none"):
        TextReader(causal, tokenizer)([])
    with pytest.raises(ValueError, match="expected scenes and instructions, got none"):
        Thinker(causal, tokenizer)([], [])
