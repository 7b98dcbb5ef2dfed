"""What is said of a configuration's folder, which the fixture `write` makes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from nodewalld.configuration.errors import ConfigError
from nodewalld.configuration.load import load

Write = Callable[..., Path]


def problems(folder: Path, *, check_owner: bool = True) -> list[str]:
    """What is wrong with a folder, each as people read it, without the folder's own name."""
    with pytest.raises(ConfigError) as caught:
        load(folder, check_owner=check_owner)
    assert str(caught.value).splitlines() == [str(problem) for problem in caught.value.problems]
    return [str(problem).replace(f"{folder}/", "") for problem in caught.value.problems]


def warnings(folder: Path) -> list[str]:
    """What a folder that is taken is warned of, in the same form."""
    return [str(problem).replace(f"{folder}/", "") for problem in load(folder).warnings]
