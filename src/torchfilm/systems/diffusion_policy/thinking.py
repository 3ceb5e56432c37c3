"""Instructions read by pretrained language models: any encoder, or any causal model that thinks aloud.

What they make of a text is a vector, which a policy hears beside its own words or instead of them
(`PolicyConfig.vectors`, `Policy(network, readers=...)`). The models are frozen and run once per instruction,
not once per action, on whatever device they are on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torchfilm.conditions import Tokens
from torchfilm.data.table.scenes import Scene

PROMPT = """Scene: {scene}
Instruction: {instruction}
Reasoning: the arm should"""
"""What a language model is asked to go on with."""

_AT_ONCE = 256  # texts in one batch


@dataclass(frozen=True, eq=False)
class Thoughts:
    """What a reader made of instructions, one row for each.

    Attributes:
        texts: what it wrote; of one that only reads, the instructions themselves.
        vectors: [batch, dim].
    """

    texts: tuple[str, ...]
    vectors: Float[Tensor, "batch dim"]


@runtime_checkable
class Reader(Protocol):
    """Whatever makes a vector of an instruction; `Policy` calls it when an arm is told something."""

    dim: int
    """Size of the vectors."""

    def __call__(self, texts: Sequence[str], scenes: Sequence[str] | None = None) -> Thoughts:
        """Return one vector for each text; scenes: in words, one for each text, or None where not known."""
        ...


class TextReader:
    """Vectors of texts by any Hugging Face encoder: the mean of its last hidden states over real tokens.

    Of a model with a head, what is in front of the head is read; of an encoder with a decoder, the encoder.

    Args:
        model: as `AutoModel.from_pretrained` gives it.
        tokenizer: its own.

    Example:
        reader = TextReader(AutoModel.from_pretrained(name), AutoTokenizer.from_pretrained(name))
        config = replace(config, vectors=(("text", reader.dim),))
        policy = Policy(network, readers={"text": reader})
    """

    def __init__(self, model: Any, tokenizer: Callable[..., Any]) -> None:
        self.dim = _width(model)
        self._model, self._tokenizer = _without_head(model).eval(), tokenizer
        self._most = _context(model, tokenizer)

    def __call__(self, texts: Sequence[str], scenes: Sequence[str] | None = None) -> Thoughts:
        """Return one vector for each text, in float32; equal texts are read once, scenes not at all.

        Raises ValueError for no texts, one without words, or one that is longer than the model's context.
        """
        _check_texts("TextReader", texts)
        rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        unique = list(rows)
        found = [self._read(unique[i : i + _AT_ONCE]) for i in range(0, len(unique), _AT_ONCE)]
        return Thoughts(tuple(texts), torch.cat(found)[[rows[text] for text in texts]])

    @torch.no_grad()
    def _read(self, texts: list[str]) -> Tensor:
        tokens = _on_device_of(self._model, self._tokenizer(texts, padding=True, return_tensors="pt"))
        mask = tokens["attention_mask"].bool()
        _check_context("TextReader", int(mask.sum(dim=1).max()), self._most, "Tell it in fewer words.")
        states = self._model(**tokens).last_hidden_state
        return Tokens(self.dim)(states, mask).float()


class Thinker:
    """Let any Hugging Face causal language model reason about scene and instruction, and keep its states.

    The model goes on from `prompt`; the vector is the mean of its last hidden states over the tokens that
    it wrote, as the released code of DiffusionVLA pools its reasoning (Wen et al. 2025, arXiv 2412.03293,
    whose section 3.1 names the final embedding), and what it wrote is kept to be shown.

    Args:
        model: as `AutoModelForCausalLM.from_pretrained` gives it.
        tokenizer: its own.
        prompt: with places for {scene} and {instruction}.
        most: how many tokens it may write.

    Example:
        thinker = Thinker(model, tokenizer)
        policy = Policy(network, readers={"thought": thinker})
        policy.reset(["push the red ball to the goal"], scenes=[describe_scene(scene)])
        policy.thoughts["thought"]
    """

    def __init__(self, model: Any, tokenizer: Any, *, prompt: str = PROMPT, most: int = 48) -> None:
        for place in ("{scene}", "{instruction}"):
            if place not in prompt:
                raise ValueError(f"Thinker: expected a prompt with {place}, got {prompt!r}.")
        self._model, self._tokenizer = model.eval(), tokenizer
        self._prompt, self._most = prompt, most
        self._context = _context(model, tokenizer)
        self.dim = _width(model)

    def __call__(self, texts: Sequence[str], scenes: Sequence[str] | None = None) -> Thoughts:
        """Return what it thinks of each instruction in its scene, both in words; greedy, so repeatable.

        Raises ValueError for no texts, no scene for one of them, or more words than the model's context has
        place for.
        """
        _check_texts("Thinker", texts)
        if scenes is None or len(scenes) != len(texts):
            raise ValueError(
                f"Thinker: expected a scene in words for each of {len(texts)} instructions, got "
                f"{None if scenes is None else len(scenes)}. `describe_scene` makes one; give them to "
                f"Policy.reset(..., scenes=...)."
            )
        thought = [self._think(text, scene) for text, scene in zip(texts, scenes, strict=True)]
        return Thoughts(tuple(text for text, _ in thought), torch.stack([vector for _, vector in thought]))

    @torch.no_grad()
    def _think(self, instruction: str, scene: str) -> tuple[str, Tensor]:
        prompt = self._prompt.format(scene=scene, instruction=instruction)
        asked = _on_device_of(self._model, self._tokenizer(prompt, return_tensors="pt"))
        ids = asked["input_ids"]
        length = ids.shape[1] + self._most
        _check_context("Thinker", length, self._context, "Shorten the prompt, or give a smaller `most`.")
        written = self._model.generate(
            ids,
            attention_mask=asked["attention_mask"],
            max_new_tokens=self._most,
            do_sample=False,
            pad_token_id=self._tokenizer.pad_token_id or 0,
        )
        states = self._model(written, output_hidden_states=True).hidden_states[-1]
        new = states[0, ids.shape[1] :].float()
        text = self._tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        return text.strip(), new.mean(dim=0)


def describe_scene(scene: Scene) -> str:
    """A scene in words: what stands where, in centimetres from the arm's base."""
    things = [f"a {t.size} {t.colour} {t.shape} at ({100 * t.x:.0f}, {100 * t.y:.0f})" for t in scene.things]
    spots = (("an obstacle", scene.obstacle), ("the goal", scene.goal))
    places = [f"{name} at ({100 * x:.0f}, {100 * y:.0f})" for name, (x, y) in spots]
    return ", ".join([*things, *places])


