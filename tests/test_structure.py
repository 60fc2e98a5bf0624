"""The house keeps its order: which package may import which, what is documented, and what may never be in it."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "slowllm"
# What each package, and each module beside the packages, may import of slowllm. Packages of one line do not see each
# other; whatever is not listed here may be imported from nowhere.
MAY_IMPORT: dict[str, set[str]] = {}
for _level in (
    {"errors", "malloc", "files", "html", "rounding", "version"},
    {"options", "storage", "tables"},
    {"planning", "streaming"},
    {"modeling"},
    {"runtime", "prepare"},
    {"inference", "swarm"},
    {"tuning"},
    {"entrypoints"},
    {"__init__", "__main__", "cli", "harness"},
):
    _below = set(MAY_IMPORT)
    MAY_IMPORT |= dict.fromkeys(_level, _below)
MAY_IMPORT |= {"files": {"errors"}}
# Where a third-party package may be imported: a package of slowllm, or one of its modules. What is not listed here
# (the standard library, torch, numpy) is free, but see `NEVER_LOADED_BY`.
ONLY_IN = {
    "transformers": {"modeling", "runtime", "prepare", "inference", "swarm.petals", "tuning", "entrypoints"},
    "greenlet": {"streaming.gathering"},
    "peft": {"modeling.soft_prompt_files"},
    "pyarrow": {"tables", "inference.shard_files"},
    "safetensors": {"inference", "modeling", "runtime", "prepare"},
    "numba": {"storage.codecs.cpu_kernels"},
    "gguf": {"storage.codecs.gguf_grids"},
    "huggingface_hub": {"prepare", "runtime.model_folder"},
    "psutil": {"runtime", "tuning", "entrypoints"},
    "datasets": {"inference.eval_tasks"},
    "jinja2": {"inference.prompt_templates", "entrypoints.report.page"},
    "matplotlib": {"entrypoints.report.plots"},
    "yaml": {"inference.prompt_templates", "entrypoints.settings"},
    "promptsource": {"inference.prompt_templates"},
    "lm_eval": {"entrypoints.lm_eval_model", "entrypoints.lm_eval_run"},
    "pydantic": {"entrypoints.openai"},
    "pydantic_core": {"entrypoints.openai"},
    "fastapi": {"entrypoints.server", "entrypoints.web"},
    "starlette": {"entrypoints.server", "entrypoints.web"},
    "uvicorn": {"entrypoints.server", "entrypoints.web"},
    "h11": {"entrypoints.server"},
    "prometheus_client": {"entrypoints.server"},
    "rich": {"entrypoints"},
    "IPython": {"entrypoints.notebook"},
    "typer": {"entrypoints.cli"},
    "tensorboard": set(),
    "gradio": {"entrypoints.web"},
    # It takes seconds to import, and forks in its higher layers: only what opens the network knows it.
    "hivemind": {"swarm.network", "swarm.dialling", "swarm.libp2p_start", "swarm.directory"},
    "cryptography": {"swarm.identity"},
    "msgpack": set(),
    "accelerate": set(),
    "pickle": set(),
}
# What importing every module of a package must not load, not even by way of other modules.
NEVER_LOADED_BY = {
    "planning": {"torch", "numpy", "transformers", "huggingface_hub", "rich", "typer"},
    "storage": {"transformers", "huggingface_hub", "rich", "typer", "numba"},
    "streaming": {"transformers", "huggingface_hub", "rich", "typer", "numba"},
    "modeling": {"typer", "peft", "numba"},
    "swarm": {"hivemind", "cryptography", "rich", "typer"},
}

# Modules that are imported only where they are used.
LOADED_LATE = {
    "storage.codecs.cpu_kernels",
    "storage.codecs.fp4_kernels",
    "storage.codecs.fp8_kernels",
    "storage.codecs.fp8_packed_kernels",
    "storage.codecs.mxfp4_kernels",
    "storage.codecs.mxfp4_row_kernels",
    "storage.codecs.nvfp4_kernels",
    "storage.codecs.scaled_int_kernels",
    "storage.codecs.bnb_kernels",
    "storage.codecs.packed_kernels",
    "storage.codecs.gguf_kernels",
    "storage.codecs.gguf_super_kernels",
    "storage.codecs.gguf_pair_kernels",
    "storage.codecs.gguf_grid_kernels",
    "modeling.soft_prompt_files",
}


def name_of(path: Path) -> str:
    """Return a module's name below slowllm, `__init__` for slowllm itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
PACKAGES = sorted({name.split(".")[0] for name in MODULES})


