"""The parts of the documentation that follow from the code: the table of samplers, the tree of files.

python dev/generated.py            writes them into their pages
python dev/generated.py --check    exits with 1 where a page has other samplers or files; the sentence about a file may lag behind
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path

from dlm.files import write_text
from dlm.sampling import registry

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "dlm"
LONGEST_LINE = 150  # characters of the tree
NAME_WIDTH = 28  # characters of the name in a line of the tree


def first_sentence(path: Path) -> str:
    """Of the docstring of a module, on one line."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())
    return text.split(". ")[0].removesuffix(".")


def line(indent: int, name: str, about: str) -> str:
    whole = f"{' ' * indent}{name:<{NAME_WIDTH - indent}} {about}".rstrip()
    return whole if len(whole) <= LONGEST_LINE else whole[: LONGEST_LINE - 4].rsplit(" ", 1)[0] + " ..."


def tree() -> str:
    """Every file of the package, with the first sentence of its docstring."""
    lines = ["```", "src/dlm/"]

    def walk(directory: Path, indent: int) -> None:
        for path in sorted(directory.iterdir(), key=lambda path: (path.is_dir(), path.name)):
            if path.is_dir() and (path / "__init__.py").is_file():
                lines.append(line(indent, f"{path.name}/", first_sentence(path / "__init__.py")))
                walk(path, indent + 2)
            elif path.suffix == ".py" and path.name not in ("__init__.py", "__main__.py"):
                lines.append(line(indent, path.name, first_sentence(path)))

    walk(SOURCE, 2)
    return "\n".join([*lines, "```", ""])


PARTS: dict[str, tuple[str, Callable[[], str]]] = {
    "docs/generating.md": ("samplers", lambda: registry.markdown_table(registry.BUILT_IN)),
    "docs/architecture.md": ("tree", tree),
}


def written(page: str) -> tuple[str, str]:
    """The page as it is, and as it should be."""
    name, make = PARTS[page]
    text = (ROOT / page).read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: python dev/generated.py writes it -->\n", f"<!-- end of {name} -->\n"
    before, _, rest = text.partition(begin)
    return text, before + begin + make() + end + rest.partition(end)[2]


def names(page: str) -> list[str]:
    """The lines of a page as a check compares them."""
    return [line if line.startswith("|") else line[:NAME_WIDTH] for line in page.splitlines()]


def main() -> int:
    stale = [page for page in PARTS if len(set(written(page))) > 1]
    if "--check" in sys.argv:
        stale = [page for page in stale if len({tuple(names(text)) for text in written(page)}) > 1]
        print(*(f"{page} is out of date: python dev/generated.py" for page in stale), sep="\n")
        return int(bool(stale))
    for page in stale:
        write_text(ROOT / page, written(page)[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
