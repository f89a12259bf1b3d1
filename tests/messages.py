"""Every message of the package, made from its code: `python -m tests.messages` prints them as one table.

A message is what an error is raised with, what goes to a logger or the console, and the text of an event. What is filled in at run time
stands in braces.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import hf_amp

PACKAGE = Path(hf_amp.__file__).parent
SAYING = {"note", "say", "warning", "info", "echo", "warn", "AmpEvent", "mark_stalled", "Diagnosis"}
SHORTEST = 25
"""Characters; what is shorter is a name or a part."""


class Message(NamedTuple):
    """One message: where it is, what says it, and its text."""

    file: str
    line: int
    kind: str
    text: str


def text_of(node: ast.expr, constants: dict[str, str]) -> str:
    """The text of an expression, with what is filled in in braces; "" for what is none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            text_of(v, constants) if isinstance(v, ast.Constant) else "{" + ast.unparse(v.value) + "}"
            for v in node.values
            if isinstance(v, (ast.Constant, ast.FormattedValue))
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mult)):
        return text_of(node.left, constants) + text_of(node.right, constants)
    if isinstance(node, ast.Name):
        return constants.get(node.id, "")
    if isinstance(node, ast.IfExp):
        return text_of(node.body, constants) or text_of(node.orelse, constants)
    return ""


def messages() -> Iterator[Message]:
    """All of them, file by file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree, file = ast.parse(path.read_text(encoding="utf-8")), path.relative_to(PACKAGE).as_posix()
        constants = {
            target.id: text_of(node.value, {})
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in SAYING or name.endswith("Error") or name == "CauseFacts":
                given = [*node.args, *(keyword.value for keyword in node.keywords)]
                texts = (text_of(each, constants) for each in given)
                yield from (Message(file, node.lineno, name, text) for text in texts if len(text) >= SHORTEST)


def table() -> str:
    """The table, in Markdown."""
    rows = [f"| {m.file}:{m.line} | {m.kind} | {m.text.strip().replace('|', '/')} |" for m in messages()]
    return "\n".join(["| where | said by | message |", "|---|---|---|", *rows])


if __name__ == "__main__":
    print(table())
