"""Documents read once and joined: what a suffix computes equals reading all in place, by dense masks stated pair by pair."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from tests.model import bundles
from tests.model.decoding import GISTS, STARTS, VOCAB, text
from unfold.model.config import GistConfig, ModelConfig, RopeScaling
from unfold.model.decode import generation
from unfold.model.decode.generation import Decoder, Sampling
from unfold.model.decode.parts import identity_of
from unfold.model.gist import Bundle, Recall, Role, build_layout, interleave
from unfold.model.gist.parts import Identity, Part
from unfold.model.layers import Rotary
from unfold.model.transformer import Transformer

LINKS = (45, 46, 47, 48, 49)  # ids that text() may give too: what stands for a link is said by its place
YARN = RopeScaling("yarn", factor=4.0, original_max_position=64)
ROTARY = {
    "default": {},
    "linear": {"rope_scaling": RopeScaling("linear", factor=4.0)},
    "llama3": {"rope_scaling": RopeScaling("llama3", factor=8.0, original_max_position=64)},
    "yarn": {"rope_scaling": YARN},
    "yarn with a factor": {"rope_scaling": dataclasses.replace(YARN, attention_factor=1.7)},
    "no positions in some layers": {"nope_layers": (1,)},
    "normed heads": {"qk_norm": True},
    "biases": {"qkv_bias": True},
}
# Raw tokens of each document: one token, shorter than the sinks, 1 to 3 chunks, closed at every level at its end.
DOCUMENTS = {
    "several": (30, 1, 17, 2, 7),
    "shorter than the sinks": (1, 2, 3),
    "alone": (25,),
    "one token": (1,),
    "none": (),
}


def make(build, gist: GistConfig, links: int = 2, dtype=torch.float64, **kwargs) -> Decoder:
    config = ModelConfig(VOCAB, hidden_size=32, layers=3, heads=4, kv_heads=2, ffn_size=48, init_std=0.2, **kwargs)
    model = Transformer(config, build).to(dtype).eval()
    return Decoder(model, gist, GISTS, STARTS, link_ids=LINKS[:links])


def documents(lengths) -> list[list[int]]:
    return [text(length, 100 + number) for number, length in enumerate(lengths)]


def in_place(decoder: Decoder, prefix, texts, suffix) -> torch.Tensor:
    """[suffix, vocab] logits of reading all of it in one pass."""
    gist = decoder.gist
    rows = bundles.bundle(prefix, texts, decoder.link_ids, suffix, STARTS, gist, GISTS)
    mask = bundles.visible(rows, gist)
    later = bundles.unfolded(rows, mask) if gist.recall != "none" else None
    return bundles.logits(decoder.model, rows, mask, later, gist.recall_from)[-len(suffix) :]


def by_parts(decoder: Decoder, prefix, parts, suffix) -> torch.Tensor:
    """The same of parts that were read before; the suffix token by token."""
    sequence, out = decoder.join(parts, prefix), []
    for token in suffix:
        decoder.read_suffix(sequence, [token])
        out.append(sequence.logits)
    at_once = decoder.join(parts, prefix)
    decoder.read_suffix(at_once, suffix)
    assert (at_once.logits - out[-1]).abs().max() < (1e-10 if out[-1].dtype == torch.float64 else 1e-5)
    assert at_once.ids == sequence.ids and at_once.level == sequence.level
    return torch.stack(out)


@pytest.mark.parametrize("kind", ROTARY)
def test_turned_keys_are_those_computed_in_place(kind):
    config = ModelConfig(VOCAB, hidden_size=64, heads=4, kv_heads=2, max_position=10**6, **ROTARY[kind])
    here, offset = torch.tensor([0, 1, 5, 900, 901]), torch.tensor([0, 7, 120, 3000, 64_123])
    for dtype, bound in ((torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-6)):
        keys = torch.randn(2, 5, config.head_dim, dtype=torch.float64).to(dtype)
        factors = lambda position: Rotary.of(position[None], config, dtype)  # noqa: B023
        at = lambda position: factors(position).apply(keys.transpose(0, 1)[None])[0].transpose(0, 1)  # noqa: B023
        turned = Rotary.turning(here, here + offset, config, dtype).apply(at(here))
        assert (turned - at(here + offset)).abs().max() <= bound * float(keys.abs().max())


@pytest.mark.parametrize("kind", ROTARY)
def test_every_rotary_kind(build, kind):
    """In fp32 and fp64; where the suffix recalls, everything is unfolded."""
    texts, prefix, suffix = documents(DOCUMENTS["several"]), text(5, 7), text(9, 8)
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        decoder = make(build, GistConfig((4, 2), topk=10**6), dtype=dtype, **ROTARY[kind])
        parts = [decoder.read_part(tokens) for tokens in texts]
        for reader in (decoder, recalling(decoder)):
            error = by_parts(reader, prefix, parts, suffix) - in_place(reader, prefix, texts, suffix)
            assert error.abs().max() < bound


def recalling(decoder: Decoder, links: int = 2) -> Decoder:
    """The same where suffixes recall; parts are the same."""
    gist = dataclasses.replace(decoder.gist, recall="suffix")
    return Decoder(decoder.model, gist, GISTS, STARTS, link_ids=LINKS[:links])


@pytest.mark.parametrize("sizes,sink,n_prev", [((4,), 3, 1), ((4, 2), 3, 1), ((3, 2, 2), 2, 0), ((4, 2), 0, 2)])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_shape(build, name, sizes, sink, n_prev):
    decoder, texts = make(build, GistConfig(sizes, sink=sink, n_prev=n_prev, topk=10**6)), documents(DOCUMENTS[name])
    parts, suffix = [decoder.read_part(tokens) for tokens in texts], text(6, 8)
    for prefix, links, recall in ((0, 0, True), (4, 0, False), (0, 5, True), (11, 1, True), (2, 3, False)):
        reader = recalling(decoder, links) if recall else decoder
        reader.link_ids = list(LINKS[:links])
        before = text(prefix, 7)
        error = by_parts(reader, before, parts, suffix) - in_place(reader, before, texts, suffix)
        assert error.abs().max() < 1e-10, (prefix, links, recall)


OTHERS = [GistConfig((4, 2), own_group=True), GistConfig((4, 2), recall="suffix", unfold_all=True, recall_from=2)]
OTHERS += [GistConfig((4, 2), word_aware=False)]


@pytest.mark.parametrize("gist", OTHERS)
def test_other_settings(build, gist):
    decoder, texts = make(build, gist), documents(DOCUMENTS["several"])
    parts = [decoder.read_part(tokens) for tokens in texts]
    error = by_parts(decoder, text(3), parts, text(6, 8)) - in_place(decoder, text(3), texts, text(6, 8))
    assert error.abs().max() < 1e-10


BUDGETS = {"adaptive": {}, "fixed": {"topk": 2}, "top-p": {"top_p": 0.6}, "by group": {"topk": 2, "share": "group"}}


RULES = [("none", "adaptive"), *((recall, budget) for recall in ("suffix", "all") for budget in BUDGETS)]
SIZES = [("several", (4,)), ("several", (4, 2)), ("several", (3, 2, 2)), ("shorter than the sinks", (4,))]


@pytest.mark.parametrize("recall,budget", RULES)
@pytest.mark.parametrize("name,sizes", SIZES)
def test_training_gives_the_logits_of_joined_parts(build, name, sizes, budget, recall):
    """A whole bundle in one forward pass; and its parts read before, the last one first, joined in their order."""
    gist = GistConfig(sizes, recall=recall, links=2, **BUDGETS[budget])
    decoder, texts = make(build, gist), documents(DOCUMENTS[name])
    prefix, suffix = text(5, 7), text(9, 8)
    raw = np.array([*prefix, *(token for tokens in texts for token in tokens), *suffix])
    bundle = Bundle(len(prefix), tuple(map(len, texts)))
    made = interleave(raw, [len(raw)], STARTS, gist, GISTS[: gist.levels], bundles=[bundle], link_ids=decoder.link_ids)
    row = lambda array: torch.from_numpy(array)[None]
    layout = build_layout(row(made.level), row(made.doc), gist, row(made.role), row(made.part))
    recalling = Recall.of(layout, gist, row(made.role == Role.SUFFIX))
    trained = decoder.model.logits(row(made.ids), layout, recalling)[0, -len(suffix) :]
    parts = {number: decoder.read_part(tokens) for number, tokens in reversed(list(enumerate(texts)))}
    joined = by_parts(decoder, prefix, [parts[number] for number in range(len(texts))], suffix)
    assert (joined - trained).abs().max() < 1e-10


def test_any_order_and_any_number_of_times(build):
    decoder, texts = make(build, GistConfig((4, 2))), documents(DOCUMENTS["several"])
    parts = [decoder.read_part(tokens) for tokens in texts]
    kept = [[rows.clone() for rows in part.rows] for part in parts]
    for order in ((4, 3, 2, 1, 0), (1, 0, 3), (2, 2, 0)):
        error = by_parts(decoder, [], [parts[i] for i in order], text(6, 8)) - in_place(
            decoder, [], [texts[i] for i in order], text(6, 8)
        )
        assert error.abs().max() < 1e-10
    assert all(torch.equal(a, b) for part, rows in zip(parts, kept) for a, b in zip(part.rows, rows)), "parts are as they were"


def test_runs_of_any_length(build, monkeypatch):
    gist = GistConfig((4, 2), recall="suffix", topk=2)
    texts, expected = documents(DOCUMENTS["several"]), None
    for run in (1, 3, 1024):
        monkeypatch.setattr(generation, "PREFILL", run)
        decoder = make(build, gist)
        sequence = decoder.join([decoder.read_part(tokens) for tokens in texts], text(5, 7))
        decoder.read_suffix(sequence, text(9, 8))
        expected = sequence.logits if expected is None else expected
        assert (sequence.logits - expected).abs().max() < 1e-10


def test_joined_and_plain_sequences_go_on_together(build):
    """Each as it does alone; a conversation goes on after the answer, and branches."""
    decoder = make(build, GistConfig((4, 2), recall="suffix", topk=2))
    parts = [decoder.read_part(tokens) for tokens in documents(DOCUMENTS["several"])]

    def start():
        first, second, third = decoder.join(parts, text(4)), decoder.join(parts[:1]), decoder.start()
        decoder.read_context(third, text(50, 3))
        for number, sequence in enumerate((first, second, third)):
            decoder.read_suffix(sequence, text(5, 20 + number))
        return [first, second, third, copy.deepcopy(first)]

    together = {}
    for number, token in decoder.stream(start(), Sampling(8)):
        together.setdefault(number, []).append(token)
    for number, sequence in enumerate(start()):
        assert [token for _, token in decoder.stream([sequence], Sampling(8))] == together[number]
    assert together[0] == together[3]
    sequences = start()
    decoder.read_suffix(sequences[0], text(3))
    decoder.read_suffix(sequences[3], text(3))
    assert torch.equal(sequences[0].logits, sequences[3].logits)


def test_joining_reads_links_alone(build):
    """In whatever order: of the tokens that pass through the model none is a document's."""
    decoder = make(build, GistConfig((4, 2), recall="suffix"))
    parts = [decoder.read_part(tokens) for tokens in documents(DOCUMENTS["several"])]
    passed = []
    decoder.model.embedding.register_forward_hook(lambda module, args, out: passed.extend(args[0].flatten().tolist()))
    for order in ((0, 1, 2, 3, 4), (4, 2, 0)):
        sequence = decoder.join([parts[i] for i in order], text(3))
        decoder.read_suffix(sequence, text(6, 8))
        assert passed == [*text(3), *decoder.link_ids * len(order), *text(6, 8)]
        passed.clear()


