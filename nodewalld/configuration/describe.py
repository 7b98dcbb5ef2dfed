"""The configuration's description for editors and other programs: one JSON Schema, made of the readers' own.

Law: there is no key here. What `SECTIONS` has is described; what is described is what is read. The schema judges one
file, so of a table that may go on in another file no key is required; entries of a list are whole.
"""

from typing import Any

from nodewalld.configuration.reading import Schema, Section, Shape, described
from nodewalld.configuration.schema import SECTIONS

_DRAFT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """The schema of a nodewalld.toml (draft 2020-12). All that the loader takes fits it."""
    return {
        "$schema": _DRAFT,
        "title": "nodewalld.toml",
        "type": "object",
        "properties": {name: _section(section) for name, section in SECTIONS.items()},
        "additionalProperties": False,
    }


def _section(section: Section) -> Schema:
    table = {"description": section.meaning, **described(section.keys)}
    if section.shape is Shape.LISTED:
        required = [name for name, key in section.keys.items() if key.example]
        return {"type": "array", "items": {**table, "required": required}}
    if section.shape is Shape.NAMED:
        return {"type": "object", "propertyNames": section.names, "additionalProperties": table}
    return table
