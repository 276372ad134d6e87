"""The shape of the code, checked: who may import whom, and what is done in one place only.

A new module needs a place in LAYERS. If its imports do not fit there, the module is in the wrong place more often than
the table is wrong.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Folder in the repository -> package it is installed as.
PACKAGES = {
    "qcompiler": "qcompiler",
    "passes": "qcompiler.passes",
    "kernels/python": "qcompiler.kernels",
    "kernels/triton": "qcompiler.kernels.triton",
}
OTHER_FOLDERS = ("benchmarks", "examples", "tests", "tools")
MAX_FILE, MAX_TEST_FILE, MAX_FUNCTION = 400, 700, 60  # lines; a test file mirrors one module and lists its cases

# Layer: (its modules, the layers it may import). Modules of one layer may import one another only where "itself" is
# listed. Modules are named without the leading "qcompiler."; * matches anything. Imports for type annotations alone
# do not count.
LAYERS: dict[str, tuple[str, str]] = {
    "__main__": ("__main__", "cli"),
    "cli": (
        "cli cli_*",
        "itself public driver reproducing planning measuring caching pipeline report passes config targets scheme "
        "numerics errors",
    ),
    "reproducing": ("reproducing", "driver files config errors"),
    "public": ("__init__", "driver config scheme"),
    "driver": (
        "driver",
        "measuring pipeline pass_manager histograms instruments verify report feeding files segments calibration "
        "session runtime caching checkpoints scratch targets graph config scheme records passes.base errors",
    ),
    "planning": (
        "planning",
        "report pipeline passes instruments feeding files session graph targets config scheme records passes.base "
        "errors",
    ),
    "measuring": (
        "measuring",
        "propagation bench verify pipeline feeding files calibration session config passes.base errors",
    ),
    "propagation": (
        "propagation propagation_*",
        "itself observing readings segments calibration session targets graph numerics errors",
    ),
    "pipeline": ("pipeline", "passes passes.base kernels.library config scheme errors"),
    "pass_manager": ("pass_manager", "instruments passes.base config records errors"),
    "verify": (
        "verify verify_*",
        "itself instruments files segments calibration session runtime graph targets kernels.schemas config records "
        "numerics errors",
    ),
    "instruments": ("instruments", "legality files passes.base graph config records errors"),
    "histograms": ("histograms", "observing collectors session graph records passes.base"),
    "caching": ("caching", "checkpoints errors"),
    "float_types": ("float_types", "graph kernels.schemas numerics errors"),
    "legality": ("legality", "passes.base graph kernels.schemas errors"),
    "report": ("report report_*", "itself targets config records numerics errors"),
    "bench": ("bench", "calibration session errors"),
    "passes": ("passes", "passes.base errors"),
    "passes.*": (
        "passes.*",
        "passes.base_segments passes.base rescaling adapters branches lowering opset_rules float_types rotation "
        "foldings convolution layers placement absorbing ranges mixing sensitivity "
        "observing collectors guidance blocks streaming waypoints checkpoints session scratch tuning torch_graph "
        "statistics segments graph targets config scheme records kernels.schemas extras numerics errors",
    ),
    "mixing": (
        "mixing mixing_*",
        "itself passes.base shared_tables guidance rotation foldings lowering sensitivity trials segments statistics "
        "session scratch targets graph config scheme numerics errors",
    ),
    "trials": ("trials", "statistics numerics errors"),
    "sensitivity": ("sensitivity", "verify segments calibration session errors"),
    "rescaling": ("rescaling", "passes.base observing foldings graph records errors"),
    "passes.base_segments": (
        "passes.base_segments",
        "passes.base norm_prior shared_tables streaming checkpoints statistics segments graph records numerics errors",
    ),
    "passes.base": (
        "passes.base",
        "observing shared_tables streaming checkpoints session segments statistics targets graph config scheme records "
        "options numerics errors",
    ),
    "options": ("options", "errors"),
    "norm_prior": ("norm_prior", "rotation foldings statistics graph"),
    "shared_tables": ("shared_tables", "streaming segments statistics session graph errors"),
    "guidance": (
        "guidance",
        "blocks streaming waypoints checkpoints tuning torch_graph segments calibration session scratch graph errors",
    ),
    "blocks": ("blocks", "readings waypoints segments calibration session scratch graph numerics errors"),
    "tuning": (
        "tuning tuning.*",
        "itself torch_graph checkpoints segments statistics calibration session scratch graph scheme records numerics "
        "errors",
    ),
    "adapters": ("adapters", "branches layers lowering graph numerics errors"),
    "branches": ("branches", "lowering graph errors"),
    "opset_rules": ("opset_rules", "lowering graph errors"),
    "lowering": ("lowering lowering_*", "itself graph targets scheme numerics errors"),
    "torch_graph": ("torch_graph torch_graph.*", "itself graph numerics errors"),
    "rotation": ("rotation rotation.*", "itself foldings graph numerics errors"),
    "foldings": ("foldings foldings.*", "itself lowering graph numerics errors"),
    "collectors": ("collectors", "numerics errors"),
    "ranges": ("ranges", "observing collectors calibration session graph numerics errors"),
    "placement": ("placement", "absorbing targets graph scheme numerics errors"),
    "absorbing": ("absorbing", "graph errors"),
    "observing": ("observing", "readings segments calibration session graph numerics errors"),
    "convolution": ("convolution", "errors"),
    "layers": ("layers", "lowering graph numerics errors"),
    "streaming": (
        "streaming",
        "readings waypoints checkpoints segments statistics calibration session scratch graph errors",
    ),
    "readings": ("readings", "convolution segments statistics session graph numerics errors"),
    "waypoints": ("waypoints", "checkpoints segments session graph errors"),
    "checkpoints": ("checkpoints", "errors"),
    "segments": ("segments", "graph session errors"),
    "feeding": ("feeding", "synthetic calibration files session graph config errors"),
    "synthetic": ("synthetic synthetic.*", "itself zeroq segments calibration session graph extras errors"),
    "zeroq": ("synthetic.zeroq", "torch_graph graph errors"),
    "statistics": ("statistics", "calibration session scratch graph numerics errors"),
    "calibration": ("calibration calibration_*", "itself session scratch graph numerics errors"),
    "files": ("files files.*", "itself graph numerics errors"),
    "session": ("session", "runtime kernels.library kernels.schemas errors"),
    "runtime": ("runtime", "errors"),
    "scratch": ("scratch", "errors"),
    "targets": ("targets", "graph config scheme numerics errors"),
    "graph": ("graph sites quantized", "itself kernels.schemas numerics errors"),
    "config": ("config", "scheme numerics errors"),
    "scheme": ("scheme scheme_plan", "itself numerics errors"),
    "records": ("records", "numerics errors"),
    "kernels.build": ("kernels.build kernels.headers", "itself kernels.triton kernels.library errors"),
    "kernels.triton": ("kernels.triton kernels.triton.*", "itself errors"),
    "kernels.library": ("kernels.library", "runtime errors"),
    "kernels.reference": ("kernels.reference", "kernels.schemas numerics errors"),
    "kernels": ("kernels", "kernels.library runtime"),
    "kernels.schemas": ("kernels.schemas", "numerics errors"),
    "numerics": ("numerics numerics.*", "itself errors"),
    "extras": ("extras", "errors"),
    "errors": ("errors", ""),
}
HEAVY = {"onnxruntime", "tokenizers", "torch", "transformers"}
# Layers made of torch: they import it as they are imported, so others import them as they would import torch.
TORCH_LAYERS = {"torch_graph", "tuning", "zeroq"}
FILE_MODULES = {"io", "os", "pathlib", "shutil", "subprocess", "tempfile"}
FILE_CALLS = {
    "open",
    "read_bytes",
    "read_text",
    "write_bytes",
    "write_text",
    "load",
    "save",
    "memmap",
    "fromfile",
    "tofile",
}
ROUNDING = {"around", "clip", "fix", "packbits", "rint", "round", "trunc", "unpackbits"}
EXITS = {"_exit", "abort", "exit", "quit"}
Violations = Iterator[tuple[int, str]]


@dataclass(frozen=True)
class Import:
    """One imported module or name."""

    line: int
    module: str
    in_function: bool
    for_types: bool


@dataclass(frozen=True)
class Source:
    """A Python file; `module` is its name without the leading "qcompiler.", empty outside the package."""

    path: str
    module: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @cached_property
    def imports(self) -> list[Import]:
        return list(_imports(self.tree, in_function=False, for_types=False))

    @property
    def is_pass(self) -> bool:
        return layer_of(self.module) == "passes.*"


def _imports(node: ast.AST, *, in_function: bool, for_types: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(node.lineno, name.name, in_function, for_types) for name in node.names)
    elif isinstance(node, ast.ImportFrom):
        for name in node.names:
            is_module = f"{node.module}.{name.name}" in MODULES
            yield Import(
                node.lineno, f"{node.module}.{name.name}" if is_module else node.module or ".", in_function, for_types
            )
    in_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for_types |= isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, in_function=in_function, for_types=for_types)


def _module_of(path: Path) -> str:
    """The full name of the module that a file is installed as; empty outside the package."""
    for folder, package in PACKAGES.items():
        if (ROOT / folder) in path.parents:
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return ""


def _short(module: str) -> str:
    return "__init__" if module == "qcompiler" else module.removeprefix("qcompiler.")


def layer_of(module: str) -> str | None:
    """The layer of a module named without "qcompiler."; a name in the table beats a pattern."""
    if not module:
        return None
    matches = [
        ("*" in pattern, layer)
        for layer, (patterns, _) in LAYERS.items()
        for pattern in patterns.split()
        if fnmatchcase(module, pattern)
    ]
    return min(matches)[1] if matches else None


def _read(path: Path) -> Source:
    return Source(path.relative_to(ROOT).as_posix(), _short(_module_of(path)), path.read_text("utf-8"))


PACKAGE_FILES = sorted(path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py"))
OTHER_FILES = sorted(path for folder in OTHER_FOLDERS for path in (ROOT / folder).rglob("*.py"))
MODULES = {_module_of(path) for path in PACKAGE_FILES}
SOURCES = [_read(path) for path in (*PACKAGE_FILES, *OTHER_FILES)]


# The rules: each yields (line, what is wrong).


def imports_point_downwards(source: Source) -> Violations:
    if not source.module:
        return
    layer = layer_of(source.module)
    if layer is None:
        yield 1, f"module {source.module} has no layer; add it to LAYERS in tests/test_architecture.py"
        return
    allowed = LAYERS[layer][1].split()
    for imported in source.imports:
        if imported.for_types or imported.module.split(".")[0] != "qcompiler":
            continue
        target = layer_of(_short(imported.module))
        same = target == layer and "itself" in allowed
        if target not in allowed and not same and _short(imported.module) != source.module:
            yield (
                imported.line,
                f"layer {layer} may not import {imported.module} (layer {target}), only {', '.join(allowed)}",
            )


def passes_stand_alone(source: Source) -> Violations:
    if not source.is_pass:
        return
    for imported in source.imports:
        if layer_of(_short(imported.module)) in ("passes", "passes.*") and imported.module.startswith("qcompiler."):
            yield imported.line, f"a pass imports no other pass, but here is {imported.module}"
        if imported.module.split(".")[0] in FILE_MODULES:
            yield imported.line, f"a pass touches no file, but here is the module {imported.module}"
    for call, name, owner in _calls(source):
        if name in FILE_CALLS and (
            owner is None or owner in ("np", "numpy", "onnx", "ir") or name.endswith(("text", "bytes"))
        ):
            yield call.lineno, f"a pass touches no file, but here is {name}()"


def heavy_imports_are_local(source: Source) -> Violations:
    if not source.module:
        return
    with_torch = layer_of(source.module) in TORCH_LAYERS
    for imported in source.imports:
        package = imported.module.split(".")[0]
        brings_torch = package == "torch" or (
            package == "qcompiler" and layer_of(_short(imported.module)) in TORCH_LAYERS
        )
        heavy = not with_torch if brings_torch else package in HEAVY
        if heavy and not imported.in_function and not imported.for_types:
            yield imported.line, f"import {imported.module} inside the function that needs it"


def onnxruntime_is_imported_in_one_place(source: Source) -> Violations:
    if source.module in ("", "runtime"):
        return
    for imported in source.imports:
        if imported.module.split(".")[0] == "onnxruntime" and not imported.for_types:
            yield imported.line, "use runtime.require_onnxruntime(), which explains a broken installation"


def only_the_command_line_prints_and_exits(source: Source) -> Violations:
    # `python -m qcompiler.kernels.build` is a command too.
    if not source.module or layer_of(source.module) in ("cli", "kernels.build"):
        return
    for call, name, owner in _calls(source):
        if name in ("print", "input") and owner in (None, "builtins"):
            yield call.lineno, f"only cli.py talks to the user, but here is {name}(); use logging"
        if name in EXITS and owner in (None, "os", "sys"):
            yield call.lineno, f"only cli.py ends the process, but here is {name}(); raise a QCompilerError"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Raise) and node.exc is not None and "SystemExit" in ast.unparse(node.exc):
            yield node.lineno, "only cli.py ends the process, but here is SystemExit; raise a QCompilerError"


def rounding_is_in_numerics(source: Source) -> Violations:
    # The operators of torch_graph round as the standard says, which is no decision of ours; tuning rounds tensors of
    # PyTorch, half to even as numerics does.
    if not source.module or layer_of(source.module) in ("numerics", "kernels.reference", *TORCH_LAYERS):
        return
    for call, name, owner in _calls(source):
        if name in ROUNDING and owner is not None and owner != "math":
            yield (
                call.lineno,
                f"rounding, clipping and packing are qcompiler.numerics' affair, but here is {owner}.{name}()",
            )


def files_and_functions_are_short(source: Source) -> Violations:
    lines = source.text.count("\n")
    most = MAX_TEST_FILE if source.path.startswith("tests/") else MAX_FILE
    if lines > most:
        yield lines, f"{lines} lines; a file has {most} at most, split it by meaning"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION:
                yield node.lineno, f"{node.name}() has {length} lines; a function has {MAX_FUNCTION} at most"


def nothing_is_left_to_do(source: Source) -> Violations:
    for number, line in enumerate(source.text.splitlines(), 1):
        if re.search(r"\b(TO" + r"DO|FIX" + r"ME|X" + r"XX)\b", line):
            yield number, "do it now, or open an issue"


def _calls(source: Source) -> Iterator[tuple[ast.Call, str, str | None]]:
    """Every call with the name called and the text before its dot, None for a bare name."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                yield node, node.func.id, None
            elif isinstance(node.func, ast.Attribute):
                yield node, node.func.attr, ast.unparse(node.func.value)