def test_saved_and_loaded(build, tmp_path):
    decoder = make(build, GistConfig((4, 2), recall="suffix"))
    part = decoder.read_part(text(30))
    part.save(tmp_path / "a.safetensors")
    again = Part.load(tmp_path / "a.safetensors", decoder.identity)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert all(torch.equal(a, b) for a, b in zip(again.rows, part.rows)) and again.bytes == part.bytes
    assert all(torch.equal(a, b) for a, b in zip(again.shape.ends, part.shape.ends)) and again.shape.counts == part.shape.counts
    assert (again.ids, again.identity, again.raw, len(again)) == (text(30), part.identity, 30, len(part))


def test_parts_of_others_are_refused(build, tmp_path):
    gist = GistConfig((4, 2))
    decoder = make(build, gist)
    part, path = decoder.read_part(text(30)), tmp_path / "a.safetensors"
    part.save(path)
    weights = make(build, gist)
    with torch.no_grad():
        weights.model.layers[1].mlp.down.weight[3, 5] += 1e-12
    starts = STARTS.copy()
    starts[3] ^= True
    others = {
        "model": [weights, make(build, dataclasses.replace(gist, sink=2)), make(build, gist, rope_theta=5000.0)],
        "tokenizer": [Decoder(decoder.model, gist, GISTS, starts), Decoder(decoder.model, gist, [51, 50], STARTS)],
    }
    for what, several in others.items():
        for other in several:
            with pytest.raises(ValueError, match=f"^part .*: was read by another {what} .* read its document again$"):
                Part.load(path, other.identity)
            with pytest.raises(ValueError, match=f"^part number 0: was read by another {what} "):
                other.join([part])
    # What says nothing of how a part is read does not count: who recalls after it, and how much; links; what training does.
    same = dataclasses.replace(gist, recall="suffix", topk=3, route_loss=0.5)
    assert make(build, same, links=0).identity == decoder.identity
    assert make(build, dataclasses.replace(gist, recall="all")).identity != decoder.identity


