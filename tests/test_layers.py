"""One rank per module; imports point down; nothing heavy is imported before it is needed.

The sources are parsed, not imported, so that an import inside a function or under TYPE_CHECKING counts like any other.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = ("surgery", "exporters")

# A module may import modules of a lower rank only. Packages stand under their own names.
RANKS = {
    "surgery.errors": 0,
    "surgery.terminal": 0,
    "surgery.backends": 0,  # what a backend is, as a record
    "exporters": 0,  # a docstring: it makes the folder a package
    "surgery.arrow": 1,
    "surgery.tensorfile": 1,
    "surgery.columns": 1,
    "surgery.combinations": 2,
    "surgery.compat": 1,
    "surgery.lookup": 1,
    "surgery.paca_layers": 1,
    "surgery.paca_conv": 2,
    "surgery.paca_attention": 2,
    "surgery.paca_embedding": 2,
    "surgery.paca_kinds": 3,
    "surgery.embedding_rows": 3,
    "surgery.side": 0,  # a docstring, as exporters
    "surgery.side.settings": 0,
    "surgery.side.steps": 0,
    "surgery.side.memory": 0,
    "surgery.side.padding": 0,
    "surgery.side.recurrence": 1,
    "surgery.side.network": 2,
    "surgery.side.source": 3,
    "surgery.quantized": 1,
    "surgery.paca_quantized": 2,
    "surgery.ranks": 1,
    "surgery.lean_functions": 1,
    "surgery.lean_kernels": 2,
    "surgery.lean_blocks": 3,
    "surgery.lean_head": 4,
    "surgery.lean_pass": 5,
    "surgery.paca_experts": 2,
    "surgery.experts": 3,
    "surgery.zero": 2,
    "surgery.resampling": 2,
    "surgery.expert_scores": 3,
    "surgery.calibration": 4,
    "surgery.sharding": 3,
    "surgery.metrics": 1,
    "surgery.rows": 1,
    "surgery.checkpoint": 2,
    "surgery.select": 2,
    "surgery.sites": 3,
    "surgery.plan": 2,
    "surgery.examples": 2,
    "surgery.glue": 3,
    "surgery.oasst": 3,
    "surgery.questions": 3,
    "surgery.formats": 4,
    "surgery.writing": 3,
    "surgery.survey": 3,
    "surgery.quantized_base": 3,
    "surgery.delta": 3,
    "surgery.manifest": 3,
    "surgery.tokens": 3,
    "surgery.table": 3,
    "surgery.methods": 3,  # what a method is, as a record
    "surgery.stacks": 4,
    "surgery.methods.paca_spec": 3,
    "surgery.methods.paca_plan": 4,
    "surgery.methods.paca_files": 5,
    "surgery.methods.paca": 6,
    "surgery.methods.read": 5,
    "surgery.features": 5,
    "surgery.data_spec": 1,
    "surgery.data_report": 1,
    "surgery.data_tokens": 4,
    "surgery.data": 5,
    "surgery.adapter": 5,
    "surgery.planning": 5,
    "surgery.choosing": 6,
    "surgery.operate": 7,
    "surgery.union": 6,
    "surgery.peft_files": 3,
    "surgery.peft_paca": 7,
    "surgery.runs": 6,
    "surgery.recipe": 7,
    "surgery.strict_yaml": 0,
    "surgery.recipe_keys": 8,
    "surgery.recipe_variants": 9,
    "surgery.recipe_file": 10,
    "surgery.compare": 7,
    "surgery.verify_quantized": 7,
    "surgery.doctor": 9,
    "surgery.inspection": 7,
    "surgery.acceleration": 8,
    "surgery.backends.gaudi": 8,
    "surgery.backends.local": 9,
    "surgery.trainer": 7,
    "surgery.training": 0,  # a docstring, as exporters
    "surgery.training.checks": 8,
    "surgery.training.evaluation": 8,
    "surgery.training.resuming": 8,
    "surgery.training.task": 8,
    "surgery.training.job": 9,
    "surgery.training.model": 9,
    "surgery.train": 10,
    "surgery.exported": 8,
    "surgery.verify_bytes": 8,
    "surgery.verify_logits": 9,
    "surgery.verify": 10,
    "surgery.generate": 9,
    "surgery.onnx_runtime": 10,
    "surgery.cuda_kernels": 1,
    "surgery.repeated": 1,
    "surgery.memory": 0,  # a docstring, as exporters
    "surgery.memory.live": 0,
    "surgery.memory.dry": 4,
    "surgery.memory.lora": 4,
    "surgery.memory.watch": 5,
    "surgery.memory.step": 6,
    "surgery.memory.saved": 7,
    "surgery.memory.run": 9,
    "surgery.memory.longest": 0,
    "surgery.memory.subject": 10,
    "surgery.memory.prediction": 10,
    "surgery.memory.predict": 11,
    "surgery.forecast": 12,
    "surgery.bench": 0,  # a docstring, as exporters
    "surgery.bench.results": 4,
    "surgery.bench.energy": 1,
    "surgery.bench.held": 7,
    "surgery.bench.methods": 8,
    "surgery.bench.spec": 9,
    "surgery.bench.subject": 10,
    "surgery.bench.sizes": 11,
    "surgery.bench.measure": 11,
    "surgery.bench.scores": 12,
    "surgery.bench.peak": 12,
    "surgery.bench.longest": 12,
    "surgery.bench.show": 5,
    "surgery.bench.run": 13,
    "surgery.cli_options": 2,
    "surgery.cli_apply": 14,
    "surgery.cli_export": 14,
    "surgery.cli_train": 14,
    "surgery.cli_bench": 14,
    "surgery.evals": 0,  # a docstring, as exporters
    "surgery.evals.scorer": 2,
    "surgery.evals.scores": 2,
    "surgery.evals.task": 5,
    "surgery.evals.mmlu": 6,
    "surgery.evals.gsm8k": 6,
    "surgery.evals.glue": 6,
    "surgery.evals.torch_scorer": 11,
    "surgery.evals.onnx_scorer": 11,
    "surgery.evals.harness": 12,
    "surgery.evals.run": 13,
    "surgery.cli_eval": 14,
    "surgery.cli_generate": 12,
    "surgery.cli_import": 13,
    "surgery.cli_plan": 13,
    "surgery.cli_recipes": 12,
    "surgery.library": 10,
    "surgery.tiny": 4,
    "surgery.images": 3,
    "surgery.report": 0,  # a docstring, as exporters
    "surgery.report.curves": 1,
    "surgery.report.parts": 4,
    "surgery.report.movement": 4,
    "surgery.report.charts": 5,
    "surgery.report.drawing": 6,
    "surgery.report.reading": 7,
    "surgery.report.commands": 8,
    "surgery.report.bench_sections": 6,
    "surgery.report.run_sections": 9,
    "surgery.report.predicted": 13,
    "surgery.report.page": 14,
    "surgery.report.curve": 10,
    "surgery.trackers": 8,
    "surgery.cli_report": 15,
    "exporters.dense": 9,
    "exporters.undo": 10,
    "exporters.lora": 10,
    "exporters.peft_paca": 11,
    "exporters.remote_code": 10,
    "exporters.onnx_file": 3,
    "exporters.onnx_patch": 10,
    "exporters.onnx_graph": 5,
    "exporters.onnx_side": 3,
    "exporters.onnx_weights": 6,
    "exporters.onnx_check": 6,
    "exporters.onnx_folder": 10,
    "exporters.onnx_export": 11,
    "surgery.workflow": 12,
    "surgery.show": 13,
    "surgery": 13,  # the facade: it names what the modules below offer, and loads them on demand
    "surgery.cli": 16,
}

# On the way of `surgery --help`, and of a path that is not there.
LAZY = (
    "surgery",
    "surgery.checkpoint",
    "surgery.cli",
    "surgery.cli_apply",
    "surgery.cli_bench",
    "surgery.cli_eval",
    "surgery.cli_export",
    "surgery.cli_generate",
    "surgery.cli_import",
    "surgery.cli_options",
    "surgery.cli_plan",
    "surgery.cli_recipes",
    "surgery.cli_report",
    "surgery.cli_train",
    "surgery.errors",
    "surgery.lookup",
    "surgery.ranks",
    "surgery.tensorfile",
    "surgery.terminal",
)
HEAVY = frozenset({"torch", "transformers", "datasets", "accelerate", "sklearn", "scipy", "pandas", "pyarrow", "numpy"})
LOADED = "'loaded:', sorted({'torch', 'transformers'} & set(sys.modules))"  # in a process of its own
EXPORTERS_IMPORTED_BY = frozenset({"surgery.cli"})
VENDOR_NAMED_BY = frozenset({"surgery.backends.gaudi"})
REFERENCE = re.compile(r"(?P<module>(?:surgery|exporters)(?:\.\w+)*):(?P<attribute>[A-Za-z_]\w*)")


def source_files() -> dict[str, Path]:
    """Dotted name -> file, for every module of the two packages."""
    files = {}
    for package in PACKAGES:
        for path in sorted((PROJECT / package).rglob("*.py")):
            parts = path.relative_to(PROJECT).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


FILES = source_files()


def parse(module: str) -> ast.Module:
    """The syntax tree of one of our modules."""
    return ast.parse(FILES[module].read_text(encoding="utf-8"), filename=str(FILES[module]))


def imported(node: ast.stmt, module: str) -> Iterator[str]:
    """The dotted names that one import statement of `module` names: modules where they are ours, else as written."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = module.split(".") if FILES[module].name == "__init__.py" else module.split(".")[:-1]
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [base])])
        for alias in node.names:
            below = f"{base}.{alias.name}"
            yield below if below in FILES else base


