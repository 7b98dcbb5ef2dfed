"""The command line: `python -m demo [--backend nft|legacy] [--no-colour]`."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from demo.knocking import NotAsToldError
from demo.page import Page, wants_colour, wrapped
from demo.story import Story
from lab.node import missing
from lab.waiting import LabError

FAILED, INTERRUPTED, BROKEN_PIPE = 1, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Tell the story; 0 when everything was as told."""
    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description="Shows nodewalld at work in throw-away network namespaces. Needs root, and changes nothing here.",
        epilog="`make demo` installs what it needs and runs it.",
    )
    parser.add_argument("--backend", choices=("nft", "legacy"), default="nft", help="where the rules live (nft)")
    parser.add_argument("--no-colour", "--no-color", action="store_true", help="plain text, also on a terminal")
    options = parser.parse_args(argv)
    if lacking := missing():
        cure = "`make demo` installs what is missing, and calls sudo where that is needed"
        return _fail(f"The demo builds network namespaces, for which it lacks {', '.join(lacking)}; {cure}.")
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a mark that the terminal can't print is no reason to stop
    page = Page(colour=wants_colour(sys.stdout) and not options.no_colour, calm=sys.stdout.isatty())
    try:
        Story(page, options.backend).tell()
    except NotAsToldError as error:
        return _fail(f"This is not as it should be: {error}.")
    except LabError as error:
        return _fail(f"The demo could not go on: {error}")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        print("\nStopped. The node and all that ran in it are gone.", file=sys.stderr)
        return INTERRUPTED
    return 0


def _fail(text: str) -> int:
    first, *more = text.split("\n")
    print("\n".join((wrapped(first, first="✗ ", rest="  "), *more)), file=sys.stderr)
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