def test_bad_input_is_told_in_one_line(build, tmp_path):
    decoder = make(build, GistConfig((4, 2)), max_position=64)
    part = decoder.read_part(text(30))
    with pytest.raises(ValueError, match="^document: has no token; leave it out$"):
        decoder.read_part([])
    with pytest.raises(ValueError, match=r"^parts: 2 of them take 69 positions .* meant for 64 \(max_position\); join fewer$"):
        decoder.join([part, part], text(5))
    with pytest.raises(ValueError, match="^parts: need no grow"):
        Decoder(decoder.model, decoder.gist, GISTS, STARTS, grow=True).join([part])
    with pytest.raises(ValueError, match="^sequence: was joined of parts"):
        decoder.read_context(decoder.join([part]), text(4))
    with pytest.raises(ValueError, match="^tokens: id 60 is outside the vocabulary"):
        decoder.join([part], [VOCAB])
    dense = Decoder(decoder.model, None, GISTS, STARTS)
    for call in (lambda: dense.read_part(text(4)), lambda: dense.join([part])):
        with pytest.raises(ValueError, match="^parts: need a model with gists"):
            call()
    for content in (b"", b"x" * 100):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(ValueError, match="^part .*: cannot be read "):
            Part.load(tmp_path / "x", decoder.identity)
    with pytest.raises(ValueError, match="^part .*: cannot be read "):
        Part.load(tmp_path / "nowhere", decoder.identity)


