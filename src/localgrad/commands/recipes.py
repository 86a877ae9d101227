"""List the recipes (named runs): number of blocks, number of cuts, and the test error that the paper reports.

Example:
  localgrad recipes cifar10 resnet32 man
"""

from collections.abc import Sequence

from tyro.conf import Positional

from localgrad.commands.parse import call
from localgrad.errors import LocalGradError


def recipes(words: Positional[tuple[str, ...]] = ()) -> int:
    """Print the list.

    Args:
        words: List only recipes whose names contain all of these words.
    """
    from localgrad.recipes import RECIPES
    from localgrad.results.terminal import print_table

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


def main(arguments: Sequence[str]) -> int:
    """`localgrad recipes [WORDS]`."""
    return call(recipes, arguments, "localgrad recipes", __doc__)
