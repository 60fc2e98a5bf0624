"""The house keeps its order: who may import whom, what is documented, what may never be in it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "slowllm"
# From the ground up: a room may import from those before it, never from those after it.
ROOMS = [
    "errors", "options", "heap", "buffers", "dice", "lanes", "stops", "spans", "checkpoint", "naming", "state", "direct", "reader", "forecast", "plan", "device_plan", "store.units", "store.kernels", "store.on_device", "store.codecs", "store.manifest", "store.pickles", "store.encode", "store.verify", "swap", "devices", "riders", "carousel", "blocks", "head", "losses",
    "sharing", "soft_prompts", "prompt_files", "layout", "skeleton", "filling", "placing", "model", "measure", "packing", "scoring", "corpus", "examples", "recipes", "trunk", "lessons", "tuning",
    "choices", "prompts", "generation", "trees", "drafts", "api", "batch_requests", "batch", "tasks", "console", "harness", "chat", "hub", "download", "store.convert", "verbs", "store_verbs", "score_verbs", "eval_verbs",
    "generate_verbs", "batch_verbs", "tune_verbs", "cli", "__main__",
]  # fmt: skip
# Packages that only some rooms may know; a room not named in a list may not import it.
ONLY_IN = {
    "transformers": {
        "naming",
        "blocks",
        "head",
        "losses",
        "soft_prompts",
        "layout",
        "skeleton",
        "filling",
        "placing",
        "model",
        "sharing",
        "recipes",
        "lessons",
        "tuning",
        "corpus",
        "generation",
        "drafts",
        "verbs",
        "store.convert",
        "store_verbs",
    },
    "huggingface_hub": {"model", "hub", "download"},
    "psutil": {"model", "measure", "tuning", "generate_verbs"},
    "rich": {"console", "chat"},
    "typer": {
        "verbs",
        "score_verbs",
        "eval_verbs",
        "generate_verbs",
        "batch_verbs",
        "tune_verbs",
        "store_verbs",
        "cli",
    },
    "hivemind": set(),
    "lm_eval": {"harness"},
    "datasets": {"tasks"},
    "jinja2": {"tasks"},
    "yaml": {"tasks"},
    "promptsource": {"tasks"},
    "gradio": set(),
    "peft": {"prompt_files"},
    "tensorboard": set(),
    "accelerate": set(),
    "pickle": set(),
    "numba": {"store.kernels"},
}


def home(room: str) -> Path:
    return PACKAGE / f"{room.replace('.', '/')}.py"


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports by full names only"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def test_every_room_is_known() -> None:
    found = {".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    assert {name for name in found if not name.endswith("__init__")} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_run_one_way(room: str) -> None:
    names = imports(home(room))
    used = {other for other in ROOMS for name in names if f"{name}.".startswith(f"slowllm.{other}.")}
    late = {other for other in used if ROOMS.index(other) >= ROOMS.index(room)}
    assert not late, f"{room} imports from rooms above it: {late}"


@pytest.mark.parametrize("room", ROOMS)
def test_packages_stay_in_their_rooms(room: str) -> None:
    top = {name.split(".")[0] for name in imports(home(room))}
    for package, rooms in ONLY_IN.items():
        assert package not in top or room in rooms, f"{room} may not know {package}"


@pytest.mark.parametrize("room", [*ROOMS, "__init__", "store.__init__"])
def test_what_is_public_is_documented_and_typed(room: str) -> None:
    tree = ast.parse(home(room).read_text())
    assert ast.get_docstring(tree), f"{room} has no docstring"

    def check(body: list[ast.stmt], inside: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                if any(ast.unparse(decorator) == "overload" for decorator in node.decorator_list):
                    continue
                assert ast.get_docstring(node), f"{room}.{inside}{node.name} has no docstring"
                if isinstance(node, ast.ClassDef):
                    check(node.body, f"{node.name}.")

    check(tree.body, "")


@pytest.mark.parametrize("room", ROOMS)
def test_files_can_be_read_in_one_sitting(room: str) -> None:
    assert len(home(room).read_text().splitlines()) <= 600


def test_no_module_keeps_state_or_patches_another() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Global), f"{path.name}: module state"
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called == "torch.load" and path == home("store.pickles"):
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
                continue
            assert called not in {"torch.set_default_dtype", "torch.load", "pickle.load", "eval", "exec"}, (
                path.name
            )
