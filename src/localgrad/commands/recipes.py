"""TODO commands.recipes."""

from collections.abc import Sequence
from dataclasses import dataclass

from localgrad.commands.parse import parse
from localgrad.errors import LocalGradError

RECIPES_HELP = """List the named runs: blocks, cuts, and the test error that the paper reports.

Example:
  localgrad recipes cifar10 resnet32 man
"""


def recipes(arguments: Sequence[str]) -> int:
    """`localgrad recipes [WORDS]`."""
    import tyro

    from localgrad.recipes import RECIPES
    from localgrad.results.terminal import print_table

    @dataclass(frozen=True)
    class Recipes:
        words: tyro.conf.Positional[tuple[str, ...]] = ()
        """List only the recipes whose names have all of these words."""

    words = parse(Recipes, arguments, "localgrad recipes", RECIPES_HELP).words
    names = [name for name in RECIPES if all(word in name for word in words)]
    if not names:
        raise LocalGradError(f"no recipe has {' and '.join(words)} in its name; `localgrad recipes` lists all of them")
    made = {name: RECIPES[name]() for name in names}
    errors = {name: "-" if row.paper_error is None else f"{row.paper_error:.2f}%" for name, row in made.items()}
    print_table(
        ["recipe", "label", "blocks", "cuts", "paper's error"],
        [(name, row.label, str(row.num_blocks), str(row.num_blocks - 1), errors[name]) for name, row in made.items()],
        narrow=[0, 4],
    )
    return 0
