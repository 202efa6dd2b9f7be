"""The house rules, checked on the source: imports go one way, heavy packages stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "hf_lowmem_optim"
NAME = PACKAGE.name
#: From the bottom up; a module may import from its own layer and from those before it.
LAYERS = (
    "state",
    "kernels",
    "compression",
    "preconditioners",
    "optimizers",
    "registry",
    "memory",
    "trainer",
    "__main__",
)
#: Outside packages that only one layer may import.
ONLY_IN = {
    "transformers": "trainer",
    "accelerate": "trainer",
    "peft": "trainer",
    "triton": "kernels",
    "numba": "kernels",
    "llvmlite": "kernels",
}
SHAPELESS = {"utils", "common", "helpers", "misc"}


def modules() -> Iterator[tuple[tuple[str, ...], ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield parts, ast.parse(path.read_text())


def imports(parts: tuple[str, ...], tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Absolute names of imported modules, and whether only a type checker imports them."""
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {parts}"
            assert node.module is not None
            yield node.module, id(node) in typing_only
            if node.module == NAME or node.module.startswith(f"{NAME}."):
                for alias in node.names:
                    if (PACKAGE / Path(*node.module.split(".")[1:]) / f"{alias.name}.py").exists():
                        yield f"{node.module}.{alias.name}", id(node) in typing_only


def test_imports_go_one_way() -> None:
    seen = 0
    for parts, tree in modules():
        if parts == ("__init__",):
            continue
        own = LAYERS.index(parts[0])
        for name, typing_only in imports(parts, tree):
            if not name.startswith(f"{NAME}."):
                continue
            seen += 1
            other = LAYERS.index(name.split(".")[1])
            assert other <= own or typing_only, f"{'/'.join(parts)} imports {name}, which is above it"
    assert seen > 20


def test_heavy_packages_stay_in_their_layer() -> None:
    for parts, tree in modules():
        for name, _ in imports(parts, tree):
            home = ONLY_IN.get(name.split(".")[0])
            assert home is None or parts[0] == home, f"{'/'.join(parts)} imports {name}; only {home}/ may"


def test_modules_have_no_import_cycle() -> None:
    graph = {}
    for parts, tree in modules():
        dotted = ".".join((NAME, *(p for p in parts if p != "__init__")))
        # an import inside a function runs later, when both modules are there
        at_import = ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)], [])
        graph[dotted] = {n for n, typing_only in imports(parts, at_import) if n.startswith(NAME) and not typing_only}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"import cycle: {' -> '.join((*path[path.index(module) :], module))}"
        if module in done:
            return
        for target in graph.get(module, ()):
            # a module may import from its own package's __init__ only if that does not import it back
            visit(target, (*path, module))
        done.add(module)

    for module in graph:
        if module != NAME:
            visit(module, ())


def test_module_names_say_something() -> None:
    for parts, _ in modules():
        assert not SHAPELESS & set(parts), parts


def test_the_optimizers_import_neither_transformers_nor_triton() -> None:
    code = (
        f"import sys, {NAME}.optimizers;"
        "heavy = ('transformers', 'triton', 'numba', 'peft', 'accelerate', 'bitsandbytes');"
        "print([m for m in heavy if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_the_package_works_without_its_optional_dependencies() -> None:
    """An import that finds none of them: as on a machine where no extra is installed."""
    code = f"""
import sys
for absent in ("triton", "numba", "peft", "bitsandbytes", "matplotlib"):
    sys.modules[absent] = None
import torch
import {NAME}
from {NAME}.registry import OPTIMIZERS
for name in {NAME}.__all__:
    getattr({NAME}, name)
for entry in OPTIMIZERS.values():
    weight = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = entry.optimizer_class([weight])
    weight.grad = torch.ones(64, 64)
    optimizer.step()
print("fine")
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "fine"
