"""Which code made a number: a hash of the source that a run can reach.

The hash follows imports from a chapter's experiment down to the kernels: each module reached inside papercore is hashed as a
syntax tree without docstrings (comments are not in a tree at all). A name imported from a package is followed through the
package's `__init__` to the module that defines it, so that a chapter does not go stale when a part it never touches changes.
"""

from __future__ import annotations

import ast
import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import papercore

PACKAGE = Path(papercore.__file__).resolve().parent
# Modules of the lab that show, store or judge numbers but make none.
NOT_HASHED = (
    "figures", "figure_style", "picture", "plot", "page_svg", "explore", "scoreboard", "claims", "rules", "record", "record_schema", "sources",
    "provenance", "progress", "paths", "stages", "sweep", "config",
)  # fmt: skip
# Fast backends that tests hold to their reference bit for bit: which of them ran cannot be seen in a number.
BIT_EQUAL = ("papercore.mezo._numba", "papercore.mezo._numba_loops")
# Modules of an experiment that hold its settings.
SETTINGS = ("config", "standard_settings", "paper_settings")


def source_hash(slug: str, scale: str) -> str:
    """Sixteen hex digits over the code that `papercore.experiments.<slug>` runs at `scale`.

    The entry is the module `<scale>.py` of the experiment when there is one, else the whole package. Settings are left out:
    a record names their values, and their digest is compared apart. A `tuning.json` of the experiment counts as source, and so
    do the paper's own numbers where the experiment reckons with them.
    """
    return _source_hash(slug, scale, _stamp())


def _stamp() -> float:
    """The newest modification time in the package: the cached hash is good until a file changes."""
    return max(
        path.stat().st_mtime
        for pattern in ("*.py", "tuning.json", "*.csv")
        for path in PACKAGE.rglob(pattern)
    )


@lru_cache(maxsize=256)
def _source_hash(slug: str, scale: str, stamp: float) -> str:
    digest = hashlib.sha256()
    asked: set[str] = set()
    for module in reached_modules(slug, scale):
        path = _file_of(module)
        assert path is not None
        digest.update(f"{module}\n{_tree_text(path)}\n".encode())
        asked.update(_imports(module, path))
    reported = PACKAGE / "claims" / f"{slug}.csv"
    if "papercore.lab.claims" in asked and reported.is_file():
        digest.update(reported.read_text(encoding="utf-8").encode())
    tuning = PACKAGE / "experiments" / slug / "tuning.json"
    if scale == "quick" and tuning.is_file():
        # What the sweep chose counts, not the seconds that it took.
        digest.update(
            json.dumps(json.loads(tuning.read_text(encoding="utf-8"))["metrics"], sort_keys=True).encode()
        )
    return digest.hexdigest()[:16]


def reached_modules(slug: str, scale: str) -> list[str]:
    """The modules that go into `source_hash`, sorted."""
    root = f"papercore.experiments.{slug}"
    entry = f"{root}.{scale}" if _file_of(f"{root}.{scale}") else root
    if not _file_of(entry):
        raise ValueError(f"no experiment {slug!r} in papercore.experiments")
    return sorted(_reached([entry]))


def _file_of(module: str) -> Path | None:
    """The file of a papercore module, or None."""
    parts = module.split(".")
    if parts[0] != "papercore":
        return None
    path = PACKAGE.joinpath(*parts[1:])
    if path.with_suffix(".py").is_file():
        return path.with_suffix(".py")
    return path / "__init__.py" if (path / "__init__.py").is_file() else None


def _reached(entry: list[str]) -> set[str]:
    seen: set[str] = set()
    stack = list(entry)
    while stack:
        module = stack.pop()
        path = _file_of(module)
        if module in seen or path is None or not _makes_numbers(module):
            continue
        seen.add(module)
        stack.extend(_imports(module, path))
    # A package's __init__ only re-exports: what it re-exports was followed by name.
    return {m for m in seen if _file_of(m).name != "__init__.py" or m.startswith("papercore.experiments.")}  # type: ignore[union-attr]


def _makes_numbers(module: str) -> bool:
    """False for what is left out: modules of the lab and of the experiments that make no numbers, bit-equal backends."""
    package, _, name = module.rpartition(".")
    if package == "papercore.lab":
        return name not in NOT_HASHED
    if package.startswith("papercore.experiments."):
        return name not in SETTINGS
    return module not in {"papercore.cli", "papercore.experiments", *BIT_EQUAL}


def _imports(module: str, path: Path) -> list[str]:
    """Modules of papercore that this file imports, lazily or not."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.startswith("papercore.")]
        elif isinstance(node, ast.ImportFrom):
            source = _absolute(node, package)
            if source.split(".")[0] == "papercore":
                for alias in node.names:
                    found.append(_definer(source, alias.name))
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).split(".")[-1] == "import_module"
            and node.args
        ):
            found += _named_at_run_time(node.args[0])
    return found


def _named_at_run_time(name: ast.expr) -> list[str]:
    """Modules that `import_module(name)` may import; for an f-string all that begin with its fixed part."""
    if isinstance(name, ast.Constant):
        return [str(name.value)]
    if not (isinstance(name, ast.JoinedStr) and name.values and isinstance(name.values[0], ast.Constant)):
        return []
    package, _, start = str(name.values[0].value).rpartition(".")
    if not f"{package}.".startswith("papercore."):
        return []
    folder = PACKAGE.joinpath(*package.split(".")[1:])
    return [f"{package}.{path.stem}" for path in sorted(folder.glob(f"{start}*.py"))]


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    kept = parts[: len(parts) - node.level + 1]
    return ".".join([*kept, *([node.module] if node.module else [])])


def _definer(source: str, name: str, depth: int = 0) -> str:
    """The module that defines `name` as imported from `source`, followed through re-exports."""
    if _file_of(f"{source}.{name}"):
        return f"{source}.{name}"
    path = _file_of(source)
    if path is None or path.name != "__init__.py" or depth > 5:
        return source
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _definer(_absolute(node, source), alias.name, depth + 1)
    # A lazy re-export is a dict literal {"Name": "module"} in the package's __init__.
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == name and isinstance(value, ast.Constant):
                    target = str(value.value)
                    return target if target.startswith("papercore.") else f"{source}.{target.lstrip('.')}"
    return source


def _tree_text(path: Path) -> str:
    """The syntax tree as text: no comments, no docstrings, and the same under every Python that parses the file.

    `ast.dump` and `ast.unparse` change between Python versions, so the walk is our own.
    """
    return _node_text(ast.parse(path.read_text(encoding="utf-8")))


def _node_text(node: Any) -> str:
    if isinstance(node, list):
        return "[" + ",".join(_node_text(item) for item in node) + "]"
    if not isinstance(node, ast.AST):
        return ascii(node)  # which letters repr shows as they are depends on the Python
    fields = []
    for name, value in ast.iter_fields(node):
        if (
            value is None
            or value == []
            or name in {"ctx", "kind", "type_comment", "type_params", "type_ignores"}
        ):
            continue
        if name == "body" and isinstance(node, DOCUMENTED) and _is_docstring(value[0]):
            value = value[1:]
        fields.append(f"{name}={_node_text(value)}")
    return f"{type(node).__name__}({','.join(fields)})"


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _is_docstring(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
