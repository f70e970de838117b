"""The quick forms of the speed benchmarks, one after the other: a few minutes. Results: results/quick-*.json.

    python -m benchmarks            all of them
    python -m benchmarks NAME...    some of: search_step, train_step

Each is a program of its own with more options (`python -m benchmarks.search_step --help`); so are
`benchmarks/kernels.py`, which counts and times nothing, `benchmarks/kept_memory.py`, and `benchmarks/attacks.py` and
`benchmarks/data.py`, which take longer and need data.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks import search_step, train_step

RESULTS = Path(__file__).parent / "results"
QUICK = {
    "search_step": (search_step.main, ["--batch-size", "8", "--rounds", "2", "--memory-batch-size", "16"]),
    "train_step": (train_step.main, ["--batch-size", "2", "--rounds", "2"]),
}


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in QUICK]
    if unknown:
        print(f"unknown benchmark {', '.join(unknown)}: known are {', '.join(QUICK)}", file=sys.stderr)
        return 2
    for name in names or QUICK:
        run, arguments = QUICK[name]
        print(f"\n{name}")
        run([*arguments, "--json", str(RESULTS / f"quick-{name}.json")])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
