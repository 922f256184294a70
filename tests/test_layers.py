"""The rooms of the house: what may import what, read from the imports of every file."""

import ast

import pytest

from tests.tools.launching import ROOT

# Bottom up: a file imports those of its own layer and of the layers before it.
LAYERS = [
    "errors arguments extras files own_rank streams termination threads library_settings console",
    "native",
    "config recurrence matrix_recurrence",
    "model",
    "generation",
    "data schedule",
    "checkpoint config_file deepspeed_check deepspeed_config run_record run_folder evaluation held_out_data trained_model monitor optimizer",
    "analysis inference planning supervision export harness report",
    "serving",
    "engine",
    "commands",
    "cli __main__",
]
PACKAGES = ("ten_dist", "launch", "data_prep")
# Each package may import itself and these.
BELOW = {"ten_dist": (), "launch": ("ten_dist",), "data_prep": ("ten_dist",)}
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names.split()}


def modules():
    """Path of every file by the name of its module."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(p for p in parts if p != "__init__")
            found[name] = path
    return found


MODULES = modules()


def imports_of(path):
    """Our own modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in MODULES else node.module)
    return {
        name for name in found if name.split(".")[0] in (*PACKAGES, "tests", "docs")
    }


GRAPH = {name: imports_of(path) for name, path in MODULES.items()}


def layer(module):
    parts = module.split(".")
    return RANK[parts[1]] if len(parts) > 1 else len(LAYERS)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_lies_below(package):
    allowed = {package, *BELOW[package]}
    wrong = [
        f"{module} imports {name}"
        for module, names in GRAPH.items()
        for name in names
        if module.split(".")[0] == package and name.split(".")[0] not in allowed
    ]
    assert not wrong


def test_every_file_of_the_library_has_a_layer_and_imports_none_above():
    wrong = [
        f"{module} imports {name}"
        for module, names in GRAPH.items()
        for name in names
        if module.startswith("ten_dist.")
        and name.startswith("ten_dist.")
        and layer(name) > layer(module)
    ]
    assert not wrong


def test_no_command_imports_another():
    commands = {
        name
        for name in MODULES
        if name.startswith("ten_dist.commands.") or name.endswith(".command")
    }
    wrong = [
        f"{module} imports {name}"
        for module, names in GRAPH.items()
        for name in names & commands
        if module != name and (module in commands or module.startswith("ten_dist."))
    ]
    assert not wrong


def test_there_is_no_circle():
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done or module not in GRAPH:
            return
        path.append(module)
        for name in sorted(GRAPH[module]):
            visit(name)
        path.pop()
        done.add(module)

    for module in sorted(GRAPH):
        visit(module)


def test_benchmarks_import_no_tests():
    for path in (ROOT / "benchmarks").rglob("*.py"):
        assert not [n for n in imports_of(path) if n.split(".")[0] == "tests"], path


def test_no_file_name_is_used_twice_in_the_library():
    names = [
        path.name
        for path in (ROOT / "ten_dist").rglob("*.py")
        if not path.name.startswith("_")
    ]
    twice = sorted({name for name in names if names.count(name) > 1})
    assert not twice
