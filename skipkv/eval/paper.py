"""What SkipKV's paper reports (MLSys 2026, arXiv 2512.07993), to stand beside what is measured here.

R1-Distill models, one A100-40GB, 10 rows, left-padded; one greedy text an item. Points of figures are read off their
vector plots, ±0.1 points of accuracy and ±10 tokens; the rest stands in Tables 1 to 3 and Figure 11.
"""

from __future__ import annotations

from skipkv.load.config import ModelConfig

MODELS = {("qwen2", 28, 3584): "7B", ("qwen2", 48, 5120): "14B", ("llama", 32, 4096): "8B"}
NAMES = {"7B": "R1-Distill-Qwen-7B", "14B": "R1-Distill-Qwen-14B", "8B": "R1-Distill-Llama-8B"}

# Model, task → budgets in slots, and of each variant accuracies in % and mean lengths at these, or of one without any.
# skipkv: with its sentence score; steered: and steering; grouped: and batches of similar prompts, which is SkipKV.
Points = dict[str, tuple[tuple[float | None, ...], tuple[int | None, ...]]]
BUDGETS: dict[tuple[str, str], tuple[int, ...]] = {
    ("7B", "aime24"): (1536, 2220, 3072, 4096), ("7B", "livecodebench"): (1536, 2000, 3072, 3854),
    ("7B", "math500"): (768, 1024, 1260, 1536), ("14B", "aime24"): (1024, 1536, 3072, 4096),
    ("14B", "livecodebench"): (1536, 2000, 3072, 3854), ("14B", "math500"): (768, 1024, 1536, 2048),
    ("8B", "aime24"): (2048, 2700, 3072, 4096), ("8B", "livecodebench"): (1536, 3072, 3854),
    ("8B", "math500"): (768, 1024, 1536, 2048),
}  # fmt: skip
POINTS: dict[tuple[str, str], Points] = {
    ("7B", "aime24"): {
        "full": ((46.7,), (11132,)), "seal": ((43.3,), ()),
        "h2o": ((13.3, 20.0, 43.3, 40.0), (12993, 12475, 10988, 11474)),
        "rkv": ((33.3, 36.7, 33.3, 36.7), (11989, 12000, 12109, 11403)),
        "skipkv": ((None, 40.0, 36.7, 40.0), (None, 11332, 11342, 11819)),
        "steered": ((None, 40.0, 43.3, 40.0), (None, 8860, 10101, 10041)),
        "grouped": ((33.3, 50.0, 53.3, 50.0), (9679, 9228, 8593, 7988)),
    },
    ("7B", "livecodebench"): {
        "full": ((45.9,), (7268,)), "rkv": ((36.3, 40.6, 45.4, 44.1), (7654, 7543, 7351, 7248)),
        "grouped": ((42.9, 45.9, 47.9, 51.1), (7244, 7053, 6826, 6761)),
    },
    ("7B", "math500"): {
        "full": ((87.2,), (2991,)), "h2o": ((66.8, 73.0, 79.0, 81.0), ()), "rkv": ((76.0, 79.2, 82.0, 83.2), ()),
        "steered": ((77.8, 85.2, 85.8, 86.0), ()),
        "grouped": ((83.4, 86.4, 86.0, 88.0), (2851, 2611, 2552, 2582)),
    },
    ("14B", "aime24"): {
        "full": ((60.0,), (10094,)), "seal": ((56.7,), ()), "h2o": ((23.2, 36.7, 40.0, 46.7), ()),
        "rkv": ((30.0, 40.0, 53.3, 53.3), (13412, 12214, 10894, 10799)),
        "grouped": ((46.7, 60.0, 60.0, 70.0), (9519, 8906, 8131, 7788)),
    },
    ("14B", "livecodebench"): {
        "full": ((63.4,), (6620,)), "rkv": ((50.6, 53.9, 56.4, 57.4), ()),
        "grouped": ((57.1, 62.9, 62.9, 62.7), (6590, 6449, 6266, 6187)),
    },
    ("14B", "math500"): {
        "full": ((89.4,), (2553,)), "rkv": ((80.0, 80.4, 84.4, 86.6), ()),
        "grouped": ((84.0, 86.8, 87.2, 90.2), (2862, 2684, 2488, 2553)),
    },
    ("8B", "aime24"): {
        "full": ((40.0,), (11125,)), "seal": ((46.7,), ()), "h2o": ((0.0, 23.3, 13.3, 20.0), ()),
        "rkv": ((10.0, 20.0, 20.0, 26.7), (14190, 14684, 14393, 12435)),
        "grouped": ((30.0, 46.7, 43.3, 43.3), (11537, 9383, 9991, 9452)),
    },
    ("8B", "livecodebench"): {
        "full": ((50.6,), (7105,)), "rkv": ((42.1, 45.6, 45.6), ()),
        "grouped": ((42.1, 46.8, 48.9), (6990, 6688, 6549)),
    },
    ("8B", "math500"): {
        "full": ((81.2,), (3225,)), "rkv": ((77.2, 78.0, 76.6, 78.4), ()),
        "grouped": ((78.4, 79.4, 79.2, 80.6), (2659, 2546, 2541, 2458)),
    },
}  # fmt: skip
# Mean slots that padding leaves of the budgets above (Table 3).
VALID = {("7B", "math500"): {"steered": (630, 886, 1122, 1398), "grouped": (759, 1015, 1251, 1527)}}
# Samples a minute at these rows, budget 512 (Table 1); None: out of memory.
ROWS = (10, 50, 100, 120, 140)
SPEEDS = {("7B", "gsm8k"): {
    "full": (4.07, 2.64, None, None, None), "seal": (7.41, 6.87, None, None, None),
    "rkv": (5.81, 13.7, 20.0, 18.1, 18.8), "grouped": (9.70, 22.7, 25.4, 20.0, 19.4),
}}  # fmt: skip


def size_of(config: ModelConfig) -> str:
    """Which of the paper's models has this shape; empty where none has."""
    return MODELS.get((config.family, config.n_layers, config.hidden), "")


def shares(size: str, task: str) -> tuple[str, ...]:
    """The paper's budgets as shares of its full cache's mean length; of its 7B model for others."""
    key = (size, task) if (size, task) in POINTS else ("7B", task)
    if key not in POINTS:
        return ()
    length = POINTS[key]["full"][1][0]
    return tuple(f"{100 * budget / length:.0f}%" for budget in BUDGETS[key])
