"""How fast attention is with EDiT and without: one process, calls in alternation, medians, memory, checked outputs."""

from ..runtime import device_name
from .contenders import CONTENDERS
from .plot import draw
from .report import Measurement, table
from .subjects import LEVELS
from .timing import measure
from .verify import verify

__all__ = ["CONTENDERS", "LEVELS", "Measurement", "device_name", "draw", "measure", "table", "verify"]
