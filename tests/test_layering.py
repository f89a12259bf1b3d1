"""Imports inside of hf_amp go downward only, and each library is imported where it belongs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import hf_amp
from tests.each import for_each

PACKAGE = Path(hf_amp.__file__).parent
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# From the bottom to the top: what stands in one row may import the rows below it.
LAYERS: list[set[str]] = [
    {"config", "device", "errors", "events", "patch_log", "precision", "schedule", "serialization", "tree"},
    {"emulation", "rescale_rules", "statistics"},
    {"scaling", "fallback", "monitoring"},
    {"capture", "choose", "comparison", "report", "rescale", "session"},
    {"integrations", "training"},
    {"cli"},
]
# In these rows nothing imports its neighbour either.
STRANGERS = (1, 2)
LAYER_OF = {unit: layer for layer, units in enumerate(LAYERS) for unit in units}

# Library → the units or files that may import it.
PLACES = {
    "accelerate": ("integrations/", "cli/"),
    "transformers": ("integrations/", "cli/"),
    "datasets": ("integrations/", "cli/"),
    "structlog": ("monitoring/sinks/jsonl.py",),
    "typer": ("cli/",),
    "rich": ("cli/",),
    "matplotlib": ("report/",),
    "jinja2": ("report/",),
    "scipy": ("rescale.py",),
}


def unit_of(file: str) -> str:
    """The top-level module or package of hf_amp that a file belongs to."""
    return file.split("/")[0].removesuffix(".py")


def imports(file: str, source: str) -> Iterator[str]:
    """Every module that a file imports, anywhere in it, as an absolute dotted name."""
    package = ["hf_amp", *file.split("/")[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from hf_amp import config` names a module, `from hf_amp.config import X` has it already.
            yield from (f"{module}.{name.name}" for name in node.names) if module == "hf_amp" else [module]


def violations(file: str, source: str) -> list[str]:
    """What is wrong with the imports of one file, each as a sentence."""
    found = []
    for module in imports(file, source):
        top, _, rest = module.partition(".")
        if top == "hf_amp":
            found += inner_violation(file, rest.split(".")[0])
        elif top in PLACES and not file.startswith(PLACES[top]):
            found.append(f"{file} imports {top}, which only {', '.join(PLACES[top])} may")
    return found


def inner_violation(file: str, target: str) -> list[str]:
    """The rule between two units of hf_amp; the package's own `__init__` may gather names from all."""
    unit = unit_of(file)
    if unit in (target, "__init__"):
        return []
    if target not in LAYER_OF:
        return [f"{file} imports hf_amp.{target}, which is no unit of any layer"]
    here, there = LAYER_OF[unit], LAYER_OF[target]
    if there > here:
        return [f"{file} imports {target}, which is above it"]
    if there == here and here in STRANGERS:
        return [f"{file} imports {target}, its neighbour"]
    return []


def test_every_unit_has_a_layer():
    """A new top-level module or package is put into the table before anything else."""
    units = {unit_of(file) for file in FILES} - {"__init__"}
    assert units - set(LAYER_OF) == set()


def test_there_are_files_to_check():
    """The rules are not kept by looking at nothing."""
    assert {"config.py", "session.py", "scaling/scaler.py", "cli/demo.py"} <= set(FILES)


@for_each("file", FILES)
def test_a_file_imports_downward_only(file):
    """No file imports what is above it, its neighbour, or a library that is another's."""
    assert violations(file, (PACKAGE / file).read_text(encoding="utf-8")) == []


@for_each(
    ("file", "source", "words"),
    [
        ("config.py", "from hf_amp.session import AmpSession", "above it"),
        ("statistics.py", "import hf_amp.scaling.scaler", "above it"),
        ("statistics/gradients.py", "from hf_amp.emulation import EmulatedPrecision", "its neighbour"),
        ("scaling/scaler.py", "from hf_amp.monitoring.sinks import console", "its neighbour"),
        ("fallback/diagnosis.py", "def f():\n    from hf_amp.scaling import scaler", "its neighbour"),
        ("fallback/diagnosis.py", "from ..scaling import scaler", "its neighbour"),
        ("fallback/diagnosis.py", "from hf_amp import session", "above it"),
        ("session.py", "if TYPE_CHECKING:\n    from .integrations.accelerate import attach", "above it"),
        ("session.py", "from hf_amp import AmpSession", "no unit of any layer"),
        ("session.py", "from . import cli", "above it"),
        ("session.py", "import accelerate.utils as u", "imports accelerate"),
        ("__init__.py", "from transformers import Trainer", "imports transformers"),
        ("training/trainer.py", "import datasets", "imports datasets"),
        ("monitoring/sinks/console.py", "def f():\n    import structlog", "imports structlog"),
        ("integrations/accelerate.py", "from rich.table import Table", "imports rich"),
    ],
)
def test_a_planted_violation_is_found(file, source, words):
    """The check sees imports of every form, wherever they stand, and says what is wrong."""
    (found,) = violations(file, source)
    assert words in found


@for_each(
    ("file", "source"),
    [
        ("scaling/scaler.py", "from hf_amp.scaling.state import restored\nfrom .policy import scalar"),
        ("scaling/scaler.py", "from hf_amp.statistics import to_host\nimport torch, math"),
        ("config.py", "from hf_amp.errors import ConfigError"),
        ("cli/demo.py", "import typer\nfrom datasets import Dataset\nfrom hf_amp.session import AmpSession"),
        ("monitoring/sinks/jsonl.py", "import structlog"),
        ("__init__.py", "from hf_amp.integrations.accelerate import attach"),
    ],
)
def test_what_is_allowed_is_not_reported(file, source):
    """Downward imports, those within a unit, and libraries in their place are fine."""
    assert violations(file, source) == []
