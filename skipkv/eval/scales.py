"""What of a task's suite and calibration is its own."""

from __future__ import annotations

from dataclasses import dataclass

from skipkv.eval import paper, tiny
from skipkv.methods import PARAMETERS


@dataclass(frozen=True)
class Scale:
    """How large, and with what besides a budget.

    Attributes
    ----------
    budgets : tuple of str
        Where the paper has none.
    parameters : str
        Of all methods.
    tau : float
        Unless it is calibrated.
    rows : tuple of int
        At which throughput is measured.
    memory : int
        Its limit: so many times the most cache that one text takes in full.
    """

    budgets: tuple[str, ...] = ("25%", "50%")
    parameters: str = ""
    tau: float = PARAMETERS["tau"]["default"]
    rows: tuple[int, ...] = paper.ROWS
    memory: int = 50

    def method(self, name: str, budget: str, tau: float) -> str:
        """As `parse_run` reads it; only skipkv acts on tau, the others count repeated sentences by it."""
        return f"{name}:tau={tau}" if name == "full" else f"{name}:budget={budget},{self.parameters}tau={tau}"


SCALES = {
    "tiny": Scale(("25%", "35%", "50%"), f"interval={tiny.INTERVAL},", tiny.TAU, (4, 16, 32), 8),
    "gsm8k": Scale(("512",)),
}


def scale_of(task: str) -> Scale:
    return SCALES.get(task, Scale())
