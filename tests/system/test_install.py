"""A package's life on a machine: installed, upgraded without a gap, removed, purged, installed again."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from booted import Machine
from built import NEXT, Packages
from guarded import DROPPED, UNIT, flood, guard, main_pid, passed, rules, sent, wait_until_back

FOREIGN = '-A INPUT -s 192.0.2.7/32 -p tcp -m comment --comment "somebody\'s" -j DROP'
READY_WITHIN = 10.0
# A jump to a chain that another program has made bears no tag, because that program must find it: so it stays.
JUMP = "iptables filter -A FORWARD -j DOCKER-USER"


class Flavour(NamedTuple):
    """A packaging system on a Debian."""

    suite: str
    kind: str

    def install(self, machine: Machine, packages: Packages) -> None:
        if self.kind == "deb":
            # As apt calls it: nobody is there to answer questions.
            machine.run(f"apt-get install -y -qq {machine.put(packages.deb)} </dev/null")
        else:
            machine.run(f"rpm -U --nodeps --force-debian {machine.put(packages.rpm)}")

    def remove(self, machine: Machine) -> str:
        command = "apt-get remove -y" if self.kind == "deb" else "rpm -e --nodeps --force-debian"
        done = machine.run(f"{command} nodewalld")
        return done.stdout + done.stderr


FLAVOURS = [Flavour("bookworm", "deb"), Flavour("trixie", "deb"), Flavour("bookworm", "rpm")]


@pytest.fixture(params=FLAVOURS, ids=lambda flavour: f"{flavour.kind}-{flavour.suite}")
def flavour(request: pytest.FixtureRequest) -> Flavour:
    return request.param


@pytest.fixture
def bare(flavour: Flavour, roots: Mapping[str, Path], boot: Callable[[list[Path]], Machine]) -> Machine:
    """A booted machine without nodewalld."""
    return boot([roots[flavour.suite]])


@pytest.fixture
def machine(bare: Machine, flavour: Flavour, packages: Packages) -> Machine:
    """The same with nodewalld running."""
    flavour.install(bare, packages)
    if flavour.kind == "rpm":
        bare.run(f"systemctl enable --now {UNIT}")
    return bare


def traces(machine: Machine) -> set[str]:
    """Every file on the machine that could be of the package."""
    where = "/etc /usr /var /run -xdev"
    records = ("/var/lib/dpkg", "/var/lib/rpm", "/var/cache", "/var/log")  # of what was once installed
    ignored = " -o ".join(f"-path {path} -prune" for path in records)
    return set(machine.run(f"find {where} {ignored} -o -iname '*nodewall*' -print").stdout.split())


def test_installing_changes_no_rule_and_starts_as_each_system_does_it(
    bare: Machine, flavour: Flavour, packages: Packages, record_property: Callable[[str, object], None]
) -> None:
    before = rules(bare)
    began = time.monotonic()
    flavour.install(bare, packages)
    if flavour.kind == "rpm":  # whose packages don't start what they install
        assert bare.property(UNIT, "ActiveState") == "inactive"
        bare.run(f"systemctl enable --now {UNIT}")
    took = time.monotonic() - began
    record_property("seconds from install to READY", round(took, 2))
    print(f"{flavour.kind} on {flavour.suite}: {took:.2f} s from install to READY")
    assert bare.property(UNIT, "SubState") == "running"
    assert bare.run(f"systemctl is-enabled {UNIT}").stdout.strip() == "enabled"
    assert took < READY_WITHIN
    assert rules(bare) == before
    assert bare.run("systemctl is-system-running").stdout.strip() == "running"
    assert bare.run("nodewallctl check").stdout.strip().endswith("nothing will be enforced")
    assert bare.run("stat -c %a /run/xtables.lock").stdout.strip() == "600"
    assert int(bare.run("journalctl --list-catalog | grep -c nodewalld").stdout) >= 10


def test_an_upgrade_keeps_the_configuration_and_leaves_no_gap(
    machine: Machine, flavour: Flavour, next_packages: Packages
) -> None:
    machine.add_peer()
    guard(machine)
    config = machine.path("/etc/nodewalld/nodewalld.toml").read_text()
    before, old = rules(machine), main_pid(machine)
    with flood(machine) as counts:
        since, at_first = time.monotonic(), sent(counts())
        flavour.install(machine, next_packages)
        wait_until_back(machine, old, 10)
        rate = (sent(counts()) - at_first) / (time.monotonic() - since)
    print(f"{flavour.kind} on {flavour.suite}: {rate:.0f} packets a second, {passed(counts())} passed")
    assert rate >= 10_000
    assert passed(counts()) == 0
    assert rules(machine) == before
    assert machine.path("/etc/nodewalld/nodewalld.toml").read_text() == config
    assert NEXT in machine.run("nodewallctl --version").stdout
    assert f'"version": "{NEXT}"' in machine.run("nodewallctl status --json").stdout


def test_removal_takes_our_rules_away_and_nothing_else(machine: Machine, flavour: Flavour, packages: Packages) -> None:
    machine.run(f"iptables {FOREIGN}; ip6tables -A OUTPUT -d 2001:db8::1 -j ACCEPT; iptables -N DOCKER-USER")
    before = rules(machine)
    guard(machine)
    assert rules(machine) != before
    flavour.remove(machine)
    assert [rule for rule in rules(machine) if rule != JUMP] == before
    assert machine.property(UNIT, "ActiveState") in {"inactive", "failed"}
    assert not machine.path("/usr/lib/nodewalld").exists()

    # Installed again, it goes on with the configuration that was kept.
    flavour.install(machine, packages)
    if flavour.kind == "rpm":
        machine.run("mv /etc/nodewalld/nodewalld.toml.rpmsave /etc/nodewalld/nodewalld.toml")
        machine.run(f"systemctl enable --now {UNIT}")
    assert any(str(DROPPED) in rule for rule in rules(machine))


def test_removal_keeps_the_rules_where_that_was_chosen(machine: Machine, flavour: Flavour) -> None:
    guard(machine)
    before = rules(machine)
    machine.run("touch /etc/nodewalld/keep-rules")
    assert "stay in the kernel" in flavour.remove(machine)
    assert rules(machine) == before


def test_the_launchers_find_a_python_that_is_new_enough_and_nothing_else(machine: Machine, flavour: Flavour) -> None:
    """As on RHEL 9 and Ubuntu 22.04: an old python3, and a newer one beside it."""
    new = machine.run("readlink -f /usr/bin/python3").stdout.strip()
    machine.run("ln -sf /usr/bin/python3.9 /usr/bin/python3")
    machine.run("mkdir /root/trap; echo 'raise SystemExit(99)' > /root/trap/json.py")
    assert machine.run("cd /root/trap; PYTHONPATH=. nodewallctl --version").returncode == 0
    machine.run(f"mv {new} /usr/bin/python3.9")
    done = machine.run("nodewallctl --version", check=False)
    assert done.returncode == 69
    assert "Python 3.11" in done.stderr


def test_nothing_is_left_in_the_end(bare: Machine, flavour: Flavour, packages: Packages) -> None:
    rules_before, files_before = rules(bare), traces(bare)
    flavour.install(bare, packages)
    bare.run(f"systemctl enable --now {UNIT}")
    bare.path("/etc/nodewalld/conf.d/10-mine.toml").write_text('[failsafe]\nports = ["2222/tcp"]\n')
    guard(bare)
    bare.run("nodewallctl show; nodewallctl remove; nodewallctl reload")
    bare.path("/etc/nodewalld/conf.d/10-mine.toml").unlink()
    if flavour.kind == "deb":
        bare.run("apt-get purge -y nodewalld")
    else:
        flavour.remove(bare)
        bare.run("rm -r /etc/nodewalld")  # .rpmsave: RPM keeps what was edited
    assert rules(bare) == rules_before
    assert traces(bare) - files_before == set()
    assert bare.run("systemctl is-enabled nodewalld", check=False).stdout.strip() in {"", "not-found"}
