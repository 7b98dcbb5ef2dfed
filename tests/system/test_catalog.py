"""`journalctl -x` explains every kind of event that the journal tells of."""

import re
from pathlib import Path

import pytest

from nodewalld.core.events import Kind
from nodewalld.service.journal import MESSAGE_IDS

ROOT = Path(__file__).resolve().parent.parent.parent
CATALOG = (ROOT / "systemd/nodewalld.catalog").read_text()
ENTRY = re.compile(r"^-- ([0-9a-f]{32})\n(.*?)(?=^-- |\Z)", re.MULTILINE | re.DOTALL)
ENTRIES = {match[1]: match[2] for match in ENTRY.finditer(CATALOG)}
FIELDS = {"NODEWALLD_FAMILY", "NODEWALLD_TABLE", "NODEWALLD_CHAIN", "NODEWALLD_REASON"}


def test_each_kind_of_event_has_an_id_and_each_id_an_entry() -> None:
    assert set(MESSAGE_IDS) == set(Kind)
    assert len(set(MESSAGE_IDS.values())) == len(Kind)
    assert set(ENTRIES) == set(MESSAGE_IDS.values())


@pytest.mark.parametrize("kind", Kind)
def test_an_entry_has_a_subject_an_explanation_and_something_to_do(kind: Kind) -> None:
    head, _, body = ENTRIES[MESSAGE_IDS[kind]].partition("\n\n")
    keys = dict(line.split(": ", 1) for line in head.splitlines())
    assert set(keys) == {"Subject", "Defined-By", "Documentation"}
    assert keys["Defined-By"] == "nodewalld"
    explanation, *todo = body.strip().split("\n\n")
    assert explanation
    assert todo, "what is one to do?"
    assert set(re.findall(r"@(\w+)@", body)) <= FIELDS
