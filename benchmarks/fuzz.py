"""Run the property tests for a long time on new random inputs, and report every failure.

python benchmarks/fuzz.py --minutes 10
"""

import argparse
import importlib
import json
import os
import random
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from report import environment, write

MODULES = {"test_properties": "core", "test_parsers": "config"}
LENGTH = 16384
"""Number of random bytes from which an input is made."""


def tests() -> dict[str, Any]:
    """The property tests by name."""
    tests = Path(__file__).parents[1] / "tests"
    sys.path[:0] = [str(tests), *(str(tests / folder) for folder in MODULES.values())]
    modules = [importlib.import_module(name) for name in MODULES]
    found = {name: test for module in modules for name, test in vars(module).items() if name.startswith("test_")}
    return {name: test for name, test in found.items() if hasattr(test, "hypothesis")}


def fuzz(minutes: float, seed: int) -> dict[str, Any]:
    """Runs all tests in turn on inputs from random bytes, until the time is over.

    Returns:
        The number of inputs of each test, and for each test that failed the first error and the seed of its input.
    """
    chosen, end = tests(), time.monotonic() + 60 * minutes
    ran: Counter[str] = Counter()
    failures: dict[str, Any] = {}
    while time.monotonic() < end:
        for name, test in chosen.items():
            buffer = random.Random(seed).randbytes(LENGTH)
            try:
                ran[name] += test.hypothesis.fuzz_one_input(buffer) is not None  # None if the bytes give no input
            except Exception:  # any exception is a finding
                failures.setdefault(name, {"seed": seed, "error": traceback.format_exc()})
            seed += 1
    return {"minutes": minutes, "inputs": ran.total(), "inputs_by_test": dict(ran), "failures": failures}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    found = {"seed": options.seed, **fuzz(options.minutes, options.seed)}
    print(json.dumps(found, indent=1))
    if options.output:
        write(options.output, {**found, **environment()})
    sys.exit(bool(found["failures"]))
