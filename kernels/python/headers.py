"""The headers of ONNX Runtime's C and C++ interface, which building the operator library takes.

Where none are installed they are fetched: out of Debian's package libonnxruntime-dev, from the mirror that apt already
uses, with a configuration of its own, so that nothing is installed and no list of the system changes.
"""

import shutil
import subprocess
import tempfile
from pathlib import Path

from qcompiler.errors import KernelError

__all__ = ["HEADER", "find_headers"]

HEADER = "onnxruntime_cxx_api.h"
_INSTALLED = ("/usr/include/onnxruntime", "/usr/local/include/onnxruntime", "/usr/include/onnxruntime/core/session")
_PACKAGE = "libonnxruntime-dev"
_SUITE = "trixie"  # the first with the package
_CONFIGURATION = """Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "{work}/parts";
Dir::State "{work}/state";
Dir::State::Lists "{work}/lists";
Dir::State::status "{work}/state/status";
Dir::Cache "{work}/cache";
APT::Sandbox::User "root";
"""


def find_headers(given: Path | None, kept: Path) -> Path:
    """The folder that holds the headers.

    Args:
        given: What the user named, or None.
        kept: Where fetched headers lie, or are put.

    Raises:
        KernelError: There are none, and none can be fetched.
    """
    if given is not None:
        found = next((folder for folder in (given, given / "onnxruntime") if (folder / HEADER).is_file()), None)
        if found is None:
            raise KernelError(f"{given} holds no {HEADER}; name the folder that does")
        return found
    for folder in (*map(Path, _INSTALLED), kept):
        if (folder / HEADER).is_file():
            return folder
    _fetch(kept)
    return kept


def _fetch(folder: Path) -> None:
    """Put the headers of Debian's package into a folder."""
    missing = [program for program in ("apt-get", "dpkg-deb") if shutil.which(program) is None]
    if missing:
        raise KernelError(
            f"no headers of ONNX Runtime are installed, and without {' and '.join(missing)} none can be fetched; name "
            f"a folder that holds {HEADER} with --headers"
        )
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for part in ("parts", "state", "lists/partial", "cache/archives/partial"):
            (work / part).mkdir(parents=True)
        (work / "state/status").touch()
        (work / "parts/headers.sources").write_text(
            f"Types: deb\nURIs: {_mirror()}\nSuites: {_SUITE}\nComponents: main\n"
            "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
        )
        (work / "apt.conf").write_text(_CONFIGURATION.format(work=work))
        _run(["apt-get", "-qq", "-c", "apt.conf", "update"], work)
        _run(["apt-get", "-qq", "-c", "apt.conf", "download", _PACKAGE], work)
        (archive,) = work.glob(f"{_PACKAGE}*.deb")
        _run(["dpkg-deb", "-x", archive.name, "unpacked"], work)
        found = next((work / "unpacked").rglob(HEADER), None)
        if found is None:
            raise KernelError(f"{archive.name} holds no {HEADER}; name a folder that does with --headers")
        folder.mkdir(parents=True, exist_ok=True)
        for header in found.parent.glob("onnxruntime_*.h"):
            shutil.copy(header, folder)


def _mirror() -> str:
    """The address that apt takes Debian's packages from."""
    text = _run(["apt-get", "indextargets", "--format", "$(SITE)", "Created-By: Packages", "Origin: Debian"], Path("/"))
    sites = sorted({line for line in text.splitlines() if line and "security" not in line})
    if not sites:
        raise KernelError("apt knows no mirror of Debian; run apt-get update, or name the headers with --headers DIR")
    return sites[0]


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KernelError(f"fetching the headers of ONNX Runtime: {' '.join(command)}: {done.stderr.strip()[-400:]}")
    return done.stdout
