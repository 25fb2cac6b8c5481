"""`surgery --help` beside an interpreter that does nothing, in turns.

python benchmarks/startup.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time


def main() -> None:
    """Time both, and print medians and the slowest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    ways = {"python -c pass": ["-c", "pass"], "surgery --help": ["-m", "surgery.cli", "--help"]}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, words in ways.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - started)
    for name, times in seconds.items():
        print(f"{name:16} median {statistics.median(times[1:]):.3f} s, slowest {max(times[1:]):.3f} s")


if __name__ == "__main__":
    main()
