"""Evaluations: accuracy over problems, fidelity to the full cache, speed; results with intervals, as tables."""

from .accuracy import evaluate
from .fidelity import compare
from .fidelity import table as fidelity_table
from .grading import grade
from .results import Fidelity, Outcome, Run
from .statistics import bootstrap, wilson
from .table import Table
from .tiny import ALPHA, INTERVAL, METHODS, STEERED, TAU, demo, side_by_side
from .tiny import table as demo_table

__all__ = [
    "ALPHA", "Fidelity", "INTERVAL", "METHODS", "Outcome", "Run", "STEERED", "TAU", "Table", "bootstrap", "compare",
    "demo", "demo_table", "evaluate", "fidelity_table", "grade", "side_by_side", "wilson",
]  # fmt: skip
