"""`macpo schema`: recipes as a JSON schema, by which editors complete, explain and check them."""

from __future__ import annotations

import json
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from macpo.recipe_kinds import KINDS

_DEFAULT = "macpo"


class _Untitled(GenerateJsonSchema):
    """Without titles of fields, which would only say their names again."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def schema() -> str:
    """The schema of every kind of recipe as JSON text; the key `recipe` says of which kind a recipe is."""
    return json.dumps(body(), indent=1, ensure_ascii=False) + "\n"


def body() -> dict[str, Any]:
    """The schema of every kind of recipe."""
    models = [(kind, "validation") for kind in KINDS.values()]
    references, made = models_json_schema(models, schema_generator=_Untitled)  # type: ignore[arg-type]
    of_kind = {name: references[kind, "validation"] for name, kind in KINDS.items()}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Recipe of macpo",
        "type": "object",
        "properties": {"recipe": {"enum": list(KINDS), "default": _DEFAULT, "description": "Kind of recipe."}},
        "allOf": [{"if": _says(name), "then": reference} for name, reference in of_kind.items()],
        "$defs": made["$defs"],
    }


def _says(kind: str) -> dict[str, Any]:
    """The schema of what is of a kind; `required` because `properties` alone holds without the key too."""
    said = {"properties": {"recipe": {"const": kind}}}
    return said if kind == _DEFAULT else said | {"required": ["recipe"]}
