"""What a configuration would do to the connection that it is typed through is said before it is done."""

import pytest

from nodewalld.configuration.load import load
from nodewalld.core.environment import Environment
from nodewalld.core.lockout import Connection, lockouts
from nodewalld.core.words import Family

NODE = Environment({Family.IPV4: ("10.90.0.1",), Family.IPV6: ("fd90::1",)})
SSH = Connection("203.0.113.7", "10.90.0.1", 22)
SSH6 = Connection("2001:db8::7", "fd90::1", 22)
NO_FAILSAFE = "[failsafe]\nports = []\n"
ZONE = '[zone.public]\ninterfaces = ["eth0"]\ntarget = "drop"\n'


@pytest.mark.parametrize(
    ("text", "way_in", "entries"),
    [
        ('[[port]]\nname = "a"\nports = [22]\n', SSH, []),
        (NO_FAILSAFE + '[[port]]\nname = "a"\nports = [22]\n', SSH, ["port/a"]),
        (NO_FAILSAFE + '[[port]]\nname = "a"\nports = [22]\n', SSH6, ["port/a"]),
        (NO_FAILSAFE + '[[port]]\nname = "a"\nports = [22]\nallow = ["203.0.113.0/24"]\n', SSH, []),
        (
            NO_FAILSAFE + '[[port]]\nname = "a"\nports = [22]\nallow = ["any"]\ndeny = ["203.0.113.7"]\n',
            SSH,
            ["port/a"],
        ),
        (
            NO_FAILSAFE + '[set.s]\nentries = ["203.0.113.7"]\n[[port]]\nname = "a"\nports = [22]\nallow = ["@s"]\n',
            SSH,
            [],
        ),
        (NO_FAILSAFE + '[[port]]\nname = "a"\nports = [22]\nenforce = false\n', SSH, []),
        (NO_FAILSAFE + '[[port]]\nname = "a"\nports = [2222]\n', SSH, []),
        (NO_FAILSAFE + '[[port]]\nname = "a"\nports = [22]\ndestination = ["192.0.2.1"]\n', SSH, []),
        ('[failsafe]\nfrom = ["192.0.2.0/24"]\n[[port]]\nname = "a"\nports = [22]\n', SSH, ["port/a"]),
        ('[daemon]\nfamilies = ["ipv6"]\n' + NO_FAILSAFE + '[[port]]\nname = "a"\nports = [22]\n', SSH, []),
        (NO_FAILSAFE + ZONE, SSH, ["zone/public"]),
        (ZONE, SSH, []),
        (NO_FAILSAFE + ZONE + 'services = ["ssh"]\n', SSH, []),
        (NO_FAILSAFE + ZONE + '[zone.me]\nsources = ["203.0.113.0/24"]\ntarget = "accept"\n', SSH, []),
        (
            NO_FAILSAFE
            + '[zone.wide]\nsources = ["203.0.0.0/16"]\ntarget = "accept"\n'
            + '[zone.near]\nsources = ["203.0.113.0/24"]\ntarget = "reject"\n',
            SSH,
            ["zone/near"],
        ),
    ],
)
def test_who_shuts_the_way_in_is_named(tmp_path, text: str, way_in: Connection, entries: list[str]) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "nodewalld.toml").write_text(text)
    told = lockouts(load(tmp_path), NODE, way_in)
    assert [(problem.key.replace(".", "/"), problem.code) for problem in told] == [
        (e, "locks-you-out") for e in entries
    ]