def all_imports(module: str) -> list[tuple[int, str]]:
    """(line, dotted name) of every import in a module, wherever it stands."""
    return [
        (node.lineno, name)
        for node in ast.walk(parse(module))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in imported(node, module)
    ]


def module_level_imports(module: str) -> list[tuple[int, str]]:
    """The imports that run when a module is imported: not those in functions, nor under `if TYPE_CHECKING`."""
    found: list[tuple[int, str]] = []
    pending: list[ast.AST] = list(parse(module).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found += [(node.lineno, name) for name in imported(node, module)]
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            pending += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)
    return found


def top_level_names(module: str) -> set[str]:
    """What `module:attribute` can name: functions, classes and assignments at module level, and imported names."""
    names: set[str] = set()
    for node in parse(module).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def test_every_module_has_a_rank() -> None:
    """A module without a rank is a decision not taken; a rank without a module is one left behind."""
    assert sorted(set(FILES) - set(RANKS)) == [], "modules without a rank"
    assert sorted(set(RANKS) - set(FILES)) == [], "ranks without a module"


@pytest.mark.parametrize("module", FILES)
def test_imports_point_down(module: str) -> None:
    """A module imports modules of lower rank only, inside functions as well."""
    rank = RANKS[module]
    upward = [
        f"{FILES[module].relative_to(PROJECT)}:{line}: rank {rank} imports {name}, rank {RANKS.get(name)}"
        for line, name in all_imports(module)
        if name.split(".")[0] in PACKAGES and RANKS.get(name, sys.maxsize) >= rank
    ]
    assert upward == []


