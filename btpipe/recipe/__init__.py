"""Recipes: TOML into typed, frozen values. Every default of btpipe stands in `tables`.

A recipe may name a base with `extends = "other.toml"`; tables are merged, arrays are replaced.
`--set table.key=value` comes last. An unknown key is refused with its file, its path and the
nearest valid key; nothing is created before the whole recipe is valid.
"""

from btpipe.recipe.reading import find, load, shipped
from btpipe.recipe.steps import count_steps
from btpipe.recipe.tables import (
    BOOKKEEPING,
    ROUNDING,
    VIEW_A,
    VIEW_B,
    Blur,
    Data,
    Health,
    Jitter,
    Loss,
    Network,
    Optim,
    Recipe,
    Run,
    Solarize,
    View,
)

__all__ = [
    "BOOKKEEPING",
    "ROUNDING",
    "VIEW_A",
    "VIEW_B",
    "Blur",
    "Data",
    "Health",
    "Jitter",
    "Loss",
    "Network",
    "Optim",
    "Recipe",
    "Run",
    "Solarize",
    "View",
    "count_steps",
    "find",
    "load",
    "shipped",
]
