"""kube-proxy: its jumps on top where they are missing, and everything by one restore for each family."""

from lab.played.player import TOOLS, Played, words
from lab.rivals import POD1, PORTS

_FILTER_CHAINS = ("SERVICES", "EXTERNAL-SERVICES", "FORWARD", "NODEPORTS", "PROXY-FIREWALL")


class KubeProxy(Played):
    """kube-proxy 1.26 with three NodePorts by UDP."""

    comm = "kube-proxy"
    _NEW = "-m conntrack --ctstate NEW "
    _JUMPS = (
        (
            "filter",
            "INPUT",
            "EXTERNAL-SERVICES",
            f'{_NEW}-m comment --comment "kubernetes externally-visible service portals"',
        ),
        (
            "filter",
            "FORWARD",
            "EXTERNAL-SERVICES",
            f'{_NEW}-m comment --comment "kubernetes externally-visible service portals"',
        ),
        ("filter", "INPUT", "NODEPORTS", '-m comment --comment "kubernetes health check service ports"'),
        ("filter", "FORWARD", "SERVICES", f'{_NEW}-m comment --comment "kubernetes service portals"'),
        ("filter", "OUTPUT", "SERVICES", f'{_NEW}-m comment --comment "kubernetes service portals"'),
        ("filter", "FORWARD", "FORWARD", '-m comment --comment "kubernetes forwarding rules"'),
        ("filter", "INPUT", "PROXY-FIREWALL", f'{_NEW}-m comment --comment "kubernetes load balancer firewall"'),
        ("filter", "OUTPUT", "PROXY-FIREWALL", f'{_NEW}-m comment --comment "kubernetes load balancer firewall"'),
        ("filter", "FORWARD", "PROXY-FIREWALL", f'{_NEW}-m comment --comment "kubernetes load balancer firewall"'),
        ("nat", "OUTPUT", "SERVICES", '-m comment --comment "kubernetes service portals"'),
        ("nat", "PREROUTING", "SERVICES", '-m comment --comment "kubernetes service portals"'),
        ("nat", "POSTROUTING", "POSTROUTING", '-m comment --comment "kubernetes postrouting rules"'),
    )
    _CANARY_TABLES = ("mangle", "nat", "filter")
    _CANARY = "KUBE-PROXY-CANARY"

    def start(self) -> None:
        """As its class says."""
        self.sync()
        self._hatch()

    def _hatch(self) -> None:
        for tool in TOOLS:
            for table in self._CANARY_TABLES:
                if self.read(tool, "-w", "-t", table, "-S", self._CANARY) is None:
                    self.write(tool, "-w", "-t", table, "-N", self._CANARY)
        self.due_in(30.0)

    def tick(self) -> None:
        """As its class says."""
        if any(self.read(tool, "-w", "-t", "mangle", "-S", self._CANARY) is None for tool in TOOLS):
            self.sync()
        self._hatch()

    def sync(self) -> None:
        """Jumps where they are missing, then all in one restore for each family."""
        for tool in TOOLS:
            for table, chain, name, match in self._JUMPS:
                self._ensure(tool, table, chain, f"KUBE-{name}", match)
            for table in ("filter", "nat"):
                self.read(f"{tool}-save", "-t", table)
            self.write(f"{tool}-restore", "-w", "5", "--noflush", "--counters", text=self._whole(tool))

    def _ensure(self, tool: str, table: str, chain: str, name: str, match: str) -> None:
        if self.read(tool, "-w", "-t", table, "-S", name) is None:
            self.write(tool, "-w", "-t", table, "-N", name, may_fail=True)
        rule = [*words(match), "-j", name]
        if self.read(tool, "-w", "-t", table, "-C", chain, *rule) is None:
            self.write(tool, "-w", "-t", table, "-I", chain, *rule)

    @staticmethod
    def _whole(tool: str) -> str:
        pod = POD1[tool] if tool == "iptables" else f"[{POD1[tool]}]"
        lines = ["*filter", *(f":KUBE-{name} - [0:0]" for name in _FILTER_CHAINS)]
        lines += ["-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP"]
        rule = '-A KUBE-FORWARD -m comment --comment "kubernetes forwarding'
        lines += [f'{rule} rules" -m mark --mark 0x00004000/0x00004000 -j ACCEPT']
        lines += [f'{rule} conntrack rule" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT', "COMMIT", "*nat"]
        names = [f"{kind}-{port}" for port in PORTS for kind in ("EXT", "SVC", "SEP")]
        lines += [f":KUBE-{name} - [0:0]" for name in ("SERVICES", "NODEPORTS", "POSTROUTING", "MARK-MASQ", *names)]
        lines += ["-A KUBE-POSTROUTING -m mark ! --mark 0x00004000/0x00004000 -j RETURN"]
        lines += ["-A KUBE-POSTROUTING -j MARK --xor-mark 0x00004000"]
        masquerade = '-m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully'
        lines += [f"-A KUBE-POSTROUTING {masquerade}", "-A KUBE-MARK-MASQ -j MARK --or-mark 0x00004000"]
        for port in PORTS:
            told = f'-m comment --comment "shop/{port}:p"'
            lines += [
                f"-A KUBE-NODEPORTS {told} -m udp -p udp --dport {port} -j KUBE-EXT-{port}",
                f"-A KUBE-EXT-{port} -j KUBE-MARK-MASQ",
                f"-A KUBE-EXT-{port} -j KUBE-SVC-{port}",
                f"-A KUBE-SVC-{port} -j KUBE-SEP-{port}",
                f"-A KUBE-SEP-{port} {told} -m udp -p udp -j DNAT --to-destination {pod}:{port}",
            ]
        last = '-m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain"'
        lines += [f"-A KUBE-SERVICES {last} -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS", "COMMIT"]
        return "\n".join(lines) + "\n"
