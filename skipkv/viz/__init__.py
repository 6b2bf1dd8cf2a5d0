"""Pictures of traces and results, each one self-contained file that works offline and shows itself in Jupyter.

Trace → encode: when each head gave up each position → deflated data block ┐
Trace → encode: sentences, λ, α, bytes, scores if they fit ────────────────┼→ Page: kept, compare, survival
page.html, page.css, *.js ─────────────────────────────────────────────────┘
Outcomes, runs of the demo, summaries or Fidelities → curves → Picture: curve
"""

from .curves import Picture, curve
from .page import Page
from .views import compare, kept, survival

__all__ = ["Page", "Picture", "compare", "curve", "kept", "survival"]
