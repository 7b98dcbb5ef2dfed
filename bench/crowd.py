"""Foreign rules as kube-proxy writes them: five rules and two chains in nat for each Service.

Law: the text is whole, as kube-proxy's own: restored with --noflush it makes the chains or fills them anew.
"""

RULES_PER_SERVICE = 5


def sync(rules: int) -> str:
    """The `iptables-restore --noflush` input of a sync of so many rules; "" for none."""
    services = range(rules // RULES_PER_SERVICE)
    if not services:
        return ""
    chains = [f":KUBE-{kind}-{number:016X} - [0:0]" for number in services for kind in ("SVC", "SEP")]
    content = [line for number in services for line in _service(number)]
    head = ["*nat", ":KUBE-SERVICES - [0:0]", ":KUBE-MARK-MASQ - [0:0]"]
    return "\n".join([*head, *chains, *content, "COMMIT", ""])


def _service(number: int) -> list[str]:
    low = f"{number >> 8 & 255}.{number & 255}"
    address, pod = f"10.{96 + (number >> 16)}.{low}", f"10.42.{low}"
    service, endpoint = f"KUBE-SVC-{number:016X}", f"KUBE-SEP-{number:016X}"
    name = f"shop/web-{number}:http"
    dialled = f'-d {address}/32 -p tcp -m comment --comment "{name} cluster IP" -m tcp --dport 80'
    return [
        f"-A KUBE-SERVICES {dialled} -j {service}",
        f"-A {service} ! -s 10.42.0.0/16 {dialled} -j KUBE-MARK-MASQ",
        f'-A {service} -m comment --comment "{name} -> {pod}:8080" -j {endpoint}',
        f'-A {endpoint} -s {pod}/32 -m comment --comment "{name}" -j KUBE-MARK-MASQ',
        f'-A {endpoint} -p tcp -m comment --comment "{name}" -m tcp -j DNAT --to-destination {pod}:8080',
    ]
