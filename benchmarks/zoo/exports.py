"""What the modules of exported models share: an export in a process of its own, calibration folders, a command line."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from benchmarks.zoo.cache import ZooError, publish, root

_REPOSITORY = Path(__file__).parent.parent.parent


def exported(module: str, form: str) -> Path:
    """Return the model that a module's `--export FORM FILE` writes, running it if the cache lacks the model.

    It runs in a process of its own: exporters warn about themselves, and leave much behind in memory.

    Args:
        module: full name of the module; its last part is a folder in the cache.
        form: which of its forms; a folder in that.

    Raises:
        ZooError: the export failed.
    """
    folder = root() / module.rpartition(".")[2] / form
    if not folder.exists():
        with publish(folder) as draft:
            draft.mkdir()
            command = [sys.executable, "-m", module, "--export", form, str(draft / "model.onnx")]
            done = subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True)
            if done.returncode:
                raise ZooError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return folder / "model.onnx"


def write_feeds(folder: Path, feeds: Iterable[Mapping[str, np.ndarray]]) -> Path:
    """Write feeds as .npz files of a folder, one a file, unless it is there; return the folder."""
    if not folder.exists():
        with publish(folder) as draft:
            draft.mkdir()
            for index, arrays in enumerate(feeds):
                np.savez(draft / f"{index:03}.npz", **arrays)
    return folder


def command_line(
    description: str | None,
    figures: Mapping[str, Callable[[Path], float]],
    forms: Iterable[str],
    model: Callable[[str], Path],
    export: Callable[[str, Path], None],
) -> None:
    """Export one form, or print one JSON object a line: figures of the models given, or of all forms.

    Args:
        description: printed by --help.
        figures: by name, functions of an .onnx path.
        forms: names of the forms that the float model is exported in.
        model: returns the path of a form.
        export: writes a form to a path.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", nargs="?", choices=figures, help="default: all")
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL.onnx", help="default: the float exports")
    parser.add_argument("--export", nargs=2, metavar=("FORM", "FILE"), help=f"one of: {', '.join(forms)}")
    args = parser.parse_args()
    if args.export:
        form, file = args.export
        export(form, Path(file))
        return
    for path in args.models or [model(form) for form in forms]:
        for name in [args.figure] if args.figure else figures:
            print(json.dumps({"figure": name, "model": str(path), "value": figures[name](path)}), flush=True)
