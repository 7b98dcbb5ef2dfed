"""One of them, as the argument's "name" says."""

import json
import sys

from lab.played.docker import Docker28
from lab.played.felix import Felix
from lab.played.flannel import Flannel
from lab.played.kube_proxy import KubeProxy
from lab.played.kube_router import KubeRouter
from lab.played.player import Played

PLAYED: dict[str, type[Played]] = {
    "kube-proxy": KubeProxy,
    "felix": Felix,
    "kube-router": KubeRouter,
    "flannel": Flannel,
    "docker28": Docker28,
}

told = json.loads(sys.argv[1])
PLAYED[told["name"]](told).serve()
