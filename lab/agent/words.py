"""How the agent speaks: JSON on standard output, an object a line; errors by the kernel's names for them."""

import errno
import json
import os
from collections.abc import Mapping
from typing import Any


def say(content: Mapping[str, Any]) -> None:
    """Print one object, also when standard output takes only a part at a time."""
    data = json.dumps(content).encode() + b"\n"
    while data:
        data = data[os.write(1, data) :]


def error_name(error: OSError) -> str:
    """The errno's name, as "ECONNRESET"."""
    return errno.errorcode.get(error.errno or 0, str(error))
