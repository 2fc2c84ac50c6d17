"""The shape of the repository: what imports what, what importing does, signatures, sizes, no traces."""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import bitkv

ROOT = Path(__file__).parents[1]
PACKAGE = Path(bitkv.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# each module may import those of the lines above it; the last line is open to new names
CORE = [
    ["native", "memory", "rope", "digests", "files"],
    ["shared"],
    ["pages", "pool"],
    ["codecs", "view", "checks"],
    ["packing", "recipe"],
    ["attention", "layer"],
    ["static"],
    ["snapshot"],
    ["cache"],
]
LAYERS = [*CORE, ["integrations"], ["evaluation", "benchmark"], ["calibration"]]
ENGINE_NAMES = {"Cache", "CacheLayerMixin", "AttentionInterface", "AttentionMaskInterface"}


def owner(path: Path) -> str:
    """The module or folder directly below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rank(name: str) -> int:
    return next((i for i, names in enumerate(LAYERS) if name in names), len(LAYERS))


def imports(path: Path) -> Iterator[tuple[str, set[str]]]:
    """Modules that a file imports at any depth, and the names it takes from each."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, set()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} imports relatively"
            yield node.module, {alias.name for alias in node.names}


def imported_by(statement: str) -> set[str]:
    """Top-level modules in `sys.modules` of a fresh interpreter after a statement."""
    report = f"{statement}\nimport sys\nprint(*{{m.partition('.')[0] for m in sys.modules}})"
    command = [sys.executable, "-c", report]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=PACKAGE.parent)
    return set(done.stdout.split())


def test_importing_the_package_imports_no_framework():
    loaded = imported_by("import bitkv")
    assert "bitkv" in loaded
    assert not loaded & {"torch", "transformers", "triton", "matplotlib", "plotly"}


def test_importing_the_core_loads_torch_only_and_touches_no_gpu():
    statement = "\n".join(f"import bitkv.{name}" for names in CORE for name in names)
    check = "import torch; assert not torch.cuda.is_initialized()"
    loaded = imported_by(f"{statement}\n{check}")
    assert "torch" in loaded
    assert not loaded & {"transformers", "matplotlib", "plotly"}
    assert "triton" not in loaded or "triton" in imported_by("import torch")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    mine = owner(path)
    if mine == "__init__":
        return
    for module, names in imports(path):
        top, _, rest = module.partition(".")
        if top != "bitkv":
            continue
        for name in [rest.partition(".")[0]] if rest else names:
            same_level = rank(name) == rank(mine) and rank(mine) >= len(CORE)
            assert name == mine or rank(name) < rank(mine) or same_level, f"{mine} imports {name}"


def test_only_the_integrations_build_on_the_engines_cache_and_attention():
    for path in FILES:
        if owner(path) == "integrations":
            continue
        for module, names in imports(path):
            if module.split(".")[0] in {"transformers", "vllm"}:
                assert rank(owner(path)) > rank("cache"), f"{path} imports {module}"
                assert not names & ENGINE_NAMES, f"{path} imports {names & ENGINE_NAMES}"
                assert not re.search(r"cache|mask|integrations", module), f"{path} imports {module}"


def public_functions() -> Iterator[tuple[str, object]]:
    for name in bitkv.__all__:
        thing = getattr(bitkv, name)
        if inspect.isclass(thing):
            if not inspect.isabstract(thing):
                yield f"{name}.__init__", thing.__init__
            for attribute, member in vars(thing).items():
                member = member.fget if isinstance(member, property) else member
                if inspect.isfunction(member) and not attribute.startswith("_"):
                    yield f"{name}.{attribute}", member
        elif callable(thing):
            yield name, thing


def test_every_public_name_resolves_to_the_package_or_plain_data():
    for name in bitkv.__all__:
        thing = getattr(bitkv, name)
        assert isinstance(thing, dict) or thing.__module__.startswith("bitkv.")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bitkv.nothing


@pytest.mark.parametrize(("name", "function"), [*public_functions()])
def test_public_functions_are_annotated_and_take_no_open_keywords(name, function):
    signature = inspect.signature(function)
    for parameter in signature.parameters.values():
        assert parameter.kind is not inspect.Parameter.VAR_KEYWORD
        assert parameter.name == "self" or parameter.annotation is not inspect.Parameter.empty
    assert signature.return_annotation is not inspect.Signature.empty


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_file_is_longer_than_400_lines_and_no_function_than_60(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_no_source_or_document_names_a_machine_or_leaves_work_undone():
    trace = re.compile(r"/(?:work|root|home)/\w|TO[D]O|FIX[M]E|raise NotImplemented[E]rror")
    folders = ("bitkv", "tests", "training", "benchmarks", "docs")
    texts = [p for folder in folders for p in (ROOT / folder).rglob("*") if "assets" not in p.parts]
    for path in [*texts, *ROOT.glob("*")]:
        if path.suffix in {".py", ".md", ".toml", ".json", ".cpp", ".h"} or path.name == "Makefile":
            found = trace.search(path.read_text(encoding="utf-8"))
            assert not found, f"{path} says {found.group()}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_memory_that_nobody_wrote_reads_as_nan_or_as_no_valid_index_in_these_tests(dtype):
    model = torch.zeros(2, dtype=dtype)
    for x in (torch.empty(3, dtype=dtype), torch.empty_like(model), model.new_empty(4)):
        assert x.isnan().all()
    assert (torch.empty(3, dtype=torch.uint8) == 0xFF).all()
    assert (torch.empty(3, dtype=torch.int32) < -(2**30)).all()
