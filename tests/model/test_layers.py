"""Who may import whom: the rooms of `model/` stand on rows, and imports only go down."""

import ast
import importlib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = """
train inference
optimized_pretrain optimized_data_processing optimized_inference
utils
model.publish
model.runs model.convert model.serving
model.training model.weights model.generation
model.dataset model.model model.corpus
model.token_file model.text model.kv_cache model.experts
model.storage model.LMConfig model.command model.terminal model.feed_forward model.unusable_gpus
model.options model.loss model.attention model.lora model.requirements model.children model.interrupts model.trial
model.accelerator model.hubs model.document_attention
model.errors
"""
ROW = {room: number for number, row in enumerate(ROWS.split("\n")) for room in row.split()}
NETWORK = {  # can be copied out
    f"model.{name}"
    for name in (
        *("LMConfig", "model", "experts", "feed_forward", "attention", "document_attention", "loss", "kv_cache"),
        "accelerator",
    )
}
DEFERS_TORCH = {("model.training.optimizer", "model.training.muon")}  # settings are checked without torch


def room_of(module: str) -> str:
    """model.text.prompts -> model.text; model.LMConfig and train are rooms by themselves."""
    return ".".join(module.split(".")[:2])


def read_imports() -> list[tuple[str, str, bool]]:
    """(importer, imported, whether within a function), of all that are ours; also those under TYPE_CHECKING."""
    found = []
    for path in [*ROOT.glob("model/**/*.py"), *(ROOT / f"{room}.py" for room in ROW if "." not in room)]:
        importer = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        inner = {id(node) for function in functions for node in ast.walk(function)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{importer}: a relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if is_module(name) else node.module for name in names]
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [(importer, name, id(node) in inner) for name in names if room_of(name) in ROW]
    return found


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


IMPORTS = read_imports()


def test_every_file_stands_on_a_row():
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.glob("model/**/*.py")}
    assert {room_of(file) for file in files} - {"model.__init__"} <= ROW.keys()


def test_imports_only_go_down():
    upwards = {
        (importer, imported)
        for importer, imported, _ in IMPORTS
        if importer != "model" and room_of(importer) != room_of(imported)
        if ROW[room_of(importer)] >= ROW[room_of(imported)]
    }
    assert upwards == set()


def test_no_modules_import_each_other():
    """Raises CycleError where they do."""
    graph = {}
    for importer, imported, _ in IMPORTS:
        if importer != imported:
            graph.setdefault(importer, set()).add(imported)
    TopologicalSorter(graph).prepare()


def test_only_scripts_import_ours_within_functions():
    """Scripts do it so that what is wrong is told before torch is loaded; within model/ it would hide a circle."""
    hidden = {
        (importer, imported) for importer, imported, within in IMPORTS if within and importer.startswith("model.")
    }
    assert hidden == DEFERS_TORCH


def test_the_network_can_be_copied_out():
    needed = {imported for importer, imported, _ in IMPORTS if importer in NETWORK}
    assert needed <= NETWORK | {"model.errors", "model.options"}


def test_only_scripts_import_the_corpus():
    importers = {room_of(importer) for importer, imported, _ in IMPORTS if room_of(imported) == "model.corpus"}
    assert not {room for room in importers if room.startswith("model.")} - {"model.corpus"}


def test_every_name_of_ours_that_is_imported_exists():
    """In tests and benchmarks too, and within functions, where only a run would show it."""
    missing = []
    for path in [
        *ROOT.glob("*.py"),
        *(p for room in ("model", "tests", "benchmarks") for p in ROOT.glob(f"{room}/**/*.py")),
    ]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and room_of(node.module) in ROW:
                module = importlib.import_module(node.module)
                names = [a.name for a in node.names if not is_module(f"{node.module}.{a.name}")]
                missing += [f"{path.relative_to(ROOT)}: {node.module}.{n}" for n in names if not hasattr(module, n)]
    assert not missing


@pytest.mark.parametrize(("room", "other"), [("tests", "benchmarks"), ("benchmarks", "tests")])
def test_tests_and_benchmarks_do_not_import_one_another(room, other):
    """Neither as a package nor by a file's name alone, which a folder on the path would allow."""
    stems = {name: {path.stem for path in ROOT.glob(f"{name}/**/*.py")} for name in (room, other)}
    foreign = {other} | stems[other] - stems[room] - {path.stem for path in ROOT.glob("*.py")}
    found = []
    for path in ROOT.glob(f"{room}/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            found += [f"{path.relative_to(ROOT)}: {name}" for name in names if name.split(".")[0] in foreign]
    assert not found
