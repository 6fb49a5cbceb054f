"""Who may import whom, what stays light, and what no shipped file may contain."""

from __future__ import annotations

import ast
import configparser
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Package -> our other packages that it may import. Everything runs one way: budget, retrieval <- cas <- experiments.
MAY_IMPORT = {
    "budget": set(),
    "retrieval": set(),
    "cas": {"budget", "retrieval"},
    "experiments": {"budget", "retrieval", "cas"},
}
OURS = {*MAY_IMPORT, "tests"}

# A loader that can run code from a file, or a switch that lets one.
LOADERS = re.compile(
    r"(?<![\w.])torch\.load\b|\bc?pickle\b|\bcloudpickle\b|\bdill\b|\bjoblib\b|\bshelve\b"
    r"|weights_only[\"']?\s*[=:]\s*False|allow_pickle[\"']?\s*[=:]\s*True|trust_remote_code[\"']?\s*[=:]\s*True"
)
# An absolute path of somebody's machine; not the /home/ inside a URL or a relative path.
PRIVATE_PATH = re.compile(r"(?<![\w.~-])(?:/(?:home|root|Users|work|workspace|scratch)/\w|[A-Za-z]:\\{1,2}Users\\)")


def imported(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute module name) of every import in ``source``, a module directly inside ``package``.

    Imports inside functions and under TYPE_CHECKING count, and so do names given to ``import_module`` as a literal.
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, name.name) for name in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                parents = package.split(".")[: 1 - level or None] if level else []
                base = [*parents, *([module] if module else [])]
                # `from .. import cas` names the module on the right
                yield from ((node.lineno, ".".join([*base, name.name])) for name in names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def test_imported_sees_every_kind_of_import() -> None:
    source = """
import os, cas.store.store as store
from budget import ledger
from . import files
from .hub import find_model
from .. import near
if TYPE_CHECKING:
    from cas.model.frozen import FrozenModel
def late():
    import experiments
    importlib.import_module("cas.answering.answerer")
    __import__("tests")
"""
    assert {name for _, name in imported(source, "retrieval.sub")} == {
        "os",
        "cas.store.store",
        "budget.ledger",
        "retrieval.sub.files",
        "retrieval.sub.hub.find_model",
        "retrieval.near",
        "cas.model.frozen.FrozenModel",
        "experiments",
        "cas.answering.answerer",
        "tests",
    }


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_run_one_way(package: str) -> None:
    modules = sorted((ROOT / package).rglob("*.py"))
    assert modules
    forbidden = OURS - MAY_IMPORT[package] - {package}
    wrong = [
        f"{module.relative_to(ROOT)}:{line} imports {name}"
        for module in modules
        for line, name in imported(module.read_text(encoding="utf-8"), ".".join(module.parent.relative_to(ROOT).parts))
        if name.split(".")[0] in forbidden
    ]
    assert not wrong


# Rooms of the package, from the ground up: each imports only itself and what stands before it.
ROOMS = (
    "cas.errors", "cas.option_files", "cas.option_values", "cas.options", "cas.console", "cas.data", "cas.model", "cas.store",
    "cas.selfstudy",
    "cas.training", "cas.answering", "cas.exchange", "cas.serving", "cas.evaluation",
    "cas.report", "cas.train", "cas.query", "cas.commands", "cas.__main__",
)  # fmt: skip


def module_graph(root: Path, packages: Sequence[str]) -> dict[str, set[str]]:
    """Module -> our modules that it imports, of every kind that :func:`imported` sees. Packages are named by themselves."""
    sources = {
        ".".join((file.parent if file.stem == "__init__" else file.with_suffix("")).relative_to(root).parts): file
        for package in packages
        for file in (root / package).rglob("*.py")
    }
    graph: dict[str, set[str]] = {}
    for name, file in sources.items():
        graph[name] = set()
        for _, target in imported(file.read_text(encoding="utf-8"), ".".join(file.parent.relative_to(root).parts)):
            while target and target not in sources:
                target = target.rpartition(".")[0]
            if target and target != name:
                graph[name].add(target)
    return graph


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, or nothing."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for target in sorted(graph[name]):
                if around := visit(target, [*path, name]):
                    return around
            done.add(name)
        return []

    return next((around for name in sorted(graph) if (around := visit(name, []))), [])


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = module_graph(ROOT, list(MAY_IMPORT))
    assert len(graph) > 100 and not circle(graph)


def test_rooms_import_only_what_stands_below_them() -> None:
    def room(module: str) -> int | None:
        return next((n for n, name in enumerate(ROOMS) if f"{module}.".startswith(f"{name}.")), None)

    graph = module_graph(ROOT, ["cas"])
    assert {module for module in graph if room(module) is None} == {"cas"}  # which names its parts lazily
    wrong = [
        f"{module} imports {target}"
        for module, targets in graph.items()
        for target in targets
        if (here := room(module)) is not None and (there := room(target)) is not None and there > here
    ]
    assert not sorted(wrong)


def test_circles_and_rooms_are_seen(tmp_path: Path) -> None:
    for name, source in {"a": "from p import b", "b": "def f():\n    from p.c import x", "c": "import p.a"}.items():
        (tmp_path / "p").mkdir(exist_ok=True)
        (tmp_path / "p" / f"{name}.py").write_text(source)
    assert circle(module_graph(tmp_path, ["p"])) == ["p.a", "p.b", "p.c", "p.a"]


@pytest.mark.parametrize("module", ["cas", "cas.errors", "budget.ledger", "retrieval"])
def test_import_needs_no_torch(module: str) -> None:
    code = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    loaded = set(json.loads(done.stdout))
    assert module in loaded
    assert not loaded & {"torch", "transformers", "faiss", "sentence_transformers"}


def test_the_package_ships_cas_budget_and_retrieval_whole() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    found = {
        ".".join(module.parent.relative_to(ROOT).parts)
        for package in ("cas", "budget", "retrieval")
        for module in (ROOT / package).rglob("*.py")
    }
    assert set(config["options"]["packages"].split()) == found


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """Files of the four packages that git tracks or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *MAY_IMPORT]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    found = [ROOT / name for name in listed.split("\0") if name]
    if not found:
        pytest.skip("not a git checkout of its own")
    return [file for file in found if file.is_file()]


def matches(pattern: re.Pattern[str], files: list[Path]) -> list[str]:
    """``path:line: text`` of every match of ``pattern``."""
    found = []
    for file in files:
        text = file.read_bytes().decode("utf-8", errors="replace")
        found += [
            f"{file.relative_to(ROOT)}:{text.count(chr(10), 0, m.start()) + 1}: {m[0]}" for m in pattern.finditer(text)
        ]
    return found


def test_nothing_loads_code_with_data(files: list[Path]) -> None:
    assert not matches(LOADERS, [file for file in files if file.suffix == ".py"])


def test_no_path_of_somebodys_machine(files: list[Path]) -> None:
    assert not matches(PRIVATE_PATH, files)


@pytest.mark.parametrize(
    "text",
    [
        'torch.load("a.pt")',
        "import pickle",
        "from joblib import load",
        "np.load(file, allow_pickle=True)",
        "torch_load(file, weights_only = False)",
        '{"trust_remote_code": True}',
    ],
)
def test_loaders_are_recognised(text: str) -> None:
    assert LOADERS.search(text)


@pytest.mark.parametrize(
    "text", ["safetensors.torch.load(blob)", "allow_pickle=False", "trust_remote_code=False", "pickled"]
)
def test_safe_code_is_no_loader(text: str) -> None:
    assert not LOADERS.search(text)


def test_private_paths_are_recognised() -> None:
    private = ["/" + rest for rest in ("home/ada/run", "root/x", "Users/ada/run", "work/data")]
    assert all(PRIVATE_PATH.search(f'"{path}"') for path in [*private, "C:\\Users\\ada"])
    public = ["https://example.org/home/page", "runs/home/a", "~/home/a", "../work/a", "/usr/share/home"]
    assert not [path for path in public if PRIVATE_PATH.search(path)]
