"""Run the property tests for long, with new random inputs each round, and report what is no `LocalGradError`.

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

os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import HealthCheck, Verbosity, settings
from hypothesis import seed as seeded
from report import environment, write

MODULES = ("test_properties", "test_parsers")


def tests() -> dict[str, object]:
    """The property tests by name."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    modules = [importlib.import_module(name) for name in MODULES]
    found = {name: test for module in modules for name, test in vars(module).items() if name.startswith("test_")}
    return {name: test for name, test in found.items() if hasattr(test, "hypothesis")}


def fuzz(minutes: float, examples: int, seed: int) -> dict[str, object]:
    """Rounds over all tests until the time is over; each failure with the smallest input that Hypothesis found."""
    rounds = settings(
        max_examples=examples,
        derandomize=False,
        database=None,
        deadline=None,
        verbosity=Verbosity.quiet,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    chosen, chance, end = tests(), random.Random(seed), time.monotonic() + 60 * minutes
    ran: Counter[str] = Counter()
    failures: dict[str, str] = {}
    while time.monotonic() < end:
        for name, test in chosen.items():
            if time.monotonic() >= end:
                break
            try:
                seeded(chance.randrange(2**32))(rounds(test))()  # type: ignore[operator]
            except Exception:  # whatever it is, it is what is looked for
                failures.setdefault(name, traceback.format_exc())
            ran[name] += examples
    return {"minutes": minutes, "examples_at_most": dict(ran), "failures": failures}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--examples", type=int, default=100, help="of a test in a round")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    found = {"seed": options.seed, **fuzz(options.minutes, options.examples, options.seed)}
    print(json.dumps(found, indent=1))
    if options.output:
        write(options.output, {**found, **environment()})
    sys.exit(bool(found["failures"]))