RULES = [
    imports_point_downwards,
    passes_stand_alone,
    heavy_imports_are_local,
    onnxruntime_is_imported_in_one_place,
    only_the_command_line_prints_and_exits,
    rounding_is_in_numerics,
    files_and_functions_are_short,
    nothing_is_left_to_do,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule):
    found = [f"{source.path}:{line}: {text}" for source in SOURCES for line, text in sorted(set(rule(source)))]
    if found:
        pytest.fail("\n".join([f"rule {rule.__name__} does not hold:", *found]), pytrace=False)


def test_arrows_point_one_way():
    unknown = {name for _, allowed in LAYERS.values() for name in allowed.split()} - {*LAYERS, "itself"}
    assert not unknown
    arrows = {layer: {name for name in allowed.split() if name != "itself"} for layer, (_, allowed) in LAYERS.items()}
    tuple(TopologicalSorter(arrows).static_order())  # raises CycleError


BAD = [
    (imports_point_downwards, "graph", "import qcompiler.driver"),
    (imports_point_downwards, "graph", "from qcompiler import passes"),
    (imports_point_downwards, "numerics.affine", "def f():\n    from qcompiler.graph import Site"),
    (imports_point_downwards, "in_no_layer", ""),
    (passes_stand_alone, "passes.mine", "from qcompiler.passes.rtn import Rtn"),
    (passes_stand_alone, "passes.mine", "from qcompiler.passes import load"),
    (passes_stand_alone, "passes.mine", "from pathlib import Path"),
    (passes_stand_alone, "passes.mine", "x = open('file')"),
    (passes_stand_alone, "passes.mine", "x = np.load('file')"),
    (passes_stand_alone, "passes.mine", "x = path.read_text()"),
    (heavy_imports_are_local, "passes.mine", "import torch.nn"),
    (heavy_imports_are_local, "passes.mine", "from qcompiler.torch_graph import TorchGraph"),
    (heavy_imports_are_local, "passes.mine", "import qcompiler.torch_graph.registry"),
    (heavy_imports_are_local, "streaming", "from qcompiler.tuning import rounding"),
    (heavy_imports_are_local, "torch_graph.mine", "import transformers"),
    (heavy_imports_are_local, "tuning.mine", "import onnxruntime"),
    (onnxruntime_is_imported_in_one_place, "session", "def f():\n    import onnxruntime"),
    (only_the_command_line_prints_and_exits, "driver", "print(1)"),
    (only_the_command_line_prints_and_exits, "driver", "sys.exit(1)"),
    (only_the_command_line_prints_and_exits, "driver", "raise SystemExit(1)"),
    (rounding_is_in_numerics, "graph", "np.rint(x)"),
    (rounding_is_in_numerics, "passes.mine", "codes.clip(0, 15)"),
    (files_and_functions_are_short, "graph", "\n" * (MAX_FILE + 1)),
    (files_and_functions_are_short, "graph", "def f():\n" + "    x = 1\n" * MAX_FUNCTION),
    (nothing_is_left_to_do, "graph", "# TO" + "DO"),
]
GOOD = [
    (imports_point_downwards, "passes.mine", "import qcompiler.graph\nfrom qcompiler.passes.base import QuantPass"),
    (imports_point_downwards, "graph", "if TYPE_CHECKING:\n    from qcompiler.driver import compile_model"),
    (passes_stand_alone, "passes.mine", "from qcompiler.passes.base import QuantPass\nx = table.load()"),
    (heavy_imports_are_local, "passes.mine", "def f():\n    import torch"),
    (heavy_imports_are_local, "passes.mine", "def f():\n    from qcompiler.torch_graph import TorchGraph"),
    (heavy_imports_are_local, "torch_graph.mine", "import torch\nfrom torch.nn import functional"),
    (heavy_imports_are_local, "tuning.mine", "import torch\nfrom qcompiler.torch_graph import TorchGraph"),
    (only_the_command_line_prints_and_exits, "cli", "print(1)"),
    (rounding_is_in_numerics, "numerics.affine", "np.rint(x)"),
    (rounding_is_in_numerics, "report", "round(seconds, 1)"),
    (rounding_is_in_numerics, "torch_graph.mine", "torch.round(x)"),
]


@pytest.mark.parametrize(("rule", "module", "text"), BAD)
def test_rule_notices(rule, module, text):
    assert list(rule(Source("somewhere.py", module, text)))


@pytest.mark.parametrize(("rule", "module", "text"), GOOD)
def test_rule_lets_pass(rule, module, text):
    assert not list(rule(Source("somewhere.py", module, text)))
