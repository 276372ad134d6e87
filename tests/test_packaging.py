"""The package as its users get it: the wheel, installed in a new environment and used from another folder."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path

import pytest

import qcompiler
from tests.conftest import REAL_MODULES

ROOT = Path(__file__).parent.parent
# Folder in the repository -> where the wheel has it.
FOLDERS = {
    "qcompiler": "qcompiler",
    "passes": "qcompiler/passes",
    "kernels/python": "qcompiler/kernels",
    "kernels/triton": "qcompiler/kernels/triton",
}
SITE_PACKAGES = sorted({path for path in sys.path if path.endswith(("site-packages", "dist-packages"))})


def run(*command, cwd, check=True):
    """Run without this process's PYTHONPATH; returns what it printed."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    if check and done.returncode:
        pytest.fail(
            f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}{done.stderr}", pytrace=False
        )
    return done.stdout


def new_environment(folder):
    """A virtual environment without pip that sees this one's dependencies (but no editable installs); its Python."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "dependencies.pth").write_text("\n".join(SITE_PACKAGES))
    return python


def install(python, *what, cwd):
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", *what, cwd=cwd)


def tree_files():
    """Every Python file of the package, as the wheel should name it."""
    return {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    output = run(sys.executable, ROOT / "tools/build_wheel.py", tmp_path_factory.mktemp("wheel"), cwd=ROOT)
    return Path(output.split()[-1])


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The Python of a new environment that has the wheel."""
    folder = tmp_path_factory.mktemp("installed")
    python = new_environment(folder / "venv")
    install(python, wheel, cwd=folder)
    return python


def test_package_list_is_the_tree():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    listed = ast.literal_eval(re.search(r"^packages = (\[.*?\])", text, re.DOTALL | re.MULTILINE)[1])
    found = {Path(name).parent.as_posix().replace("/", ".") for name in tree_files()}
    assert sorted(listed) == sorted(found)


def test_every_folder_of_the_package_has_an_init():
    files = tree_files()
    assert {f"{Path(name).parent.as_posix()}/__init__.py" for name in files} <= files
    assert not (ROOT / "kernels/__init__.py").exists(), "a package called kernels would shadow other projects' own"


def test_wheel_holds_the_tree_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {"qcompiler"}
    assert {name for name in names if name.endswith(".py")} == tree_files()
    assert "qcompiler/py.typed" in names


def test_wheel_carries_the_operators_where_they_have_been_built(wheel):
    library = "qcompiler/kernels/lib/libqcompiler_ops.so"
    built = (ROOT / "kernels/python/lib/libqcompiler_ops.so").is_file()
    assert (library in zipfile.ZipFile(wheel).namelist()) == built
    assert wheel.name.endswith("-any.whl") != built