def called(function: ast.expr) -> str:
    """Return the last part of the name by which a function is called, or nothing."""
    return getattr(function, "attr", getattr(function, "id", ""))


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def imports(path: Path) -> tuple[str, ...]:
    """Return what a file imports by full names, anywhere in it and by name (`importlib.import_module`), too."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports by full names only"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and called(node.func) in ("import_module", "__import__"):
            argument = node.args[0]
            assert isinstance(argument, ast.Constant) or path == PACKAGE / "__init__.py", (
                f"{path.name}: imports a module whose name cannot be read here"
            )
            if isinstance(argument, ast.Constant):
                yield str(argument.value)


def test_every_package_has_its_place() -> None:
    assert set(PACKAGES) <= set(MAY_IMPORT)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str) -> None:
    wrong = []
    for name, path in MODULES.items():
        if name.split(".")[0] != package:
            continue
        for imported in imports(path):
            if not f"{imported}.".startswith("slowllm."):
                continue
            target = imported.split(".")[1] if "." in imported else "__init__"
            if target not in MAY_IMPORT:  # a name of slowllm itself, such as slowllm.load
                target = "__init__"
            if target != package and target not in MAY_IMPORT[package]:
                wrong.append(f"slowllm.{name} imports {imported}")
    assert not wrong


def test_modules_do_not_import_one_another_in_a_circle() -> None:
    arrows = {
        name: {
            target
            for imported in imports(path)
            for target in (
                imported.removeprefix("slowllm."),
                imported.removeprefix("slowllm.").rpartition(".")[0],
            )
            if imported.startswith("slowllm.") and target in MODULES and MODULES[target].name != "__init__.py"
        }
        for name, path in MODULES.items()
    }
    while free := [name for name, targets in arrows.items() if not targets & set(arrows)]:
        for name in free:
            del arrows[name]
    assert not arrows, f"modules that import one another: {sorted(arrows)}"


def test_third_party_packages_stay_where_they_belong() -> None:
    wrong = []
    for name, path in MODULES.items():
        for imported in imports(path):
            homes = ONLY_IN.get(imported.split(".")[0])
            if homes is not None and not any(f"{name}.".startswith(f"{home}.") for home in homes):
                wrong.append(f"slowllm.{name} imports {imported}")
    assert not wrong


def test_nothing_heavy_is_loaded_by_a_detour() -> None:
    # One process for all, in the order of the table: what a package may not load, those before it may not either.
    names = {
        package: [
            f"slowllm.{name}"
            for name in MODULES
            if f"{name}.".startswith(f"{package}.") and name not in LOADED_LATE
        ]
        for package in NEVER_LOADED_BY
    }
    code = f"""
import json, sys
found = {{}}
for package, names in {names}.items():
    for name in names:
        __import__(name)
    found[package] = list(sys.modules)
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded: dict[str, list[str]] = json.loads(done.stdout)
    assert all(f"slowllm.{package}" in modules for package, modules in loaded.items())
    wrong = {package: NEVER_LOADED_BY[package].intersection(modules) for package, modules in loaded.items()}
    assert not any(wrong.values()), wrong


# Every class of slowllm by its name; no two public ones share a name.
CLASSES = {
    node.name: node
    for path in MODULES.values()
    for node in ast.walk(tree_of(path))
    if isinstance(node, ast.ClassDef)
}


def inherits_docstring(method: str, node: ast.ClassDef) -> bool:
    """Whether a class of slowllm from which this one is derived documents the method."""
    bases = [CLASSES[name] for base in node.bases if (name := ast.unparse(base)) in CLASSES]
    return any(
        any(isinstance(f, ast.FunctionDef) and f.name == method and ast.get_docstring(f) for f in base.body)
        or inherits_docstring(method, base)
        for base in bases
    )


@pytest.mark.parametrize("module", sorted(MODULES))
def test_what_is_public_is_documented(module: str) -> None:
    tree = tree_of(MODULES[module])
    assert ast.get_docstring(tree), f"{module} has no docstring"

    def check(body: list[ast.stmt], inside: ast.ClassDef | None = None) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                if any(ast.unparse(decorator) == "overload" for decorator in node.decorator_list):
                    continue
                where = f"{module}.{inside.name}.{node.name}" if inside else f"{module}.{node.name}"
                is_documented = ast.get_docstring(node) or (inside and inherits_docstring(node.name, inside))
                assert is_documented, f"{where} has no docstring"
                if isinstance(node, ast.ClassDef):
                    check(node.body, node)

    check(tree.body)


def test_no_two_public_classes_share_a_name() -> None:
    homes = defaultdict(list)
    for name, path in MODULES.items():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(name)
    assert not {name: found for name, found in homes.items() if len(found) > 1}


def test_files_can_be_read_in_one_sitting() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    long = {name: length for name, length in lengths.items() if length > 400}
    assert len(long) <= 3, f"more than three files of over 400 lines: {long}"
    for name, length in long.items():
        docstring = ast.get_docstring(ast.parse(MODULES[name].read_text())) or ""
        assert "one file because" in docstring, f"{name} does not say why it is one file of {length} lines"


def test_no_module_keeps_state_or_patches_another() -> None:
    for name, path in MODULES.items():
        for node in ast.walk(tree_of(path)):
            assert not isinstance(node, ast.Global), f"{name}: module state"
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called == "torch.load" and name == "storage.pickles":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
                continue
            assert called not in {"torch.set_default_dtype", "torch.load", "pickle.load", "eval", "exec"}, (
                name
            )
