"""The offline demo world: generated requests, responses of every quality, and an exact gold score."""

from macpo.demo_world.build import World, build, own_topics
from macpo.demo_world.gold import explain, gold
from macpo.demo_world.settings import WorldSettings

__all__ = ["World", "WorldSettings", "build", "explain", "gold", "own_topics"]
