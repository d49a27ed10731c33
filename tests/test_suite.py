"""The suite runs what stands in it."""

import ast
from pathlib import Path
from typing import TypeGuard

HERE = Path(__file__).parent


def collected(scope: ast.Module | ast.ClassDef) -> list[ast.FunctionDef]:
    """The tests that pytest finds in a file or a class; of two of one name the later."""
    found = {node.name: node for node in scope.body if isinstance(node, ast.FunctionDef) and _is_test(node)}
    classes = [node for node in scope.body if isinstance(node, ast.ClassDef) and node.name.startswith("Test")]
    return [*found.values(), *(test for node in classes for test in collected(node))]


def _is_test(node: ast.AST) -> TypeGuard[ast.FunctionDef]:
    return isinstance(node, ast.FunctionDef) and node.name.startswith("test_")


def test_no_test_is_hidden_within_a_function_or_behind_another() -> None:
    lost = []
    for path in HERE.glob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        seen = collected(tree)
        lost += [f"{path.name}:{node.lineno}" for node in ast.walk(tree) if _is_test(node) and node not in seen]
    assert not lost
