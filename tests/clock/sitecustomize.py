"""Found first on PYTHONPATH: the wall clock of the process is off by what a file says, in seconds; monotonic isn't.

A kernel's wall clock can't be set for one process alone, and the machine's is not a test's to set.
"""

import datetime as dt
import os
import time
from pathlib import Path
from typing import Any

_SHIFT = Path(os.environ["NODEWALLD_TEST_CLOCK"])
_time = time.time


def _shift() -> float:
    try:
        return float(_SHIFT.read_text())
    except (OSError, ValueError):
        return 0.0


class _Shifted(dt.datetime):
    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return super().now(tz) + dt.timedelta(seconds=_shift())


dt.datetime = _Shifted  # type: ignore[misc]
time.time = lambda: _time() + _shift()
