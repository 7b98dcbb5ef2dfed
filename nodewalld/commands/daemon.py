"""`nodewalld`: the daemon's command line."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nodewalld import __version__

FAILED = 1
REFUSED = 78
"""EX_CONFIG of sysexits.h: no restart can cure it, and the unit does not try."""


def parser() -> argparse.ArgumentParser:
    """The options of `nodewalld`."""
    result = argparse.ArgumentParser(
        prog="nodewalld",
        description="Holds the rules of /etc/nodewalld in position. Runs in the foreground; systemd's unit starts it.",
        epilog="SIGHUP reloads, SIGTERM stops; the rules stay in the kernel (`nodewallctl remove` takes them out).",
    )
    for name, folder, text in (
        ("--config", "/etc/nodewalld", "the configuration folder"),
        ("--runtime-dir", "/run/nodewalld", "where the daemon listens"),
        ("--state-dir", "/var/lib/nodewalld", "where the daemon keeps its state"),
    ):
        help_ = f"{text} (default {folder})"
        result.add_argument(name, type=Path, default=Path(folder), metavar="DIR", help=help_)
    result.add_argument("--once", action="store_true", help="enforce, verify and exit")
    result.add_argument("--version", action="version", version=f"nodewalld {__version__}")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the daemon; returns its exit status."""
    options = parser().parse_args(argv)
    # Imported only now, so that --help and usage errors are quick.
    from nodewalld.configuration.errors import ConfigError  # noqa: PLC0415
    from nodewalld.daemon import Daemon, Folders  # noqa: PLC0415
    from nodewalld.service import journal  # noqa: PLC0415
    from nodewalld.service.instance import AlreadyRunning  # noqa: PLC0415

    journal.configure()
    folders = Folders(options.config, options.runtime_dir, options.state_dir)
    try:
        daemon = Daemon(folders)
        return daemon.once() if options.once else daemon.run()
    except ConfigError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        print("nodewalld: the configuration is refused; nothing was changed", file=sys.stderr)
        return REFUSED
    except AlreadyRunning as error:
        print(f"nodewalld: {error}", file=sys.stderr)
    except OSError as error:
        words = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"nodewalld: {words}", file=sys.stderr)
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
