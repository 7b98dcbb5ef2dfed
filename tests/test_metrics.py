"""Metrics: what node_exporter's textfile collector finds, from unit to packets, and the alerts that are built on it."""

import json
import re
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from entries import FRIENDS, VAULT
from live import at_rest, disturb
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from lab import layout
from lab.daemon import Daemon
from lab.node import Node
from lab.traffic import Probe, connect_all
from lab.waiting import wait_for
from nodewalld.core.events import ConfigStatus, Count, Culprit, Event, Kind, Neighbour, Reason, State, Status
from nodewalld.core.words import Backend, Family, Table
from nodewalld.service.metrics import WRITE_EVERY, Metrics, Snapshot

ROOT = Path(__file__).resolve().parent.parent
WHEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
STATUS = Status(
    state=State.ENFORCING,
    since=WHEN,
    version="1.2",
    pid=1,
    config=ConfigStatus(path="/etc/nodewalld", generation=3, loaded_at=WHEN),
    backend=Backend.NFT,
    desired=7,
    in_place=6,
    families={Family.IPV4: State.ENFORCING, Family.IPV6: State.DEGRADED},
    neighbours=(Neighbour(name="Docker", what="dead", since=WHEN, cure="restart it", jumps=("a", "b")),),
)
COUNTS = (
    Count(Family.IPV4, Table.MANGLE, "NODEWALL-x-web", "port/web", "DROP", 3, 120),
    Count(Family.IPV4, Table.MANGLE, "NODEWALL-x-web", "port/web", "DROP", 4, 160),
)


def repair(by: str | None = "iptables") -> Event:
    return Event(
        time=WHEN,
        kind=Kind.REPAIR,
        what="put back",
        family=Family.IPV4,
        table=Table.MANGLE,
        chain="PREROUTING",
        reason=Reason.MISSING,
        by=Culprit(7, by) if by else None,
        exposed_ms=20.0,
    )


def snapshot() -> Snapshot:
    return Snapshot(STATUS, {"friends": 2}, COUNTS)


