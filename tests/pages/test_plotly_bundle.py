"""The library in a page: only what is drawn runs, and nothing of the text is lost."""

import re

import pytest
from plotly.offline import get_plotlyjs

from btpipe.pages import plotly_bundle

REGISTERED = re.compile(r"\.register\(\[([^\]]*)\]\)")


@pytest.mark.parametrize("kind", ["scattergl", "heatmap"])
def test_of_all_kinds_only_the_one_that_is_drawn_is_registered(kind: str) -> None:
    shipped, script = get_plotlyjs(), plotly_bundle.script(kind)
    (everything,), (chosen,) = REGISTERED.findall(shipped), REGISTERED.findall(script)
    assert chosen in everything.split(",")
    assert script.replace(chosen, everything).replace("(() => {\n", "() => {\n") == (
        shipped.replace("\n}));", "\n})));").replace("(() => {\n", "() => {\n")
    )


def test_a_kind_that_the_bundle_does_not_name_leaves_every_kind_in_it() -> None:
    assert REGISTERED.findall(plotly_bundle.script("no such kind")) == REGISTERED.findall(
        get_plotlyjs()
    )
