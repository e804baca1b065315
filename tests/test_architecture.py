"""The layers of the package: imports point downwards only, and no modules import each other in a circle."""

import ast
from pathlib import Path

import pytest

import llamory

SOURCE = Path(llamory.__file__).parent

# From the top down; a package imports only packages of later lines, and packages of one line never import each other.
LAYERS = [
    {"cli"},
    {"server"},
    {"library"},
    {"training"},
    {"evaluation"},
    {"qa"},
    {"ingest"},
    {"embedding"},
    {"llara", "longllama"},
    {"memory"},
    {"documents"},
    {"models"},
    {"common"},
    {"errors"},
]
RANK = {package: rank for rank, layer in enumerate(LAYERS) for package in layer}


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, modules: set[str]) -> set[str]:
    """The modules of the package that a module imports anywhere, for type checking only too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in modules else node.module or "")
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name for name in found if name in modules}


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    paths = {module_name(path): path for path in SOURCE.rglob("*.py")}
    assert len(paths) > 50
    return {name: imports(path, set(paths)) for name, path in paths.items()}


def package(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def test_every_package_has_a_layer(graph: dict[str, set[str]]) -> None:
    assert {package(module) for module in graph} - {"", "__main__"} <= set(RANK)


def test_imports_point_downwards(graph: dict[str, set[str]]) -> None:
    upward = [
        f"{module} imports {target}"
        for module, targets in graph.items()
        for target in targets
        if package(module) in RANK and package(target) in RANK
        if package(module) != package(target) and RANK[package(module)] >= RANK[package(target)]
    ]
    assert not upward


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Modules that can't be put in an order, after all that can be were taken away."""
    remaining = {module: set(targets) - {module} for module, targets in graph.items()}
    while leaves := [module for module, targets in remaining.items() if not targets]:
        for leaf in leaves:
            del remaining[leaf]
        for targets in remaining.values():
            targets.difference_update(leaves)
    return sorted(remaining)


def test_no_modules_import_each_other_in_a_circle(graph: dict[str, set[str]]) -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]
    assert not circles(graph)
