"""The workshop of steering vectors: made from reasoning texts, or taken over from released ones."""

from .extraction import Extraction, Step, extract, label, steps
from .released import import_released, read_torch_tensor

__all__ = ["Extraction", "Step", "extract", "import_released", "label", "read_torch_tensor", "steps"]
