"""Bytes that one micro-batch keeps on one rank for its backward pass, term by term as the model's operations save them.

Written down from model/ (norm, projections, attention, feed-forward, loss); tests compare with what autograd really saves.
Sizes: M tokens of this rank, R of them in the residual stream (M / tensor under sequence parallelism), e bytes per element.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from unfold.model.config import ModelConfig
from unfold.model.lora import fused_layers
from unfold.model.loss import CHUNK
from unfold.pretrain.config import RunConfig
from unfold.pretrain.plan.recall import INT64, Recalling
from unfold.pretrain.plan.trained import Trained, adapter_bytes, count_trained
from unfold.pretrain.plan.work import SampleSize

FP32 = 4


@dataclass(frozen=True)
class Activations:
    """Bytes kept by one micro-batch on one rank.

    Attributes:
        model: the model; its ``attention`` says which kind.
        element: bytes per element of the compute precision.
        samples: of the micro-batch.
        tensor, context: ranks that share layers and sequences.
        sequence: whether the residual stream is split over the tensor-parallel ranks.
        exchange: whether keys of other ranks stand before a rank's own (context parallelism through gists).
        sample: lengths of a sample.
        gpu: the attention kernel of GPUs; False for that of the CPU, which keeps other tensors.
        tiles: of the feed-forward layer.
        trained: what has gradients, of the first stage where there are several.
        between: bytes that the adapters of each linear layer keep.
    """

    model: ModelConfig
    element: int
    samples: int
    tensor: int
    context: int
    sequence: bool
    exchange: bool
    sample: SampleSize
    trained: Trained
    gpu: bool = True
    tiles: int = 1
    between: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, config: RunConfig, sample: SampleSize, gpu: bool = True) -> Activations:
        parallel = config.parallel
        exchange = parallel.gists_ranks > 1
        tokens, element = config.train.micro_batch * sample.length // parallel.context, element_size(config)
        between = tuple((name, adapter_bytes(config, name, tokens, element)) for name in fused_layers(config.model))
        return cls(
            config.model, element, config.train.micro_batch, parallel.tensor, parallel.context,
            parallel.sequence and parallel.tensor > 1, exchange, sample, count_trained(config), gpu, config.train.mlp_tiles,
            between,
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        """M: tokens of this rank."""
        return self.samples * self.sample.length // self.context

    @property
    def residual_tokens(self) -> int:
        """R: those whose residual stream it holds."""
        return self.tokens // self.tensor if self.sequence else self.tokens

    @property
    def targets(self) -> int:
        """Tokens whose logits it computes."""
        return self.samples * -(-self.sample.raw // self.context)

    @property
    def _query_width(self) -> int:
        return self.model.heads // self.tensor * self.model.head_dim

    @property
    def _key_width(self) -> int:
        return self.model.kv_heads // self.tensor * self.model.head_dim

    def residual(self) -> int:
        """The residual stream between two layers: all that a layer keeps which is computed again."""
        return self.element * self.model.hidden_size * self.residual_tokens

    def norm(self, name: str = "final_norm") -> int:
        """Its input in fp32; one inverse root per token; where its weight is trained, the normalised input."""
        normed = self.element if f"{name}.weight" in self.trained.names else 0
        return ((FP32 + normed) * self.model.hidden_size + FP32) * self.residual_tokens

    def _into(self, layer: str, size: int) -> int:
        """What a linear layer keeps. size: bytes of its input."""
        return (size if self.trained.keeps_input(layer) else 0) + dict(self.between)[layer]

    def layer(self) -> int:
        """Everything that a layer keeps: two norms, the inputs of its four projections, attention, gate and up."""
        return self.before_attention() + self.attention() + self.feed_forward()

    def before_attention(self) -> int:
        """Up to queries, keys and values: a norm, the input of their projection (gathered under sequence parallelism), norms."""
        hidden = self.element * self.model.hidden_size * self.tokens
        return self.norm("attention_norm") + self._into("attention.qkv", hidden) + self.head_norms()

    def feed_forward(self) -> int:
        """Its norm and its input; unless it is tiled, gate and up, silu(gate), the product."""
        norm = self.norm("mlp_norm")
        if self.tiles > 1:
            return norm + self.residual()
        hidden, wide = (
            self.element * size * self.tokens for size in (self.model.hidden_size, self.model.ffn_size // self.tensor)
        )
        return norm + self._into("mlp.gate_up", hidden) + 3 * wide + self._into("mlp.down", wide)

    def selective(self) -> int:
        """What a layer keeps that computes all but attention again: its input, and attention with its inputs and outputs."""
        element, heads = self.element, self.model.heads // self.tensor
        queries = element * self._query_width * self.tokens
        keys = element * self._key_width * self.tokens

        def in_layer(kind: str, size: SampleSize) -> int:
            if kind == "dense" and not self.exchange:
                if self.model.attention == "gist":
                    return self._beside_gists(size)
                # q, k, v, each document's output, one log-sum per head; the joined output
                return 2 * keys + (2 if self._one_call else 3) * queries + FP32 * heads * self.tokens
            if not self.gpu:
                return 2 * keys + 2 * queries + 2 * FP32 * heads * self.tokens
            return self._kernel(size) + self._recalled(size) + (queries if self.exchange else 0)

        return self.residual() + self._mean(in_layer)

    def head_norms(self) -> int:
        """Their inputs in fp32 and the normalised queries and keys; one inverse root per head and token."""
        if not self.model.qk_norm:
            return 0
        queries, keys = self._query_width, self._key_width
        inputs = queries + keys
        if self.element == FP32:  # keys are a view of the fused projection, which attention keeps where it takes it as it is
            copied = self.gpu if self.model.attention == "gist" else self.samples > 1
            inputs = queries + (queries + 2 * keys if copied else 0)
        heads = (self.model.heads + self.model.kv_heads) // self.tensor
        return (FP32 * inputs + self.element * (queries + keys) + FP32 * heads) * self.tokens

    def attention(self) -> int:
        """From queries, keys and values to the input of the output projection."""
        element, heads = self.element, self.model.heads // self.tensor
        queries = element * self._query_width * self.tokens
        keys = element * self._key_width * self.tokens

        def in_layer(kind: str, size: SampleSize) -> int:
            if kind == "dense" and not self.exchange:
                if self.model.attention == "gist":
                    return self._beside_gists(size)
                # q, k, v (of one sample a view of the fused projection), the output, one log-sum per head; the joined output.
                values = keys if self.samples > 1 else queries + 2 * keys
                return queries + keys + values + FP32 * heads * self.tokens + queries * (1 if self._one_call else 2)
            if not self.gpu:  # the same view of the projection, maximum and sum per head; the output is computed again
                projected = queries if self.trained.keeps_input("attention.output") else 0
                return queries + keys + (queries + 2 * keys) + 2 * FP32 * heads * self.tokens + projected
            copied = self.samples > 1 or self.exchange  # else the kernel's output is the projection's input as it is
            copied = copied and self.trained.keeps_input("attention.output")
            return self._kernel(size) + self._recalled(size) + (queries if copied else 0)

        return self._mean(in_layer) + dict(self.between)["attention.output"]

    def _mean(self, in_layer: Callable[[str, SampleSize], int]) -> int:
        """Over the layers, of what those of a kind keep."""
        return round(sum(part * in_layer(kind, size) for part, kind, size in self.sample.by_kind(self.model.attention)))

    def _beside_gists(self, size: SampleSize) -> int:
        """Of a dense layer in which raw tokens go through flash attention and gists attend apart: queries, keys and values with
        the gists first; what these keep; of raw tokens (copies, of several samples) outputs and one log-sum per head; all
        outputs; and what lies where.
        """
        raw, element, heads = self.samples * size.raw // self.context, self.element, self.model.heads // self.tensor
        queries, keys = element * self._query_width, element * self._key_width
        flash = (queries + FP32 * heads) * raw + 2 * INT64 * self.tokens
        copies = (queries + 2 * keys + INT64) * raw if self.samples > 1 else 0
        if self.gpu:
            return self._kernel(size) + 2 * keys * self.tokens + flash + copies + queries * self.tokens
        apart = (queries + 2 * keys + 2 * FP32 * heads) * self.tokens
        return apart + flash + copies + queries * self.tokens

    @property
    def _one_call(self) -> bool:
        """Whether dense attention is one call for all documents, whose outputs need no joining."""
        return self.gpu and self.element < FP32

    def _kernel(self, size: SampleSize) -> int:
        """The GPU's: queries and output, keys and values in level-sorted order, and statistics."""
        near, rows = self.samples * size.near, self.samples * size.key_rows
        statistics = (2 if self.element == FP32 else 1) * FP32 * (self.model.heads // self.tensor) * near
        return self.element * (2 * self._query_width * near + 2 * self._key_width * rows) + statistics

    def _recalled(self, size: SampleSize) -> int:
        """Where tokens recall: their statistics, and the lists of what was selected; where keys come from other ranks also their
        queries and outputs, keys and values once more. Of the routing loss the gradient of gists."""
        recall, heads = size.recall, self.model.heads // self.tensor
        if recall is None:
            return 0
        kept = FP32 * self._key_width * recall.gists if recall.routed else 0
        if recall.part:
            kept += (2 if self.element == FP32 else 1) * FP32 * heads * recall.queries
            kept += self.model.kv_heads // self.tensor * recall.lists()
            if self.exchange:
                kept += 2 * self.element * (self._query_width * recall.queries + self._key_width * recall.rows)
        return round(self.samples * kept)

    def recalling(self) -> int:
        """Most that recall has at once beyond what a layer keeps: while it selects or attends, or in backward."""
        sizes = (size for _, _, size in self.sample.by_kind(self.model.attention))
        return max(max(self._selecting(size.recall), self._unfolding(size.recall)) if size.recalls else 0 for size in sizes)

    def _selecting(self, recall: Recalling) -> int:
        kv_heads = self.model.kv_heads // self.tensor
        return round(self.samples * max(recall.selecting(kv_heads), recall.spread(kv_heads)))

    def _unfolding(self, recall: Recalling) -> int:
        """Gradients of output, queries, keys and values; these also in fp32, with partial sums; and the lists turned round."""
        kv_heads, heads = self.model.kv_heads // self.tensor, self.model.heads // self.tensor
        tokens = self.tokens / self.samples
        gradients = 2 * self.element * (self._query_width + self._key_width) * tokens + FP32 * heads * recall.queries
        keys = 2 * FP32 * (self._key_width * recall.rows + self.model.head_dim * recall.parts(kv_heads))
        return round(self.samples * (gradients + keys + recall.turning(kv_heads)))

    def shared(self) -> int:
        """Token ids and rotary factors; where rows of gists are apart, which token has which of them."""
        rows = (1 + self.element) * self.trained.rows + 1 if self.trained.rows else 0
        return (INT64 + FP32 * self.model.head_dim + rows) * self.tokens

    def layout(self) -> int:
        """Labels, levels, documents, positions, intervals and what lies behind gists: every rank has them for whole samples."""
        trees = [size.recall.tree for _, _, size in self.sample.by_kind(self.model.attention) if size.recall]
        return self.samples * (self.sample.length * (6 * INT64 + 2 * FP32 * self.sample.segments) + max(trees, default=0))

    def loss(self) -> int:
        """Gradients of the final hidden state's rows with a target and of the head's weight, and where the rows come from."""
        return self.element * self._head * self.trained.head + (self.element * self.model.hidden_size + INT64) * self.targets

    def logits(self, distilled: bool = False) -> int:
        """A chunk's logits in fp32, their gradient in the compute precision, and the head's gradient in fp32 while it is summed.

        distilled: the teacher's logits, and their difference, too.
        """
        copies = (3 if distilled else 1) * FP32 + (self.element if self.element < FP32 else 0)
        summed = (FP32 + self.element) * self._head if self.element < FP32 and self.trained.head else 0
        if self.trained.rows:  # the whole matrix once more, with the rows in their places
            summed += self.element * self._head
        return copies * min(CHUNK, self.targets) * (self.model.padded_vocab_size // self.tensor) + summed

    def loss_peak(self, distilled: bool = False) -> int:
        """The final norm's, and on top of it the loss's or, once that has gone, the norm's own in backward."""
        return self.norm() + max(self.loss() + self.logits(distilled), self.norm_backward())

    @property
    def _head(self) -> int:
        """Elements of this rank's rows of the output head."""
        return self.model.padded_vocab_size // self.tensor * self.model.hidden_size

    def working(self) -> int:
        """What a layer has at most in backward beyond what it keeps: the stream's gradient, and, of its feed-forward layer,
        gradients of silu(gate) and of up (or what a tile has); or, once that has gone, what its norm has."""
        feed_forward = self.tile() if self.tiles > 1 else 2 * self.element * (self.model.ffn_size // self.tensor) * self.tokens
        attention = self.recalling() - self.feed_forward()  # whose part of what is kept has gone by then
        norm = self.norm_backward() - (self.feed_forward() - self.norm("mlp_norm"))
        return self.residual() + max(feed_forward, norm, attention)

    def norm_backward(self) -> int:
        """What a norm has in backward beyond what it keeps: three copies of the stream in fp32, and where it computes in 16 bits
        its gradient in both."""
        narrow = FP32 + self.element if self.element < FP32 else 0
        return (3 * FP32 + narrow) * self.model.hidden_size * self.residual_tokens

    def tile(self) -> int:
        """Of the tiled feed-forward layer in backward. One tile's gate and up, silu(gate), gradients of product, silu(gate) and
        up, its input (gathered under sequence parallelism) and output; gradients of the whole input, and of the weights, in
        fp32 as they are summed, beside one tile's."""
        hidden, wide = self.model.hidden_size, self.model.ffn_size // self.tensor
        tokens = -(-self.residual_tokens // self.tiles) * (self.tokens // self.residual_tokens)
        learning = sum(n for name, n in (("gate_up", 2), ("down", 1)) if f"mlp.{name}.weight" in self.trained.names)
        sums = (FP32 + self.element) * learning * hidden * wide
        return self.element * tokens * (6 * wide + 2 * hidden) + self.residual() + sums


def element_size(config: RunConfig) -> int:
    """Bytes per element of the compute precision."""
    return 2 if config.precision == "bf16" else FP32
