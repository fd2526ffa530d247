"""ZeRO-3 with weights that are gathered and let go, layer by layer, while layers are computed again."""

import json
import re

import pytest

from tests import warm


def test_layers_are_computed_again_with_gathered_weights():
    """Models as small as those of the layouts keep all weights whole otherwise."""
    done = warm.command("tests.parallel.zero3_ranks", ranks=2)
    results = json.loads(re.search(r"RESULT (.*)", done.stdout)[1])
    want = results.pop("none")
    assert abs(want[-1] - want[0]) > 0.01 and len(results) == 5
    for way, losses in results.items():
        assert losses == pytest.approx(want, rel=2e-6), way
