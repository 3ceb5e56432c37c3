"""Options that may be left out, as the help shows them: the kind of value, and no "None"."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

OptionalPath = Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="")]
OptionalText = Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")]
OptionalInt = Annotated[int | None, arg(metavar="NUMBER", help_behavior_hint="")]
OptionalFloat = Annotated[float | None, arg(metavar="NUMBER", help_behavior_hint="")]
SystemName = Annotated[Positional[str], arg(metavar="SYSTEM")]
RunPath = Annotated[Positional[Path | None], arg(metavar="RUN", help_behavior_hint="")]
