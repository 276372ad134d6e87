"""Virtual environments for peers, made once under the cache folder, and a way to run and weigh a command."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.zoo.cache import root

__all__ = ["Cost", "environment", "report_line", "run"]

# torch by its exact version: its CPU build, where one is at hand, has no other name.
ENVIRONMENTS: Mapping[str, tuple[Sequence[str], ...]] = {
    "llmcompressor": (("torch==2.13.0",), ("llmcompressor==0.14.*",)),
    "auto-round": (("torch==2.13.0",), ("auto-round==0.16.1", "transformers==5.17.*")),
}


@dataclass(frozen=True)
class Cost:
    """What a command took.

    Attributes:
        seconds: Wall-clock time, from the start of the interpreter to its end.
        peak_mb: Peak anonymous resident memory in MB.
    """

    seconds: float
    peak_mb: float


def environment(name: str) -> Path:
    """The Python of a peer's environment, which is made if it is not there."""
    folder = root() / "environments" / name
    python = folder / "bin" / "python"
    done = folder / "complete"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        for packages in ENVIRONMENTS[name]:
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        done.touch()
    return python


def run(command: Sequence[str | Path], log: Path) -> Cost:
    """Run a command to its end, sampling its memory every 20 ms; CalledProcessError with the log's end on failure."""
    start = time.perf_counter()
    peak = 0
    with log.open("wb") as output:
        process = subprocess.Popen([str(part) for part in command], stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, _anonymous(process.pid))
            time.sleep(0.02)
    if process.returncode:
        tail = log.read_text(errors="replace")[-2000:]
        raise subprocess.CalledProcessError(process.returncode, [str(part) for part in command], tail)
    return Cost(time.perf_counter() - start, peak / 1e6)


def _anonymous(pid: int) -> int:
    """Anonymous resident bytes of a process."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")), 0)


def report_line(tool: str, scheme: str, cost: Cost, figures: Mapping[str, float]) -> str:
    """One line of JSON."""
    return json.dumps({"tool": tool, "scheme": scheme, **asdict(cost), **figures})
