"""What is learned beside the next token: which samples, how much each term weighs, what is refused."""

from types import SimpleNamespace

import pytest
import torch

from unfold.model.visibility import IGNORED, AddedLosses, MicroBatch
from unfold.pretrain.config import DistillConfig, parse_config
from unfold.pretrain.errors import UserError
from unfold.pretrain.train.added import NOTHING_ADDED, Added
from unfold.pretrain.train.inputs import Inputs

MODEL = SimpleNamespace(hidden_size=8, layers=2)
TWICE = SimpleNamespace(sum_over_data=lambda x: 2 * x)


def batch(targets: int, distilled=(0,), samples=1) -> MicroBatch:
    """Samples of ten rows, six of them raw, the first few with a target."""
    labels = torch.full((samples, 10), IGNORED)
    labels[:, :targets] = 1
    level, doc = torch.full((samples, 10), -1), torch.zeros(samples, 10, dtype=torch.long)
    level[:, 6:8], doc[:, 8:] = 0, -1
    return MicroBatch(labels, labels, SimpleNamespace(level=level, doc=doc), distilled=distilled)


def engine(zero: int):
    return SimpleNamespace(zero_optimization_stage=lambda: zero)


def test_nothing_is_touched_where_nothing_is_added():
    batches = [batch(3)]
    assert NOTHING_ADDED.to_step(batches, None, None, MODEL, 6.0) == (batches, {})
    assert NOTHING_ADDED.shares(batches, {}) == {}


def test_every_term_is_a_mean_over_its_tokens():
    """Of 20 loss tokens 2 x 3 are of distilled samples, which have 2 x 6 raw tokens."""
    added = Added(0.1, DistillConfig(logits=0.5, hidden=2.0))
    (taught, other), divisors = added.to_step([batch(3), batch(7, ())], engine(1), TWICE, MODEL, 20.0)
    assert divisors == {"z": 20.0, "logits": 6.0, "hidden": 12.0 * 8 * 2}
    assert (taught.added.z, taught.added.logits, taught.added.hidden) == pytest.approx((0.1, 0.5 * 20 / 6, 2.0 * 20 / 192))
    assert taught.added.samples == (0,) and other.added == AddedLosses(z=0.1)
    taught.added.note("logits", torch.tensor(9.0))
    for each in (taught, other):
        each.added.note("z", torch.tensor(5.0))
    shares = added.shares([taught, other], divisors)  # of two ranks
    assert shares == {"z_loss": 0.5, "distill_logits": 1.5, "distill_hidden": 0.0}


def test_under_zero_3_ranks_keep_each_other_company():
    """The other rank's sample is distilled: this one gathers the weights with it, and learns nothing from it."""
    alongside = SimpleNamespace(sum_over_data=lambda x: x + 1)
    added = Added(0.0, DistillConfig(hidden=1.0))
    (company,), _ = added.to_step([batch(3, ())], engine(3), alongside, MODEL, 4.0)
    assert company.added == AddedLosses(samples=(0,))
    (alone,), _ = added.to_step([batch(3, ())], engine(2), alongside, MODEL, 4.0)
    assert alone.added.samples == ()


def test_a_step_without_a_distilled_sample_has_no_figures():
    nowhere = SimpleNamespace(sum_over_data=lambda x: x)
    (plain,), divisors = Added(0.0, DistillConfig(logits=1.0)).to_step([batch(3, ())], engine(3), nowhere, MODEL, 3.0)
    assert divisors == {} and plain.added == AddedLosses()


@pytest.mark.parametrize("numbers,every,chosen", [([3, 4, 6], 3, (0, 2)), ([1, 2], 3, ()), ([5, 7], 1, (0, 1))])
def test_samples_are_chosen_by_their_global_numbers(numbers, every, chosen):
    inputs = lambda distill: SimpleNamespace(config=SimpleNamespace(distill=distill))
    assert Inputs._distilled(inputs(DistillConfig(logits=1.0, every=every)), numbers) == chosen
    assert Inputs._distilled(inputs(DistillConfig(every=every)), numbers) == ()


@pytest.mark.parametrize(
    "sections,message",
    [
        ({"parallel": {"pipeline": 2}}, "distill.hidden: 1.0 with parallel.pipeline: 2; a stage has no whole model"),
        ({"model": {"attention": "dense"}}, "distill.hidden: 1.0 with model.attention: dense, which has nothing to learn so"),
    ],
)
def test_what_cannot_teach_itself_is_refused(sections, message):
    tree = {"data": {"train": ["x"], "tokenizer": "t"}, "distill": {"hidden": 1.0}, **sections}
    with pytest.raises(UserError) as error:
        parse_config(tree)
    assert message in str(error.value) and "\n" not in str(error.value)
    parse_config(tree | {"distill": {"every": 4}})
