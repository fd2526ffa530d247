"""One step on its own: scaling of the loss, non-finite losses, learning rates."""

import math
from types import SimpleNamespace

import pytest
import torch

from unfold.model.config import ModelConfig
from unfold.model.visibility import IGNORED
from unfold.pretrain.config import ScheduleConfig
from unfold.pretrain.train.engine import learning_rate
from unfold.pretrain.train.step import train_step


class FakeEngine:
    """Records what a step does; its loss is the sum of the given numbers."""

    def __init__(self, losses):
        self.losses, self.scaled, self.steps = iter(losses), [], 0
        self.optimizer = SimpleNamespace(overflow=False)
        self.module = SimpleNamespace(context_parallel=None)

    def __call__(self, batch):
        return torch.tensor(next(self.losses))

    def backward(self, loss):
        self.scaled.append(loss.item())
        self.optimizer.overflow |= not math.isfinite(loss.item())  # as DeepSpeed finds in the gradient

    def step(self):
        self.steps += 1

    def get_global_grad_norm(self):
        return 1.5


VECTOR = lambda values: torch.stack([torch.as_tensor(x).double() for x in values])
PARALLEL = SimpleNamespace(
    data_size=2,
    stages=1,
    stage=0,
    device=torch.device("cpu"),
    sum_over_data=lambda x: 2 * x,
    sum_over_replicas=lambda values: 2 * VECTOR(values),
    sum_over_parts=lambda values: 2 * VECTOR(values),
    vector=VECTOR,
    replica_group=SimpleNamespace(size=lambda: 2),
    tensor_group=SimpleNamespace(size=lambda: 1),
)
MODEL = ModelConfig()


def batch(targets: int):
    labels = torch.full((1, 8), IGNORED)
    labels[0, :targets] = 1
    made = SimpleNamespace(labels=labels, recall=None, added=None)
    made.to = lambda device: made
    return made


def test_every_loss_token_weighs_the_same():
    engine = FakeEngine([6.0, 2.0])
    result = train_step(engine, [batch(3), batch(1)], PARALLEL, MODEL, None)
    # 8 tokens over both ranks; DeepSpeed will divide by 2 ranks x 2 micro-batches, which the factor takes back.
    assert engine.scaled == [6.0 * 4 / 8, 2.0 * 4 / 8]
    assert (result.loss, result.grad_norm, result.loss_tokens) == (2.0, 1.5, 8)
    assert engine.steps == 2


@pytest.mark.parametrize("losses", [[1.0, math.nan], [math.inf, 1.0]])
def test_a_bad_loss_makes_the_gradient_bad_so_that_the_step_is_skipped(losses):
    engine = FakeEngine(losses)
    result = train_step(engine, [batch(3), batch(3)], PARALLEL, MODEL, None)
    assert result.skipped and not math.isfinite(result.loss)
    assert math.isnan(engine.scaled[-1])


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_schedules(kind):
    schedule = ScheduleConfig(kind=kind, warmup=0.1, decay=0.3, floor=0.1)
    rates = [learning_rate(step, 100, 2.0, schedule) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(2.0) and max(rates) <= 2.0
    assert all(a < b for a, b in zip(rates[:9], rates[1:10])), "warm-up rises"
    if kind == "constant":
        assert set(rates[10:]) == {2.0}
    else:
        assert all(a >= b for a, b in zip(rates[9:], rates[10:])), "then it never rises"
        assert 0.2 <= rates[-1] < 0.27
    if kind == "wsd":
        assert rates[69] == 2.0 and rates[71] < 2.0
    if kind == "cosine":
        assert rates[-1] == pytest.approx(0.2)


def test_a_run_of_one_step_has_a_rate():
    assert learning_rate(0, 1, 1.0, ScheduleConfig(warmup=0.0)) == 1.0
