"""What is printed fits, says everything, and is coloured only where somebody looks at it."""

import io
import re
from pathlib import Path

import pytest
from doubles import Terminal
from hypothesis import given
from hypothesis import strategies as st

from nodewalld.commands.render import Paint, columns, fold

words = st.text(st.sampled_from("ab,-/"), min_size=1, max_size=30)


@given(st.lists(words, min_size=1, max_size=12), st.integers(5, 40))
def test_folding_loses_nothing_and_is_never_wider(parts: list[str], width: int) -> None:
    text = " ".join(parts)
    lines = fold(text, width)
    assert all(len(line) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


@given(st.lists(words, min_size=1, max_size=12))
def test_a_word_that_fits_a_line_is_whole(parts: list[str]) -> None:
    assert " ".join(fold(" ".join(parts), 30)).split() == parts


def test_a_long_word_breaks_behind_a_comma() -> None:
    assert fold("--dports 31000,31001,31002 -j DROP", 12) == ["--dports", "31000,31001,", "31002 -j", "DROP"]


def test_units_stay_together_where_they_fit() -> None:
    unit = r"-\S+(?: [^-]\S*)*"
    assert fold("-p tcp --match-set office src -j DROP", 24, unit) == ["-p tcp", "--match-set office src", "-j DROP"]
    assert fold("--match-set office src -j DROP", 16, unit) == ["--match-set", "office src", "-j DROP"]


def test_a_rows_cells_are_folded_beside_each_other() -> None:
    assert list(columns(("1", "one two", "x"), (2, 3, 4))) == ["1  one x", "   two"]


@pytest.mark.parametrize(
    ("stream", "env", "coloured"),
    [
        (Terminal(), {}, True),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"NO_COLOR": ""}, True),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {}, False),
    ],
)
def test_colour_is_for_terminals_whose_user_has_not_said_no(
    stream: io.StringIO, env: dict[str, str], coloured: bool
) -> None:
    assert (Paint(stream, env)("word", "red") != "word") is coloured


def test_the_width_is_what_columns_says_else_80() -> None:
    assert Paint(io.StringIO(), {}).width == 80
    assert Paint(io.StringIO(), {"COLUMNS": "132"}).width == 132
    assert Paint(io.StringIO(), {"COLUMNS": "nonsense"}).width == 80
    assert Paint(io.StringIO(), {"COLUMNS": "3"}).width == 60


def test_the_pictures_of_the_readme_are_there_and_small() -> None:
    root = Path(__file__).resolve().parent.parent
    named = set(re.findall(r"\(docs/(pictures/\S+\.png)\)", (root / "README.md").read_text()))
    assert {"pictures/status.png", "pictures/plan.png"} <= named
    assert named == {str(path.relative_to(root / "docs")) for path in (root / "docs/pictures").iterdir()}
    assert all((root / "docs" / name).stat().st_size < 150_000 for name in named)
