"""`smelt schema`."""

from __future__ import annotations

import json

from smelt.recipe.editor import editor_schema


def schema() -> int:
    """Print the JSON schema of the recipe language.

    Editors complete and check YAML with it.
    """
    print(json.dumps(editor_schema(), indent=1))
    return 0
