"""Options that several commands share, declared once. That a flag is off unless it is given needs no saying."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from smelt.recipe.schema import Relaxation

Allow = Annotated[list[Relaxation], Parameter(negative="", show_default=False)]
Flag = Annotated[bool, Parameter(negative="", show_default=False)]
Json = Annotated[bool, Parameter(name="--json", negative="", show_default=False)]
Quiet = Annotated[bool, Parameter(name=["--quiet", "-q"], negative="", show_default=False)]
Seed = Annotated[int, Parameter(name=["--seed", "--random-seed"])]
Verbose = Annotated[bool, Parameter(name=["--verbose", "-v"], negative="", show_default=False)]
