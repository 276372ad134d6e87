"""Stop a compilation at random moments, start it again each time, and compare its output with an undisturbed one's.

    python -m benchmarks.interruptions MODEL --calibration TEXT --tokenizer FILE --stops 10 [flags of qcompile]

MODEL is compiled once without checkpoints. Then the same command is started with an empty folder of checkpoints and
stopped, by SIGKILL and SIGTERM in turns, each time after a random part of what the undisturbed one took from its first
quantized site on; these parts add up to about all of it. The last start runs to its end. Prints a line for each start;
the exit code is 1 if the bytes of the outputs differ, or if the command came to its end before it was stopped so often.
"""

import argparse
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_LABELS = re.compile(r"Debug: (\w+): ")
_FIRST_SITE = re.compile(r"([\d.]+) s +Debug: \w+: .* quantized to")


def started(
    model: Path, flags: Sequence[str], output: Path, checkpoints: Path | None, log: Path
) -> subprocess.Popen[bytes]:
    """The command, on its way; it logs every site to `log`."""
    command = [sys.executable, "-m", "qcompiler", "compile", str(model), "-o", str(output), "-vv", *flags]
    if checkpoints is not None:
        command += ["--checkpoint", str(checkpoints)]
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file)


def reached(log: Path) -> str:
    """How far a start got: how often each pass has said something."""
    found = _LABELS.findall(log.read_text("utf-8", "replace"))
    return ", ".join(f"{name} {found.count(name)}" for name in dict.fromkeys(found)) or "nothing"


def loading(log: Path) -> float:
    """Seconds until the first site was quantized."""
    found = _FIRST_SITE.search(log.read_text("utf-8", "replace"))
    return float(found[1]) if found else 0.0


def outputs(folder: Path) -> dict[str, bytes]:
    """Name and content of every file but the report, which tells times."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".report.json"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(files)}


def megabytes(folder: Path) -> float:
    """What a folder takes."""
    return sum(path.stat().st_size for path in folder.glob("*")) / 1e6


def line(start: str, seconds: float, folder: Path, log: Path) -> None:
    """Print what became of a start."""
    print(f"{start:<14}{seconds:9.1f}{megabytes(folder):16.1f}   {reached(log)}", flush=True)


def main() -> None:
    """Compile undisturbed, compile with stops, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--stops", type=int, default=10, help="how often it is stopped (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args, flags = parser.parse_known_args()
    generator = np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        whole, parts, checkpoints, log = (work / name for name in ("whole", "parts", "checkpoints", "log"))
        for folder in (whole, parts, checkpoints):
            folder.mkdir()
        name = args.model.name if args.model.is_file() else "model"
        print(f"{'start':<14}{'seconds':>9}{'checkpoints, MB':>16}   how far (lines of the log by pass)")
        began = time.monotonic()
        if started(args.model, flags, whole / name, None, log).wait():
            sys.exit(log.read_text("utf-8", "replace"))
        undisturbed = time.monotonic() - began
        line("undisturbed", undisturbed, checkpoints, log)
        spent, before = 0.0, loading(log)
        for number, share in enumerate(generator.uniform(0.5, 1.5, args.stops)):
            began = time.monotonic()
            process = started(args.model, flags, parts / name, checkpoints, log)
            sign = (signal.SIGKILL, signal.SIGTERM)[number % 2]
            try:
                process.wait(before + share * (undisturbed - before) / (args.stops + 1))
            except subprocess.TimeoutExpired:
                process.send_signal(sign)
                process.wait()
            spent += time.monotonic() - began
            line(sign.name if process.returncode else "ended", time.monotonic() - began, checkpoints, log)
            # Before the command has set up its handler, SIGTERM ends it as SIGKILL does.
            if process.returncode not in (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM):
                sys.exit(f"stop {number + 1}: the command ended with code {process.returncode} before it was stopped")
        began = time.monotonic()
        if started(args.model, flags, parts / name, checkpoints, log).wait():
            sys.exit(log.read_text("utf-8", "replace"))
        spent += time.monotonic() - began
        line("to the end", time.monotonic() - began, checkpoints, log)
        print(f"all starts together took {spent:.1f} s, {spent / undisturbed:.2f} times the undisturbed one")
        same = outputs(whole) == outputs(parts)
        print("the outputs have the same bytes" if same else "the outputs differ")
        sys.exit(not same)


if __name__ == "__main__":
    main()