def test_identity_tells_chunks_of_one_length():
    """Theirs is the same whatever the bitmap is. What is word-aware has the identity of parts that were kept before."""
    model, config = torch.nn.Linear(4, 4, bias=False), ModelConfig(VOCAB)
    identity = lambda starts, **how: identity_of(model, config, GistConfig((4,), **how), GISTS[:1], starts)
    exact = identity(None, word_aware=False)
    assert exact == identity(STARTS, word_aware=False) and exact.model != identity(STARTS).model
    folding = {"chunk_sizes": (4,), "sink": 3, "n_prev": 1, "own_group": False}
    words = np.packbits(STARTS).tobytes(), len(STARTS), [GISTS[0]]
    assert identity(STARTS) == Identity.of(model.named_parameters(), (dataclasses.asdict(config), folding), words)


def test_identity_sees_every_place():
    """Weights that were exchanged have the same sum."""
    model = torch.nn.Linear(4, 4, bias=False)
    identity = lambda: identity_of(model, ModelConfig(VOCAB), GistConfig((4,)), GISTS[:1], STARTS)
    before = identity()
    with torch.no_grad():
        model.weight[0], model.weight[1] = model.weight[1].clone(), model.weight[0].clone()
    assert identity().model != before.model and identity().tokenizer == before.tokenizer


@pytest.mark.parametrize("gist", [GistConfig((4, 2), recall="suffix", topk=2), GistConfig((4,), recall="all")])
def test_raw_rows_on_the_host_give_the_same(build, gist):
    decoder = make(build, gist)
    host = Decoder(decoder.model, gist, GISTS, STARTS, link_ids=decoder.link_ids, raw_cache="host")
    written = []
    for reader in (decoder, host):
        joined, plain = reader.join([reader.read_part(text(40, n)) for n in range(2)]), reader.start()
        reader.read_context(plain, text(70))
        for sequence in (joined, plain):
            reader.read_suffix(sequence, text(5))
        tokens = list(reader.stream([joined, plain], Sampling(9)))
        written.append((tokens, joined.logits, plain.logits))
    assert written[0][0] == written[1][0]
    if gist.recall == "suffix":  # a prefill fetches what is unfolded alone
        values = []
        for reader in (decoder, host):
            sequence = reader.join([reader.read_part(text(300, n)) for n in range(2)])
            before = sequence.cache.reads.values
            reader.read_suffix(sequence, text(2))
            values.append(sequence.cache.reads.values - before)
        assert 2 * values[1] < values[0]
    assert torch.equal(written[0][1], written[1][1]) and torch.equal(written[0][2], written[1][2])
    with pytest.raises(ValueError, match="raw_cache: 'host', but a dense model"):
        Decoder(decoder.model, None, GISTS, STARTS, raw_cache="host")
    with pytest.raises(ValueError, match="raw_cache: 'disk' is not one of device, host"):
        Decoder(decoder.model, gist, GISTS, STARTS, raw_cache="disk")


def test_identity_is_that_of_numbers_not_of_memory(build):
    decoder = make(build, GistConfig((4, 2)))
    again = make(build, GistConfig((4, 2)))
    assert decoder.identity == again.identity
    assert decoder.identity.of_tokens([1, 2]) == again.identity.of_tokens((1, 2)) != again.identity.of_tokens([2, 1])
    assert np.array_equal(decoder.word_starts, STARTS)