def test_wheel_metadata(wheel):
    (info,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA"))
    metadata = importlib.metadata.PathDistribution(zipfile.Path(wheel, info.removesuffix("METADATA"))).metadata
    assert (metadata["Name"], metadata["Version"]) == ("onnx-qcompiler", qcompiler.__version__)
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.10"
    assert {"cpu", "gpu", "torch", "text", "report", "dev"} <= set(metadata.get_all("Provides-Extra"))
    required = [entry.replace("'", '"') for entry in metadata.get_all("Requires-Dist")]
    core = {re.match(r"[\w.-]+", entry)[0] for entry in required if "extra ==" not in entry}
    assert not core & {"onnxruntime", "onnxruntime-gpu", "torch", "transformers", "tokenizers"}
    for extra, runtimes in (("cpu", {"onnxruntime"}), ("gpu", {"onnxruntime-gpu"})):
        assert {re.match(r"[\w.-]+", entry)[0] for entry in required if f'extra == "{extra}"' in entry} == runtimes


def test_tests_on_real_models_know_all_that_they_need():
    """What the extra holds and a test does not look for would fail it in the place of skipping it."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    extra = re.search(r"^real = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)[1]
    assert set(re.findall(r'^ +"([\w-]+)', extra, re.MULTILINE)) == set(REAL_MODULES)


def test_dependencies_are_what_is_imported():
    """Every library that is imported is declared, and the core declares no library that is not imported."""
    distributions = {"google": "protobuf", "onnx_ir": "onnx-ir", "yaml": "pyyaml"}
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    core = set(re.findall(r'"([\w-]+)>=', re.search(r"^dependencies = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)[1]))
    lists = re.findall(r"^(?:cpu|gpu|text|report|torch|triton) = \[(.*)\]", text, re.MULTILINE)
    extras = {name for names in lists for name in re.findall(r'"([\w-]+)', names)}
    imported = set()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                imported |= {name.split(".")[0] for name in names}
    libraries = imported - set(sys.stdlib_module_names) - {"qcompiler"}
    declared = {distributions.get(name, name) for name in libraries}
    assert declared <= core | extras
    assert core <= declared


def test_installed_wheel_is_used_from_another_folder(installed, tmp_path):
    code = """
import importlib.util, qcompiler, qcompiler.kernels
from qcompiler.passes import load, names
[load(name) for name in names()]
print(qcompiler.__file__, *(importlib.util.find_spec(name) is None for name in ("passes", "kernels")))
"""
    file, *absent = run(installed, "-c", code, cwd=tmp_path).split()
    assert installed.parent.parent in Path(file).parents
    assert absent == ["True", "True"]


@pytest.mark.parametrize("command", [["qcompile"], ["qcompiler"], ["python", "-m", "qcompiler"]], ids=" ".join)
def test_installed_commands_start(installed, tmp_path, command):
    program = [installed.parent / command[0], *command[1:]]
    assert qcompiler.__version__ in run(*program, "--version", cwd=tmp_path)
    assert "Usage:" in run(*program, "--help", cwd=tmp_path)


def test_core_works_without_the_extras(installed, tmp_path):
    code = """
import sys
for name in ("onnxruntime", "torch", "transformers", "tokenizers", "jinja2", "matplotlib"):
    sys.modules[name] = None  # importing it raises ImportError
import qcompiler, qcompiler.cli, qcompiler.driver
from qcompiler.passes import load, names
[load(name) for name in names()]
qcompiler.CompileConfig(), qcompiler.Scheme, qcompiler.compile_model
"""
    run(installed, "-c", code, cwd=tmp_path)


def test_import_is_light(installed, tmp_path):
    heavy = {"click", "google", "ml_dtypes", "numpy", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "rich", "torch"}
    loaded = run(installed, "-c", "import sys, qcompiler; print(*sys.modules)", cwd=tmp_path).split()
    assert not set(loaded) & heavy

    def seconds(code):
        start = time.perf_counter()
        run(installed, "-c", code, cwd=tmp_path)
        return time.perf_counter() - start

    empty = package = float("inf")
    for _ in range(30):  # the shortest times approach the true ones, on a busy machine slowly
        empty, package = min(empty, seconds("pass")), min(package, seconds("import qcompiler"))
        if package < 1.5 * empty:
            return
    pytest.fail(f"importing qcompiler takes {package:.3f} s, Python alone {empty:.3f} s")


def test_editable_install_sees_new_files(tmp_path):
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    python = new_environment(tmp_path / "venv")
    install(python, "--no-build-isolation", "--editable", tmp_path, cwd=tmp_path)
    new = {"passes/brand_new.py": "passes.brand_new", "kernels/python/brand_new.py": "kernels.brand_new"}
    for path in new:
        (tmp_path / path).write_text("ANSWER = 42\n")
    away = tmp_path / "away"
    away.mkdir()
    for module in new.values():
        assert run(python, "-c", f"import qcompiler.{module} as new; print(new.ANSWER)", cwd=away).strip() == "42"
