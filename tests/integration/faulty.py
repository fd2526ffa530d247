"""``python -m pretrain`` in which chosen samples make the loss bad, as broken data or broken hardware would.

python -m tests.integration.faulty nan=3,4 spike=9 train --config ..
"""

import math
import sys

from unfold.model.parallel.pipeline import stage_inputs
from unfold.model.transformer import Transformer
from unfold.pretrain.command import main
from unfold.pretrain.data.samples import BatchBuilder
from unfold.pretrain.train import step

FACTORS = {"nan": float("nan"), "spike": 10.0}


def spoil(factor_of: dict[int, float]) -> None:
    """Multiply the loss of every micro-batch that holds one of these global sample numbers."""
    build, forward, marked = BatchBuilder.build, Transformer.forward, []

    def marking_build(self, samples, *args, **kwargs):
        batch = build(self, samples, *args, **kwargs)
        marked.extend((batch.ids, factor_of[n]) for n in samples if n in factor_of and self.source.samples_per_epoch > 20)
        return batch

    def spoiled_forward(self, batch):
        loss = forward(self, batch)
        for ids, factor in marked:
            if batch.ids is ids:
                loss = loss * factor
        return loss

    def spoiled_inputs(batch, factor, context):
        return stage_inputs(batch, factor * math.prod(f for ids, f in marked if batch.ids is ids), context)

    BatchBuilder.build, Transformer.forward = marking_build, spoiled_forward
    step.stage_inputs = spoiled_inputs  # what a pipeline is fed with


if __name__ == "__main__":
    rest = sys.argv[1:]
    factors = {}
    while "=" in rest[0]:
        kind, numbers = rest.pop(0).split("=")
        factors |= {int(n): FACTORS[kind] for n in numbers.split(",")}
    spoil(factors)
    sys.exit(main(rest))
