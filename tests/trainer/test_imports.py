"""The direction of imports: from the commands down to the ground floor, and never in a circle."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
# From the ground up. A floor may import from those below, and its rooms from each other.
FLOORS = [
    {"errors", "files"},
    {"corpus", "job"},
    {"data", "families"},
    {"models", "objective", "engine"},
    {"evaluation"},
    {"training"},
    {"throughput"},
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

Module = tuple[str, ...]  # ("trainer", "data", "batches")


def modules() -> dict[Module, Path]:
    files = (path for folder in ("trainer", "kernels", "launch") for path in (ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT).with_suffix("").parts: path for path in files}


def imports(path: Path, known: dict[Module, Path]) -> Iterator[Module]:
    """The project's modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            module = tuple(name.split(".")[1:])
            if name.startswith("distilspeed.") and module in known:
                yield module


def test_every_room_has_a_floor() -> None:
    rooms = {path.stem for path in (ROOT / "trainer").iterdir() if path.suffix in ("", ".py")}
    assert rooms - {"__init__", "__pycache__"} == set(FLOOR_OF)


def test_imports_run_downwards() -> None:
    known = modules()
    upwards = [
        f"{'.'.join(module)} imports {'.'.join(imported)}"
        for module, path in known.items()
        for imported in imports(path, known)
        if is_upwards(module, imported)
    ]
    assert not upwards


def is_upwards(module: Module, imported: Module) -> bool:
    if module[0] != imported[0]:  # launch imports both others, and the trainer imports the losses
        return imported[0] == "launch" or module[0] == "kernels"
    return module[0] == "trainer" and FLOOR_OF[imported[1]] > FLOOR_OF[module[1]]


def test_no_module_imports_itself_through_others() -> None:
    known = modules()
    edges = {module: set(imports(path, known)) - {module} for module, path in known.items()}
    while True:
        leaves = {module for module, imported in edges.items() if not imported}
        if not leaves:
            break
        edges = {module: imported - leaves for module, imported in edges.items() if module not in leaves}
    assert not edges, "in a circle, or above one"


def test_families_alone_know_an_architecture_by_its_class() -> None:
    of_one_architecture = re.compile(r"(?!Auto|PreTrained|DataCollator)\w+(Model|Config|For[A-Z]\w+)")
    found = [
        f"{'.'.join(module)} imports {name.name}"
        for module, path in modules().items()
        if module[0] == "trainer" and module[1] != "families"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers")
        for name in node.names
        if of_one_architecture.fullmatch(name.name)
    ]
    assert not found
