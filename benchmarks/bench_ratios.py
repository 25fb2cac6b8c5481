"""Do the ratios of `surgery bench` repeat? The steps of some methods, measured several times, and how far they differ.

python benchmarks/step.py --shape small --write small-llama
python benchmarks/bench_ratios.py small-llama --runs 3 --batch 2 --sequence 512 --threads 2
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from surgery.bench.measure import measure_steps
from surgery.bench.results import Row, ratios
from surgery.bench.sizes import settle
from surgery.bench.spec import make_spec, parse_methods, split_methods
from surgery.bench.subject import build, open_feed, open_subject


def main() -> None:
    """Measure, and print each run's ratios to the first method and the largest distance between two runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--methods", default="floor,paca,lora")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    given = {name: getattr(arguments, name) for name in ("rounds", "batch", "sequence", "threads")}
    methods = split_methods([arguments.methods])
    spec = make_spec({"model": str(arguments.model), "methods": methods, "device": "cpu", **given})
    subject = open_subject(spec)
    entries = tuple(entry for entry, _ in settle(subject, parse_methods(methods)))
    feed, base = open_feed(subject), build(subject)
    found: dict[str, list[float]] = {name: [] for name in methods[1:]}
    for number in range(arguments.runs):
        rows = {entry.name: Row(method=entry.name) for entry in entries}
        measure_steps(subject, entries, feed, base, rows, None)
        for name, values in found.items():
            values.append(ratios(rows[name].seconds, rows[methods[0]].seconds)[0])
        shown = ", ".join(f"{name} {values[-1]:.3f}" for name, values in found.items())
        print(f"run {number + 1}, to {methods[0]}: {shown}; load {os.getloadavg()[0]:.1f}", flush=True)
    for name, values in found.items():
        print(f"{name}: the runs differ by {max(values) / min(values) - 1:.1%}")


if __name__ == "__main__":
    main()
