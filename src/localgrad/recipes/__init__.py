"""Named runs: each recipe is a row of a paper's table or of ours, with a complete config.

`RECIPES` maps each name to a function that returns the recipe. `recipe(name)` calls it.
"""

from collections.abc import Callable

from localgrad.errors import LocalGradError, closest
from localgrad.recipes.ablation import ablation_recipes
from localgrad.recipes.auglocal import auglocal_recipes
from localgrad.recipes.cifar import cifar_recipes
from localgrad.recipes.digits import digits_recipes
from localgrad.recipes.imagenet import imagenet_recipes, imagenette64_recipes, imagenette_recipes
from localgrad.recipes.recipe import Recipe
from localgrad.recipes.vit import vit_recipes

RECIPES: dict[str, Callable[[], Recipe]] = {
    **digits_recipes(),
    **cifar_recipes(),
    **ablation_recipes(),
    **auglocal_recipes(),
    **imagenette_recipes(),
    **imagenette64_recipes(),
    **imagenet_recipes(),
    **vit_recipes(),
}


def recipe(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        LocalGradError: there is no such recipe; the message proposes similar names.
    """
    if name not in RECIPES:
        raise LocalGradError(f"there is no recipe {name!r}{closest(name, list(RECIPES))}; see `localgrad recipes`")
    return RECIPES[name]()


__all__ = ["RECIPES", "Recipe", "recipe"]
