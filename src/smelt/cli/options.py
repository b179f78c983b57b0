"""Options that several commands share, declared once."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from smelt.recipe.schema import Relaxation

Allow = Annotated[list[Relaxation], Parameter(negative="")]
Flag = Annotated[bool, Parameter(negative="")]
Json = Annotated[bool, Parameter(name="--json", negative="")]
Quiet = Annotated[bool, Parameter(name=["--quiet", "-q"], negative="")]
Seed = Annotated[int, Parameter(name=["--seed", "--random-seed"])]
Verbose = Annotated[bool, Parameter(name=["--verbose", "-v"], negative="")]