def samples(path: Path) -> dict[tuple[str, ...], float]:
    """Every sample of the file: its name and the values of its labels, in the labels' alphabetical order."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families((path / "nodewalld.prom").read_text())
        for sample in family.samples
    }


def test_the_file_tells_state_events_sets_and_counters(tmp_path: Path) -> None:
    metrics = Metrics()
    metrics.write(str(tmp_path), snapshot, 100.0)
    metrics.take(repair())
    metrics.take(repair(None))
    metrics.passed(0.002)
    metrics.write(str(tmp_path), snapshot, 100.0 + WRITE_EVERY)
    found = samples(tmp_path)
    expected = {
        ("nodewalld_info", "nft", "1.2"): 1,
        ("nodewalld_state", "enforcing"): 1,
        ("nodewalld_state", "degraded"): 0,
        ("nodewalld_family_enforcing", "ipv4"): 1,
        ("nodewalld_family_enforcing", "ipv6"): 0,
        ("nodewalld_rules_desired",): 7,
        ("nodewalld_rules_in_place",): 6,
        ("nodewalld_config_generation",): 3,
        ("nodewalld_config_refused",): 0,
        ("nodewalld_config_loaded_timestamp_seconds",): WHEN.timestamp(),
        ("nodewalld_set_entries", "friends"): 2,
        ("nodewalld_neighbour_lost", "Docker"): 2,
        ("nodewalld_rule_packets_total", "NODEWALL-x-web", "port/web", "ipv4", "mangle", "DROP"): 7,
        ("nodewalld_rule_bytes_total", "NODEWALL-x-web", "port/web", "ipv4", "mangle", "DROP"): 280,
        ("nodewalld_repairs_total", "iptables", "PREROUTING", "ipv4", "missing", "mangle"): 1,
        ("nodewalld_repairs_total", "unknown", "PREROUTING", "ipv4", "missing", "mangle"): 1,
        ("nodewalld_exposure_seconds_sum", "ipv4", "mangle"): 0.04,
        ("nodewalld_exposure_seconds_count", "ipv4", "mangle"): 2,
        ("nodewalld_pass_seconds_count",): 1,
    }
    assert {key: found.get(key) for key in expected} == pytest.approx(expected)


def test_node_exporter_may_read_the_file_and_finds_it_whole(tmp_path: Path) -> None:
    Metrics().write(str(tmp_path), snapshot, 100.0)
    assert [path.name for path in tmp_path.iterdir()] == ["nodewalld.prom"]
    assert (tmp_path / "nodewalld.prom").stat().st_mode & 0o777 == 0o644


def test_the_disk_is_not_written_more_often_than_anybody_scrapes(tmp_path: Path) -> None:
    metrics, looks = Metrics(), []

    def look() -> Snapshot:
        looks.append(1)
        return snapshot()

    for turn in range(100):
        metrics.write(str(tmp_path), look, 100.0 + turn * WRITE_EVERY / 100)
        metrics.passed(0.001)
    assert len(looks) == 1
    metrics.write(str(tmp_path), look, metrics.due)
    assert len(looks) == 2
    assert metrics.due == float("inf")


def test_a_folder_that_takes_no_file_is_told_once_and_harms_nothing(tmp_path: Path) -> None:
    metrics, gone = Metrics(), tmp_path / "gone"
    with capture_logs() as logs:
        for turn in range(3):
            metrics.passed(0.001)
            metrics.write(str(gone), snapshot, 100.0 + turn * WRITE_EVERY)
    assert [log["event"] for log in logs] == [
        f"Metrics can't be written to {gone}/nodewalld.prom: No such file or directory"
    ]
    gone.mkdir()
    metrics.passed(0.001)
    metrics.write(str(gone), snapshot, 200.0)
    assert samples(gone)


def test_what_is_no_longer_written_is_taken_away(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    metrics = Metrics()
    metrics.write(str(first), snapshot, 100.0)
    metrics.write(str(second), snapshot, 100.1)
    assert [list(first.iterdir()), len(list(second.iterdir()))] == [[], 1]
    metrics.write("", snapshot, 100.2)
    assert not list(second.iterdir())


def test_strangers_names_do_not_make_time_series_without_end(tmp_path: Path) -> None:
    metrics = Metrics()
    metrics.write(str(tmp_path), snapshot, 100.0)
    for number in range(200):
        metrics.take(repair(f"stranger{number}"))
    metrics.passed(0.001)
    metrics.write(str(tmp_path), snapshot, 200.0)
    repairs = {key: value for key, value in samples(tmp_path).items() if key[0] == "nodewalld_repairs_total"}
    assert len(repairs) == 31
    assert repairs["nodewalld_repairs_total", "other", "PREROUTING", "ipv4", "missing", "mangle"] == 170


def test_who_wants_no_metrics_does_not_pay_for_the_library() -> None:
    code = (
        "import sys, nodewalld.daemon; from nodewalld.service.metrics import Metrics; m = Metrics()\n"
        "m.passed(1.0); m.write('', None, 1.0); print('prometheus_client' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


CONFIG = f"""
[daemon]
metrics = "{{folder}}"
{FRIENDS}{VAULT}
[[port]]
name = "counted"
ports = [31003]
protocol = "udp"
enforce = false
"""


@pytest.mark.kernel
def test_a_live_daemon_counts_the_same_packets_as_the_kernel(kube_node: Node) -> None:
    folder = kube_node.directory / "metrics"
    folder.mkdir()
    with Daemon(kube_node, CONFIG.format(folder=folder) + "[[jump]]\n" + JUMP) as daemon:
        daemon.wait_ready()
        probes = [
            Probe("client", (layout.NODE.of(family), port), source=layout.STRANGER.of(family), protocol=protocol)
            for family in layout.FAMILIES
            for port, protocol in ((31002, "tcp"), (31003, "udp"))
        ]
        connect_all(kube_node, probes)
        disturb(kube_node, ["iptables -I FORWARD -j ACCEPT"])
        at_rest(daemon)
        shown = json.loads(daemon.ctl("show", "--json").stdout)["rules"]
        seen: Counter[tuple[str, str]] = Counter()
        for row in shown:
            if row["chain"] in (f"{row['family']}-refuse-port/vault", "NODEWALL-x-counted"):
                seen[row["family"], row["chain"]] += row["packets"]
        assert len(seen) == 4
        assert all(seen.values())

        def told() -> bool:
            found = samples(folder)
            counters = {key: value for key, value in found.items() if key[0] == "nodewalld_rule_packets_total"}
            assert all(key[2::2] == ("port/vault", "shield") for key in counters if "refuse-port" in key[1])
            return found["nodewalld_state", "enforcing"] == found["nodewalld_shield", "owned"] == 1 and all(
                any(key[1] == chain and key[3] == family and value == packets for key, value in counters.items())
                for (family, chain), packets in seen.items()
            )

        wait_for(lambda: (folder / "nodewalld.prom").exists() and told(), timeout=20, what="the counters in the file")
        repairs = [key for key in samples(folder) if key[0] == "nodewalld_repairs_total"]
        assert ["FORWARD", "ipv4", "displaced", "filter"] in [list(key[2:]) for key in repairs]
        daemon.stop()
        assert not list(folder.iterdir())


JUMP = 'name = "docker-user"\ntable = "filter"\nfrom = "FORWARD"\nto = "DOCKER-USER"\n'


def test_every_alert_asks_for_metrics_that_there_are(tmp_path: Path) -> None:
    metrics = Metrics()
    metrics.write(str(tmp_path), snapshot, 100.0)
    metrics.take(repair())
    metrics.passed(0.1)
    metrics.write(str(tmp_path), snapshot, 200.0)
    families = list(text_string_to_metric_families((tmp_path / "nodewalld.prom").read_text()))
    known = {sample.name for family in families for sample in family.samples} | {family.name for family in families}
    labels = {label for family in families for sample in family.samples for label in sample.labels}
    groups = yaml.safe_load((ROOT / "docs/alerts.yml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) >= 6
    for rule in rules:
        names = set(re.findall(r"nodewalld_\w+", rule["expr"]))
        assert names
        assert names <= known, rule["alert"]
        used = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
        assert used <= labels | {"instance"}, rule["alert"]
