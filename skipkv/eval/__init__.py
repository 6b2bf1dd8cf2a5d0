"""Evaluations: accuracy over problems, fidelity to the full cache, speed; results with intervals, as tables."""

from .evaluate import Results, evaluate
from .fidelity import compare
from .fidelity import table as fidelity_table
from .figures import RunSummary, Summary
from .grading import grade
from .records import Grade, Record
from .results import Fidelity, Outcome, Run
from .statistics import Figure, bootstrap, mcnemar, pass_at_k, wilson
from .store import Store
from .summary import fragmentation, summarise
from .table import Table
from .tasks import TASKS, Item
from .tiny import ALPHA, INTERVAL, METHODS, STEERED, TAU, demo, side_by_side
from .tiny import table as demo_table

__all__ = [
    "ALPHA", "Fidelity", "Figure", "Grade", "INTERVAL", "Item", "METHODS", "Outcome", "Record", "Results", "Run",
    "RunSummary", "STEERED", "Store", "Summary", "TASKS", "TAU", "Table", "bootstrap", "compare", "demo", "demo_table",
    "evaluate", "fidelity_table", "fragmentation", "grade", "mcnemar", "pass_at_k", "side_by_side", "summarise",
    "wilson",
]  # fmt: skip
