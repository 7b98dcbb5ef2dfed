"""`serve` or `flood SPEC`; each loads only what it needs."""

import json
import sys

if sys.argv[1] == "flood":
    from lab.agent.flooder import Flooder

    Flooder(json.loads(sys.argv[2])).run()
else:
    from lab.agent.service import Agent

    Agent().loop.run()
