"""Every block of TOML in the cookbook loads, and is what the example that it is taken from says."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pages import EXAMPLES, PAGE, ROOT

BOOK = PAGE.with_name("cookbook.md")
RECIPES = dict(re.findall(r"^## (.+)\n((?:(?!^## ).*\n?)*)", BOOK.read_text(), flags=re.MULTILINE))
_BLOCK = re.compile(r"^```toml(?: (?P<example>\S+))?\n(?P<text>(?:.*\n)*?)```$", re.MULTILINE)
DEFAULT = ROOT / "etc/nodewalld/nodewalld.toml"


def block(recipe: str) -> re.Match[str]:
    found = _BLOCK.search(RECIPES[recipe])
    assert found, "no TOML"
    return found


def strangers(part: dict[str, Any], whole: dict[str, Any]) -> list[object]:
    """The entries of one configuration that the other has not, or otherwise."""
    found: list[object] = []
    for kind, content in part.items():
        if isinstance(content, list):
            found += [entry for entry in content if entry not in whole.get(kind, [])]
        else:
            found += [(kind, key) for key, value in content.items() if whole.get(kind, {}).get(key) != value]
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_tells_why_what_and_how_one_sees_it(recipe: str) -> None:
    text = RECIPES[recipe]
    what, how, link = text.index("\n```toml"), text.index("\n```console"), text.rindex(".toml)")
    assert what < how < link
    assert len(re.findall(r"\.(?=\s)", text[:what])) >= 2
    for linked in re.findall(r"\(\.\./etc/examples/(\S+)\)", text):
        assert (EXAMPLES / linked).is_file()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_block_of_the_cookbook_is_good(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "nodewalld.toml").write_text(block(recipe)["text"])
    command = [sys.executable, "-m", "nodewalld.commands.ctl", "check", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if block(recipe)["example"]])
def test_a_block_is_what_its_example_says(recipe: str) -> None:
    found = block(recipe)
    example = f"{found['example']}.toml"
    assert f"../etc/examples/{example}" in RECIPES[recipe]
    assert strangers(tomllib.loads(found["text"]), tomllib.loads((EXAMPLES / example).read_text())) == []


def test_the_default_configuration_is_empty_and_shows_every_key_of_every_kind() -> None:
    text = DEFAULT.read_text()
    assert tomllib.loads(text) == {"daemon": {}, "failsafe": {}}
    shown = tomllib.loads(re.sub(r"^# (?=\[|[a-z_]+ *= )", "", text, flags=re.MULTILINE))
    documented = (ROOT / "docs/configuration.md").read_text()
    for heading, section in re.findall(r"^## `\[+(\w+)[^`]*`\n((?:(?!^## ).*\n?)*)", documented, flags=re.MULTILINE):
        rows = re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE)
        keys = {key for row in rows for key in re.findall(r"`(\w+)`", row)}
        content = shown[heading]
        entry = content[0] if isinstance(content, list) else content
        if heading in {"set", "zone", "service"}:
            entry = next(iter(content.values()))
        assert keys, heading
        assert keys <= set(entry), f"[{heading}] does not show {keys - set(entry)}"
