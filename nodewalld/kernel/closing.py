"""What holds something of the kernel's until it is closed.

Law: whoever opens one in a `with` closes it, whatever happens.
"""

from typing import Self


class Closing:
    """A context manager that closes itself."""

    def close(self) -> None:
        """Give back what is held; it can't be used afterwards."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
