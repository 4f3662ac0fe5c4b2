"""The offline demo world: generated requests, answers of every quality, and an exact gold score."""

from macpo.world.build import World, build, own_topics
from macpo.world.gold import explain, gold
from macpo.world.settings import WorldSettings

__all__ = ["World", "WorldSettings", "build", "explain", "gold", "own_topics"]
