"""Pictures and short videos that teach a model to see: the one door to `openm3.train.sights`."""

from openm3.train.sights.sight import Sight
from openm3.train.sights.tasks import KINDS, SightMaker

__all__ = ["KINDS", "Sight", "SightMaker"]