@pytest.mark.parametrize("module", FILES)
def test_only_the_command_line_imports_exporters(module: str) -> None:
    """`surgery` works without `exporters`: of its modules the command line alone brings them in."""
    names = [name for _, name in all_imports(module) if name.split(".")[0] == "exporters"]
    assert FILES[module].is_relative_to(PROJECT / "exporters") or module in EXPORTERS_IMPORTED_BY or names == []


@pytest.mark.parametrize("module", FILES)
def test_the_vendor_package_is_named_in_one_place(module: str) -> None:
    """Importing optimum-habana rebinds hundreds of attributes: one module may name it, in code or in text."""
    named = re.findall(r"\boptimum\b(?!-habana)|\bhabana_frameworks\b", FILES[module].read_text(encoding="utf-8"))
    assert module in VENDOR_NAMED_BY or named == []


METHODS = ("surgery.methods", "surgery.paca_layers", "surgery.side")


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("surgery.backends")])
def test_backends_know_nothing_about_methods(module: str) -> None:
    """Nor about what methods put into a model; that methods know nothing about backends, the ranks say."""
    assert [name for _, name in all_imports(module) if name.startswith(METHODS)] == []
    methods = [name for name in FILES if name.startswith(METHODS)]
    assert all(RANKS[name] < RANKS[f"surgery.backends.{kind}"] for name in methods for kind in ("local", "gaudi"))


@pytest.mark.parametrize("module", LAZY)
def test_the_way_to_help_imports_nothing_heavy(module: str) -> None:
    """What `surgery --help` imports names torch, transformers and their like inside functions only."""
    heavy = [f"line {line}: {name}" for line, name in module_level_imports(module) if name.split(".")[0] in HEAVY]
    assert heavy == []


@pytest.mark.parametrize("module", FILES)
def test_every_reference_in_a_table_names_something(module: str) -> None:
    """A string `module:attribute` is an import that no checker follows: the module exists and has the attribute."""
    strings = [node.value for node in ast.walk(parse(module)) if isinstance(node, ast.Constant)]
    matches = [REFERENCE.fullmatch(text) for text in strings if isinstance(text, str)]
    for match in filter(None, matches):
        assert match["module"] in FILES, f"{match[0]} names no module"
        assert match["attribute"] in top_level_names(match["module"]), f"{match[0]} names nothing in its module"


@pytest.mark.parametrize("line", ("apply nope/", "apply ./x", "train /x", "export nope --merge", "verify a/b/c",
                                  "undo nope -o x", "inspect nope"))  # fmt: skip
def test_a_folder_that_is_not_there_is_said_before_anything_heavy_is_loaded(line: str, tmp_path: Path) -> None:
    """Exit code 2, and neither torch nor transformers: whoever mistyped does not wait for them."""
    code = f"from surgery.cli import main; main({line.split()!r})"
    script = f"import atexit, sys\natexit.register(lambda: print({LOADED}, file=sys.stderr))\n{code}\n"
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    error, loaded = done.stderr.splitlines()
    assert (done.returncode, done.stdout, loaded) == (2, "", "loaded: []")
    assert re.match(r"Error: \S+: no (such folder|surgery\.json), expected a ", error), error


@pytest.mark.parametrize(
    "code",
    (
        "import surgery",
        "import surgery.cli",
        "from surgery.cli import main; sys.argv = ['surgery', '--help']; main()",
        "from surgery.cli import main; sys.argv = ['surgery', '--version']; main()",
    ),
)
def test_help_loads_neither_torch_nor_transformers(code: str) -> None:
    """In a fresh interpreter, the package, its command line and its help leave torch and transformers unloaded."""
    script = f"import atexit, sys\natexit.register(lambda: print({LOADED}, file=sys.stderr))\n{code}\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=PROJECT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "loaded: []"
