"""What goes over the wire: the requests and replies of the server's API, as OpenAPI describes them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from torchfilm.systems.visual_reasoning.answering import MAX_QUESTION_CHARACTERS

LARGEST_SEED = 2**32 - 1


class ErrorReply(BaseModel):
    """Every answer with a status of 4xx or 5xx."""

    error: str = Field(examples=["unknown word 'sphear'; the nearest known words are sphere, spheres, shape"])
    word: str | None = Field(None, description="for an unknown word: the word", examples=["sphear"])
    nearest: list[str] | None = Field(None, description="for an unknown word: the nearest known ones")


class Example(BaseModel):
    """A question about this scene, and its answer by the scene's facts."""

    question: str = Field(examples=["How many red cubes are left of the sphere?"])
    answer: str = Field(examples=["2"])


class SceneReply(BaseModel):
    """A fresh scene."""

    seed: int = Field(examples=[7])
    image: str = Field(
        description="data URL of a PNG of 480 x 320 pixels", examples=["data:image/png;base64,iVBORw0K"]
    )
    examples: list[Example]
    facts: list[dict[str, str]] | None = Field(
        None, examples=[[{"size": "large", "color": "red", "material": "metal", "shape": "cube"}]]
    )


class UploadReply(BaseModel):
    """An uploaded picture, as the network will see it."""

    id: str = Field(description="name of the picture for /api/ask", examples=["3f1c0a9be2d47756"])
    image: str = Field(description="data URL of a PNG of 480 x 320 pixels: cropped at the centre to 3:2")


class AskRequest(BaseModel):
    """A question about a scene (by seed) or an uploaded picture (by id), optionally with γ and β turned."""

    model_config = ConfigDict(extra="forbid")

    question: str = Field(
        max_length=MAX_QUESTION_CHARACTERS, examples=["How many red cubes are left of the sphere?"]
    )
    scene: int | None = Field(None, ge=0, le=LARGEST_SEED, examples=[7])
    image: str | None = Field(None, max_length=64, examples=[None])
    edits: dict[str, dict[Literal["gamma", "beta"], dict[int, float]]] | None = Field(
        None,
        description="block -> gamma or beta -> channel -> value; gamma is the final factor, 1 does nothing",
        examples=[{"block1": {"gamma": {"0": 1.0}, "beta": {"0": 0.0}}}],
    )
    top: int = Field(5, ge=1, le=1000, description="how many answers to list")


class Ranked(BaseModel):
    """An answer and its probability."""

    answer: str = Field(examples=["2"])
    probability: float = Field(examples=[0.97])


class Part(BaseModel):
    """γ and β of one block, one number per channel."""

    gamma: list[float] = Field(examples=[[1.3, -0.2]])
    beta: list[float] = Field(examples=[[-0.4, 0.1]])


class AskReply(BaseModel):
    """The answer and its grounds."""

    answer: str = Field(examples=["2"])
    probability: float = Field(examples=[0.97])
    runner_up: str = Field(examples=["1"])
    probabilities: list[Ranked]
    modulations: dict[str, Part] = Field(description="what was applied, edits included")
    looked: list[list[int]] = Field(
        description="per cell of the picture, row 0 on top: how many channels have their maximum there",
        examples=[[[0, 3], [12, 1]]],
    )
    tokens: list[str] = Field(
        description="the question as understood", examples=[["How", "many", "red", "cubes"]]
    )


class HealthReply(BaseModel):
    """The server is up."""

    status: Literal["ok"] = "ok"
    seconds_up: float = Field(examples=[12.5])
