"""What goes over the wire of the policy's page, as OpenAPI describes it. Positions are metres, from above."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from torchfilm.app.messages import LARGEST_SEED, Part

MOST_INSTRUCTIONS = 4
Text = Annotated[str, Field(min_length=1, max_length=200)]
Place = tuple[float, float]


class ThingReply(BaseModel):
    """One thing on the table."""

    name: str = Field(examples=["large red ball"])
    shape: str = Field(examples=["ball"])
    colour: str = Field(description="as CSS has it", examples=["rgb(219, 41, 41)"])
    radius: float = Field(examples=[0.04])
    at: Place


class TableReply(BaseModel):
    """A table as it stands before anything is told."""

    seed: int = Field(examples=[7])
    things: list[ThingReply]
    obstacle: Place
    goal: Place
    places: dict[str, Place] = Field(description="the edges to which things can be pushed")
    finger: Place
    elbow: Place
    examples: list[list[str]] = Field(
        description="deeds, each told plainly, with care for the obstacle, sparing energy, and both",
        examples=[
            [["push the red ball to the goal", "push the red ball to the goal and avoid the obstacle"]]
        ],
    )


class TellRequest(BaseModel):
    """What to tell the arm; each instruction is played on the same table."""

    model_config = ConfigDict(extra="forbid")

    scene: int = Field(ge=0, le=LARGEST_SEED, examples=[7])
    instructions: list[Text] = Field(
        min_length=1, max_length=MOST_INSTRUCTIONS, examples=[["push the red ball to the goal"]]
    )


class ToldReply(BaseModel):
    """What came of one instruction, 20 frames a second."""

    instruction: str
    understood: str = Field(examples=["push the large red ball to the goal"])
    success: bool = Field(description="of what was understood")
    energy: float = Field(description="joules", examples=[0.43])
    seconds: float = Field(examples=[3.1])
    collisions: int = Field(description="how many times the obstacle was touched", examples=[0])
    clearance: float = Field(description="least distance from the obstacle, negative inside", examples=[0.02])
    looked: list[float] = Field(description="how much each thing was meant, shares of 1")
    places: dict[str, float] = Field(description="where to, shares of 1; 'here': nowhere, it is reached")
    finger: list[Place]
    elbow: list[Place]
    things: list[list[Place]] = Field(description="per frame, of each thing")
    modulations: dict[str, Part] = Field(description="γ and β of each site, in the order of the computation")


class TellReply(BaseModel):
    """One for each instruction."""

    told: list[ToldReply]
