"""The configuration page is what the code says."""

from tests.conftest import ROOT
from unfold.pretrain.config import flatten, parse_config
from unfold.pretrain.config.reference import reference_page, sections

SETTINGS = {s.key: s for _, _, settings in sections() for s in settings}


def test_the_committed_page_is_the_generated_one():
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == reference_page(), "run: python -m pretrain config-reference > docs/configuration.md"


def test_every_key_of_a_resolved_configuration_is_there_with_its_default_and_a_meaning():
    resolved = flatten(parse_config({"data": {"train": ["shard"], "tokenizer": "there"}}).to_dict())
    always = {key: setting for key, setting in SETTINGS.items() if "[]" not in key}  # sections of a list that is empty
    assert list(sorted(always)) == sorted(resolved)
    given = ("data.train", "data.tokenizer")
    assert {k: s.resolved for k, s in always.items() if k not in given} == {k: v for k, v in resolved.items() if k not in given}
    assert SETTINGS["train.stages[].until"].kind == "int"
    assert SETTINGS["train.stages[].recall"].kind == "none or suffix or all or null"
    assert all(s.doc for s in SETTINGS.values())


def test_types_defaults_and_what_may_change_are_in_words():
    page = reference_page()
    for row in (
        "| `gist.chunk_sizes` | list of int | `[8, 4]` | fixed | raw tokens per level-0 gist,",
        "| `gist.topk` | int or null | `null` | fixed | ",
        "| `optimizer.lr` | float | `0.0003` | allow | peak learning rate |",
        "| `parallel.sequence` | bool | `false` | free | ",
        '| `train.init_from` | str | `""` | fixed | ',
        "none \\| suffix",
    ):
        assert row in page, row
