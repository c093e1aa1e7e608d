"""Views that papers describe, by name: `views = "simclr"` in a recipe stands for their tables.

barlow-twins  facebookresearch/barlowtwins, main.py: `transform` and `transform_prime`
byol          arXiv 2006.07733, appendix B: T and T'; Barlow Twins took its numbers from there
simclr        arXiv 2002.05709, appendix A, with colour strength 1: both views alike
"""

import difflib

from btpipe.errors import RecipeError
from btpipe.recipe.tables import VIEW_A, VIEW_B, Blur, Jitter, View

_SIMCLR = View(
    jitter=Jitter(probability=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2),
    blur=Blur(probability=0.5, sigma=(0.1, 2.0)),
)
PRESETS = {
    "barlow-twins": (VIEW_A, VIEW_B),
    "byol": (VIEW_A, VIEW_B),
    "simclr": (_SIMCLR, _SIMCLR),
}


def expand(name: str, source: str) -> list[dict[str, object]]:
    """The tables that a preset's name in `source` stands for, with every number in them.

    Raises:
        RecipeError: no such preset; the nearest name is suggested.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        raise RecipeError(
            f"views = {name!r}",
            where=source,
            expected=f"[[views]] tables, or one of {', '.join(PRESETS)}",
            fix=f"did you mean {near[0]}?" if near else "",
        )
    return [view.model_dump(mode="json") for view in PRESETS[name]]
