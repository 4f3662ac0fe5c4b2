"""Recipes: strict YAML whose errors name file, line, field and remedy."""

from macpo.engine.recipe.reader import dump, kind_of, load, loads, written

__all__ = ["dump", "kind_of", "load", "loads", "written"]
