"""Instructions read by pretrained language models: any encoder, or any causal model that thinks aloud.

What they make of a text is a vector, which a policy hears beside its own words or instead of them
(`PolicyConfig.vectors`). The models are frozen and run once per instruction, not once per action.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torchfilm.conditions import Tokens
from torchfilm.data.table.scenes import Scene

PROMPT = """Scene: {scene}
Instruction: {instruction}
Reasoning: the arm should"""
"""What a language model is asked to go on with."""


@dataclass(frozen=True, eq=False)
class Thoughts:
    """What a language model thought: the words it wrote, and one vector for each text."""

    texts: tuple[str, ...]
    vectors: Float[Tensor, "batch dim"]


class TextReader:
    """Vectors of texts by any Hugging Face encoder: the mean of its last hidden states over real tokens.

    Args:
        model: as `AutoModel.from_pretrained` gives it; its last hidden states are read.
        tokenizer: its own.

    Example:
        reader = TextReader(AutoModel.from_pretrained(name), AutoTokenizer.from_pretrained(name))
        config = replace(config, vectors=(("text", reader.dim),))
        policy.reset(texts, {"text": reader(texts)})
    """

    def __init__(self, model: nn.Module, tokenizer: Callable[..., Any]) -> None:
        self._model, self._tokenizer = model.eval(), tokenizer
        self.dim = _width(model)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "batch dim"]:
        """Return one vector for each text, in float32; equal texts are read once."""
        rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        if not rows:
            raise ValueError("TextReader: expected texts, got none.")
        tokens = self._tokenizer(list(rows), padding=True, return_tensors="pt")
        states = self._model(**tokens).last_hidden_state
        pooled = Tokens(self.dim)(states, tokens["attention_mask"].bool()).float()
        return pooled[torch.tensor([rows[text] for text in texts])]


class Thinker:
    """Let any Hugging Face causal language model reason about scene and instruction, and keep its states.

    The model goes on from `prompt`; the vector is the mean of its last hidden states over the tokens that
    it wrote (as DiffusionVLA pools its reasoning, Wen et al. 2025, arXiv 2412.03293, section 3), and what it
    wrote is kept to be shown.

    Args:
        model: as `AutoModelForCausalLM.from_pretrained` gives it.
        tokenizer: its own.
        prompt: with places for {scene} and {instruction}.
        most: how many tokens it may write.

    Example:
        thinker = Thinker(model, tokenizer)
        thoughts = thinker([describe_scene(scene)], ["push the red ball to the goal"])
        policy.reset(instructions, {"thought": thoughts.vectors})
    """

    def __init__(self, model: Any, tokenizer: Any, *, prompt: str = PROMPT, most: int = 48) -> None:
        for place in ("{scene}", "{instruction}"):
            if place not in prompt:
                raise ValueError(f"Thinker: expected a prompt with {place}, got {prompt!r}.")
        self._model, self._tokenizer = model.eval(), tokenizer
        self._prompt, self._most = prompt, most
        self.dim = _width(model)

    def __call__(self, scenes: Sequence[str], instructions: Sequence[str]) -> Thoughts:
        """Return what it thinks of each instruction in its scene, both in words; greedy, so repeatable.

        Raises ValueError for different numbers of scenes and instructions.
        """
        pairs: Iterable[tuple[str, str]] = zip(scenes, instructions, strict=True)
        thought = [self._think(scene, instruction) for scene, instruction in pairs]
        if not thought:
            raise ValueError("Thinker: expected scenes and instructions, got none.")
        return Thoughts(tuple(text for text, _ in thought), torch.stack([vector for _, vector in thought]))

    @torch.no_grad()
    def _think(self, scene: str, instruction: str) -> tuple[str, Tensor]:
        asked = self._tokenizer(
            self._prompt.format(scene=scene, instruction=instruction), return_tensors="pt"
        )
        ids = asked["input_ids"]
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


def _width(model: Any) -> int:
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    if not isinstance(width, int):
        raise ValueError(
            f"expected a Hugging Face model with config.hidden_size, got {type(model).__name__}. "
            "Wrap it in a module whose config has it."
        )
    return width
