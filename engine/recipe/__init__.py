"""Recipes: strict YAML whose errors name file, line, field and remedy."""

from macpo.engine.recipe.reader import dump, flow, kind_of, load, loads, written

__all__ = ["dump", "flow", "kind_of", "load", "loads", "written"]
