"""Pictures and short videos that teach a model to see: the one door to `openm3.train.sights`."""

from openm3.train.sights.sight import Sight
from openm3.train.sights.tasks import KINDS, WRITING, SightMaker

__all__ = ["KINDS", "WRITING", "Sight", "SightMaker"]
