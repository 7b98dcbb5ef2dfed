"""Events and status: the contract's JSON, and sentences that a person wants to read."""

import json
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodewalld.core.events import (
    ConfigStatus,
    Contention,
    Culprit,
    Event,
    Kind,
    Process,
    Reason,
    State,
    Status,
    duration,
    printable,
    rfc3339,
)
from nodewalld.core.words import Backend, Family, Table

WHEN = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)
BASH = Culprit(4711, "iptables", (Process(4001, "bash"),))


def repair(**changes: object) -> Event:
    values: dict[str, object] = {
        "time": WHEN,
        "kind": Kind.REPAIR,
        "what": "put back the jump to NODEWALL-PREROUTING",
        "family": Family.IPV4,
        "table": Table.MANGLE,
        "chain": "PREROUTING",
        "reason": Reason.MISSING,
        **changes,
    }
    return Event(**values)  # type: ignore[arg-type]


def test_a_repair_says_what_where_why_who_and_how_long() -> None:
    assert repair(by=BASH, exposed_ms=1.2, flows_deleted=2).sentence() == (
        "Put back the jump to NODEWALL-PREROUTING in mangle PREROUTING (IPv4): it was missing; "
        "removed by iptables (pid 4711, started by bash (pid 4001)); exposed for 1.2 ms; 2 flows cut"
    )


@pytest.mark.parametrize(
    ("reason", "end"),
    [
        (Reason.MISSING, "it was missing"),
        (Reason.DISPLACED, "it was displaced"),
        (Reason.CHANGED, "it was changed"),
        (Reason.FLUSHED, "it was flushed"),
    ],
)
def test_where_the_kernel_names_nobody_the_sentence_names_nobody(reason: Reason, end: str) -> None:
    assert repair(reason=reason).sentence().endswith(f"(IPv4): {end}")


def test_an_event_without_a_place_is_its_own_sentence() -> None:
    event = Event(time=WHEN, kind=Kind.RELOAD, what="took /etc/nodewalld, generation 2")
    assert event.sentence() == "Took /etc/nodewalld, generation 2"


def test_the_json_of_an_event_is_the_contracts() -> None:
    value = repair(by=BASH, exposed_ms=1.25, latency_ms=0.5, entries=("port/vault",)).to_json()
    assert json.loads(json.dumps(value)) == {
        "time": "2026-01-02T03:04:05.000006Z",
        "kind": "repair",
        "family": "ipv4",
        "table": "mangle",
        "chain": "PREROUTING",
        "reason": "missing",
        "what": "put back the jump to NODEWALL-PREROUTING",
        "entries": ["port/vault"],
        "by": {"pid": 4711, "comm": "iptables", "name": "bash", "parents": [{"pid": 4001, "comm": "bash"}]},
        "exposed_ms": 1.25,
        "latency_ms": 0.5,
        "flows_deleted": 0,
        "message": repair(by=BASH, exposed_ms=1.25).sentence(),
    }


def test_what_is_not_known_is_null() -> None:
    value = Event(time=WHEN, kind=Kind.START, what="started").to_json()
    assert [value[key] for key in ("family", "table", "chain", "reason", "by", "exposed_ms")] == [None] * 6


def test_times_are_utc_with_microseconds_and_sort_as_texts() -> None:
    there = datetime(2026, 1, 2, 5, 4, 5, tzinfo=timezone(timedelta(hours=2)))
    assert rfc3339(there) == "2026-01-02T03:04:05.000000Z"
    with pytest.raises(ValueError, match="time zone"):
        Event(time=datetime(2026, 1, 2), kind=Kind.START, what="x")  # noqa: DTZ001 - the mistake itself


@given(st.text())
def test_no_name_that_a_stranger_chooses_leaves_its_line(text: str) -> None:
    sentence = repair(by=Culprit(1, text, (Process(2, text),)), chain=text, what=text).sentence()
    assert sentence.isprintable()
    assert printable(printable(text)) == printable(text)


def test_undecodable_names_become_valid_json() -> None:
    value = Process(1, b"caf\xe9".decode(errors="surrogateescape")).to_json()
    json.dumps(value, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("culprit", "name"),
    [
        (Culprit(1, "iptables-nft-re", (Process(2, "dockerd"), Process(3, "systemd"))), "dockerd"),
        (Culprit(1, "iptables", (Process(2, "ip6tables"), Process(3, "sh"))), "sh"),
        (Culprit(1, "iptables"), "iptables"),
        (Culprit(1, "kube-proxy", (Process(2, "containerd-shim"),)), "kube-proxy"),
    ],
)
def test_the_name_to_look_at_is_who_used_the_tool(culprit: Culprit, name: str) -> None:
    assert culprit.name == name


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [(0.04, "0.0 ms"), (1.25, "1.2 ms"), (450, "450 ms"), (3400, "3.4 s"), (180_000, "3 min")],
)
def test_durations_are_short(milliseconds: float, text: str) -> None:
    assert duration(milliseconds) == text


def status(**changes: object) -> Status:
    values: dict[str, object] = {
        "state": State.ENFORCING,
        "since": WHEN,
        "version": "1",
        "pid": 7,
        "config": ConfigStatus(path="/etc/nodewalld", generation=2, loaded_at=WHEN),
        "backend": Backend.NFT,
        "desired": 12,
        "in_place": 12,
        "families": {Family.IPV4: State.ENFORCING},
        **changes,
    }
    return Status(**values)  # type: ignore[arg-type]


def test_the_json_of_a_status_has_what_the_contract_names() -> None:
    contention = Contention(
        family=Family.IPV4, table=Table.FILTER, chain="FORWARD", what="felix insists", repairs=9, since=WHEN
    )
    value = json.loads(json.dumps(status(last_repair=repair(), repairs=1, contention=(contention,)).to_json()))
    assert value["state"] == "enforcing"
    assert value["backend"] == "nft"
    assert value["rules"] == {"desired": 12, "in_place": 12}
    assert value["config"]["loaded_at"] == "2026-01-02T03:04:05.000006Z"
    assert set(value["config"]) == {"path", "generation", "loaded_at", "error"}
    assert value["last_repair"]["kind"] == "repair"
    assert value["contention"][0]["what"] == "felix insists"
    assert value["families"] == {"ipv4": "enforcing"}
    assert {"reasons", "version", "repairs", "since", "pid"} <= set(value)


def test_the_sentence_for_systemd_says_what_matters_first() -> None:
    assert status().sentence() == "Enforcing: 12 rules in force (nft)"
    assert status(repairs=2, last_repair=repair(by=BASH)).sentence() == (
        "Enforcing: 12 rules in force (nft); 2 repairs, the last at 03:04:05 UTC in mangle PREROUTING (IPv4), by bash"
    )
    degraded = status(state=State.DEGRADED, in_place=10, reasons=("no chain DOCKER-USER", "b", "c"))
    assert degraded.sentence() == (
        "Degraded: 10 of 12 rules in place (nft); no chain DOCKER-USER; 2 more (nodewallctl status)"
    )
