"""The house rules, checked on the source: imports go one way, heavy packages stay where they belong, nothing grows."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "hf_lowmem_optim"
NAME = PACKAGE.name
#: From the bottom up; a module may import from its own layer and from those before it.
LAYERS = (
    *("words", "json_file", "spec", "ops", "engine", "optimizers", "pruning", "nested_lora", "local_updates"),
    *("registry", "memory", "trainer", "integrations", "__main__"),
)
#: Outside packages, each with the only places that may import it.
ONLY_IN = {
    "transformers": ("trainer/",),
    "accelerate": ("trainer/",),
    "peft": ("trainer/",),
    "axolotl": ("integrations/",),
    "lightning": ("integrations/",),
    "triton": ("ops/triton/",),
    "numba": ("ops/cpu/",),
    "llvmlite": ("ops/cpu/",),
    "bitsandbytes": ("engine/adamw.py", "memory/"),
}
MAX_LINES = 450
MAX_ARGUMENTS = 9
#: Of the kernels, the rest of the ground floor, each system upon it, and what talks to users.
MAX_PART_LINES = {
    "ops/triton/": 4_290,
    "ops/ engine/ optimizers/": 13_410,
    "pruning/": 1_660,
    "nested_lora/": 700,
    "local_updates/": 560,
    "": 7_190,
}
#: Decorators whose functions are compiled: by Triton, or by numba through ``ops/cpu/jit.py``.
COMPILED = {"jit", "loop", "inlined"}
Function = ast.FunctionDef | ast.AsyncFunctionDef
RUNTIME_OF_OUR_OWN = re.compile(r"GOMP|omp_pause|set_num_threads|_getframe|ctypes")

FILES = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {file: ast.parse(text) for file, text in FILES.items()}


def module_name(file: str) -> str:
    return ".".join((NAME, *(part for part in file.removesuffix(".py").split("/") if part != "__init__")))


MODULES = {module_name(file): file for file in FILES}


def imports(file: str) -> Iterator[str]:
    """Names of the modules that a file imports: anywhere in it, under TYPE_CHECKING and in functions too."""
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"relative import in {file}"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in MODULES else node.module


def own_imports(file: str) -> set[str]:
    return {name for name in imports(file) if name.split(".")[0] == NAME}


def decorator_name(node: ast.expr) -> str:
    if isinstance(node, ast.Call):
        node = node.func
    return node.attr if isinstance(node, ast.Attribute) else ast.unparse(node)


def outside_kernels(node: ast.AST) -> Iterator[Function]:
    """Every function in there that is not compiled."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            if COMPILED & {decorator_name(each) for each in child.decorator_list}:
                continue
            yield child
        yield from outside_kernels(child)


FUNCTIONS = {f"{file}:{f.lineno} {f.name}": f for file, tree in TREES.items() for f in outside_kernels(tree)}


def all_arguments(function: Function) -> list[ast.arg]:
    arguments = function.args
    starred = [each for each in (arguments.vararg, arguments.kwarg) if each is not None]
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *starred]


def test_imports_go_one_way() -> None:
    """No exception for type checkers or functions. The package's own file loads lazily what is asked of it."""
    seen = 0
    for file in FILES:
        if file == "__init__.py":
            continue
        own = LAYERS.index(module_name(file).split(".")[1])
        for name in own_imports(file) - {NAME}:
            seen += 1
            assert LAYERS.index(name.split(".")[1]) <= own, f"{file} imports {name}, which is above it"
    assert seen > 100


def test_only_the_command_line_imports_the_package_itself() -> None:
    assert [file for file in FILES if NAME in own_imports(file)] == ["__main__.py"]


def test_modules_have_no_import_cycle() -> None:
    graph = {name: own_imports(file) for name, file in MODULES.items()}
    assert set(TopologicalSorter(graph).static_order()) == set(MODULES)  # raises what names the cycle


def test_heavy_packages_stay_in_their_place() -> None:
    for file in FILES:
        for name in imports(file):
            homes = ONLY_IN.get(name.split(".")[0])
            assert homes is None or file.startswith(homes), f"{file} imports {name}; only {' and '.join(homes)} may"
    assert {"triton", "numba", "transformers"} <= {name.split(".")[0] for file in FILES for name in imports(file)}


def test_there_is_no_runtime_of_our_own() -> None:
    assert not [file for file, text in FILES.items() if RUNTIME_OF_OUR_OWN.search(text)]


def test_nobody_asks_a_sharded_tensor_for_one_answer() -> None:
    """Such an answer is that of one process, without an error: ``probe.py`` asks all of them."""
    asked, converted = {"any", "all", "item", "tolist", "equal", "is_nonzero"}, {"bool", "float", "int"}
    # an option that is a tensor is no parameter, and a mesh's tensor no part of one
    harmless = (" value.item()", " int(mesh.mesh[place])")
    files = [file for file in FILES if file.startswith("engine/sharding/")]
    for file in [*files, "engine/optimizer.py", "engine/allocation.py", "engine/coupled.py"]:
        for node in ast.walk(TREES[file]):
            method = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in asked
            if method or (isinstance(node, ast.Call) and getattr(node.func, "id", None) in converted):
                where = f"{file}:{node.lineno} {ast.unparse(node)}"
                assert file == "engine/sharding/probe.py" or where.endswith(harmless), where
    assert len(files) > 4


def test_files_and_the_package_stay_small() -> None:
    lines = {file: len(text.splitlines()) for file, text in FILES.items()}
    assert {file: count for file, count in lines.items() if count > MAX_LINES} == {}
    parts = dict.fromkeys(MAX_PART_LINES, 0)
    for file, count in lines.items():
        parts[next(part for part in parts if not part or file.startswith(tuple(part.split())))] += count
    assert {part: count for part, count in parts.items() if count > MAX_PART_LINES[part]} == {}


def test_functions_take_few_arguments() -> None:
    """Kernels take what their launch needs, constructors an optimizer's options."""
    counts = {where: len(all_arguments(f)) for where, f in FUNCTIONS.items() if f.name != "__init__"}
    assert {where: count for where, count in counts.items() if count > MAX_ARGUMENTS} == {}


def test_everything_is_annotated() -> None:
    for where, function in FUNCTIONS.items():
        without = {each.arg for each in all_arguments(function) if each.annotation is None}
        assert not without - {"self", "cls"}, where
        assert function.returns is not None, where


def test_module_names_say_something() -> None:
    assert not {"utils", "common", "helpers", "misc"} & {part for name in MODULES for part in name.split(".")}


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_the_package_imports_no_torch_and_optimizers_and_plans_nothing_heavy() -> None:
    heavy = ("transformers", "triton", "numba", "peft", "accelerate", "bitsandbytes")
    code = f"import sys, {NAME}; print('torch' in sys.modules); import {NAME}.registry, {NAME}.memory.plan; "
    assert python(f"{code}print([m for m in {heavy} if m in sys.modules])") == "False\n[]"


def test_the_package_works_without_its_optional_dependencies() -> None:
    """An import that finds none of them: as on a machine where no extra is installed."""
    code = f"""
import sys
sys.modules |= dict.fromkeys(("triton", "numba", "peft", "bitsandbytes", "matplotlib"))
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
    assert python(code) == "fine"