def _on_device_of(model: nn.Module, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in tokens.items()}


def _without_head(model: Any) -> Any:
    """The part of a model that ends with hidden states of what it reads."""
    if getattr(model.config, "is_encoder_decoder", False):
        return model.get_encoder()
    return getattr(model, "base_model", model)


def _text_config(model: Any) -> Any:
    """What describes the part that reads text; a model of several kinds keeps it apart."""
    config = getattr(model, "config", None)
    apart = getattr(config, "get_text_config", None)
    return config if apart is None else apart()


def _width(model: Any) -> int:
    config = _text_config(model)
    width = getattr(config, "hidden_size", None) or getattr(config, "d_model", None)
    if not isinstance(width, int):
        raise ValueError(
            f"expected a Hugging Face model with config.hidden_size, got {type(model).__name__}. "
            "Wrap it in a module whose config has it."
        )
    return width


def _context(model: Any, tokenizer: Any) -> float:
    """How many tokens fit, as far as model and tokenizer say."""
    positions = getattr(_text_config(model), "max_position_embeddings", None)
    said = (positions, getattr(tokenizer, "model_max_length", None))
    return min([number for number in said if number], default=float("inf"))


def _check_texts(reader: str, texts: Sequence[str]) -> None:
    if len(texts) == 0:
        raise ValueError(f"{reader}: expected texts, got none.")
    for text in texts:
        if not text.strip():
            raise ValueError(f"{reader}: expected words, got {text!r}. For no instruction at all tell None.")


def _check_context(reader: str, length: int, most: float, remedy: str) -> None:
    if length > most:
        raise ValueError(
            f"{reader}: expected at most {most:.0f} tokens, the model's context, got {length}. {remedy}"
        )
