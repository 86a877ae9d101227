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

    @dataclass(frozen=True)
    class Recipes:
        words: tyro.conf.Positional[tuple[str, ...]] = ()
        """List only the recipes whose names have all of these words."""

    words = parse(Recipes, arguments, "localgrad recipes", RECIPES_HELP).words
    names = [name for name in RECIPES if all(word in name for word in words)]
    if not names:
        raise LocalGradError(f"no recipe has {' and '.join(words)} in its name; `localgrad recipes` lists all of them")
    width = max(map(len, names))
    print(f"{'recipe':{width}}  {'label':>5}  blocks  cuts  paper's error")
    for name in names:
        row = RECIPES[name]()
        error = "-" if row.paper_error is None else f"{row.paper_error:.2f}%"
        print(f"{name:{width}}  {row.label:>5}  {row.num_blocks:6}  {row.num_blocks - 1:4}  {error:>13}")
    return 0
