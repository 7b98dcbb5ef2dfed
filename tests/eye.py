"""Runs in a node, and answers each line with what `nodewallctl plan` would print: a plan costs it some milliseconds."""

import json
import sys
from pathlib import Path

from nodewalld.commands.offline import plan


def main() -> None:
    config, state = map(Path, sys.argv[1:])
    for _ in sys.stdin:
        try:
            answer: object = plan(config, state)["changes"]
        except Exception as error:  # it is the question's answer that none could be had
            answer = f"{type(error).__name__}: {error}"
        print(json.dumps(answer), flush=True)


main()
