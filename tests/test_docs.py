"""The documentation speaks of what is there: names import, files exist, code on a page is the code of an example that runs."""

from __future__ import annotations

import os
import pkgutil
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from dlm import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
NAME = re.compile(r"`(dlm(?:\.\w+)+)(?:\(.*?\))?`")
COMMAND = re.compile(r"(?:^ {4}|^|`|-m )dlm ([a-z]+\b[^`\n]*)", re.M)
FILE = re.compile(r"`((?:src|tests|docs|benchmarks|examples|dev)/[\w./-]+\.\w+)`")

LINK = re.compile(r"\]\(([^)\s]+)\)")


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_name_on_a_page_can_be_imported(page: Path) -> None:
    for name in NAME.findall(page.read_text(encoding="utf-8")):
        assert pkgutil.resolve_name(name) is not None, name


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_file_on_a_page_exists(page: Path) -> None:
    missing = [name for name in FILE.findall(page.read_text(encoding="utf-8")) if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_link_on_a_page_leads_somewhere(page: Path) -> None:
    targets = [target.partition("#")[0] for target in LINK.findall(page.read_text(encoding="utf-8"))]
    assert [target for target in targets if target and ":" not in target and not (page.parent / target).exists()] == []


@cache
def verbs() -> Any:
    return typer.main.get_command(cli.app.app)


def unknown_options(line: str) -> set[str]:
    """Of a command line, from its verb on."""
    words = line.split(" #")[0].split()
    command = verbs()
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return {word.partition("=")[0] for word in words if re.match("--[a-z]", word)} - known


def test_an_unknown_option_is_found() -> None:
    assert unknown_options("generate x --steps 4 --stepps=5") == {"--stepps"}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_option_on_a_page_is_one_of_the_command(page: Path) -> None:
    for line in COMMAND.findall(page.read_text(encoding="utf-8").replace("\\\n", " ")):
        assert not unknown_options(line), line


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_no_page_needs_a_file_outside_the_repository(page: Path) -> None:
    assert "../shared" not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["own_rule", "own_noise", "own_denoiser"])
def test_the_code_of_extending_is_the_example(name: str) -> None:
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    section = page.split(f"`examples/{name}.py`", 1)[1].split("\n## ", 1)[0]
    shown = "\n".join(re.findall(r"```python\n(.*?)```", section, re.S))
    example = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    assert [line for line in shown.splitlines() if line] == [line for line in example.split('"""', 2)[2].splitlines() if line]


def test_the_generated_parts_are_up_to_date() -> None:
    words = [sys.executable, "dev/generated.py", "--check"]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": "src"}, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "LanguageModel" in (tmp_path / "api" / "index.html").read_text(encoding="utf-8")


def test_the_page_of_examples_shows_every_script() -> None:
    shown = re.findall(r"^--8<--\nexamples/(\w+)\.py\n--8<--$", (ROOT / "docs" / "examples.md").read_text(encoding="utf-8"), re.M)
    assert sorted(shown) == sorted(file.stem for file in (ROOT / "examples").glob("*.py"))


def test_the_index_has_every_task_of_the_readme() -> None:
    """With the same first command, where a task has one."""

    def tasks(page: str) -> dict[str, list[str]]:
        table = (ROOT / page).read_text(encoding="utf-8").partition("| task | start here |")[2].partition("\n\n")[0]
        rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
        return {task: re.findall(r"`((?:dlm|python) [^`]+)`", start) for task, start in rows}

    readme, index = tasks("README.md"), tasks("docs/index.md")
    assert len(readme) > 15
    assert {task: index.get(task) for task in readme} == readme
