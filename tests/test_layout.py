"""Tests mirror modules: each module has a twin, or its docstring names the tests that cover it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE, TESTS = ROOT / "mint_ray", ROOT / "tests"
NAMED_TEST = re.compile(r"\btests/[\w/]+\.py")


def modules() -> list[Path]:
    """Return every module of the package with code of its own, relative to the package."""
    return [path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py")) if has_code(path)]


def has_code(path: Path) -> bool:
    """Return False for a module that only imports, such as the door of a package that lists names in `__all__`."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        is_list_of_names = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        if not is_list_of_names and not isinstance(node, ast.Expr | ast.Import | ast.ImportFrom):
            return True
    return False


def twins(module: Path) -> list[Path]:
    """Return the paths at which a module's test may be."""
    if module.name == "__init__.py":
        # the door of a family is tested by the conformance suite of its members, or under the family's name
        return [TESTS / module.parent / name for name in ("test_conformance.py", f"test_{module.parent.name}.py")]
    return [TESTS / module.parent / f"test_{module.name}"]


def named_tests(module: Path) -> list[str]:
    """Return the tests that the docstring of a module names."""
    docstring = ast.get_docstring(ast.parse((PACKAGE / module).read_text(encoding="utf-8"))) or ""
    return NAMED_TEST.findall(docstring)


def test_each_module_has_a_twin_or_names_its_test() -> None:
    missing = [
        str(module)
        for module in modules()
        if not any(twin.exists() for twin in twins(module)) and not named_tests(module)
    ]
    assert not missing, "\n".join(["", *missing])


def test_the_tests_that_modules_name_exist_and_have_tests() -> None:
    missing = []
    for module in modules():
        for name in named_tests(module):
            path = ROOT / name
            if not path.exists() or "def test_" not in path.read_text(encoding="utf-8"):
                missing.append(f"{module}: {name}")
    assert not missing, "\n".join(["", *missing])
