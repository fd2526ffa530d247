"""Tokenizer directories: ids, control tokens, hashes, gists, transformers."""

import json
import random
import shutil
from hashlib import sha256

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from tests.data_prep.texts import CONTROL, TEXTS, fuzz
from unfold.data_prep.corpus.sources import find_sources
from unfold.data_prep.errors import DataError
from unfold.data_prep.tokenization.adopt import import_tokenizer
from unfold.data_prep.tokenization.train import MAX_LINE, train_tokenizer, training_lines


def info_of(directory) -> dict:
    return json.loads((directory / "tokenizer_info.json").read_text())


@pytest.mark.parametrize("name", ["bpe", "unigram"])
def test_json_gives_the_ids_of_sentencepiece(name, request, speeches):
    directory = request.getfixturevalue(name)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    ours = Tokenizer.from_file(str(directory / "tokenizer.json"))
    ours.encode_special_tokens = True
    lines = [line for path in sorted(speeches.iterdir())[:3] for line in path.read_text(encoding="utf-8").split("\n")]
    texts = TEXTS + fuzz() + lines
    for text, encoding in zip(texts, ours.encode_batch(texts), strict=True):
        assert encoding.ids == theirs.encode(text), repr(text)
    assert [ours.token_to_id(theirs.id_to_piece(i)) for i in range(len(theirs))] == list(range(len(theirs)))


@pytest.mark.parametrize("name", ["bpe", "unigram"])
def test_whole_documents_too(name, request, speeches, load):
    directory = request.getfixturevalue(name)
    theirs = Tokenizer.from_file(str(directory / "tokenizer.json"))
    whole = [path.read_text(encoding="utf-8") for path in sorted(speeches.iterdir())]
    texts = [*whole, "", "\n", "\n\na", "a\n", whole[0] + "\n"]
    for text, ids in zip(texts, load(directory).encode_batch(texts), strict=True):
        assert ids.tolist() == theirs.encode(text).ids


def test_control_tokens_never_come_out_of_text(any_tokenizer, load):
    tokenizer = load(any_tokenizer)
    info = tokenizer.info
    control = {*info.gist_ids, info.bos_id, info.eos_id, info.pad_id} - {None}
    assert control
    for text, ids in zip([*TEXTS, *fuzz()], tokenizer.encode_batch([*TEXTS, *fuzz()]), strict=True):
        assert not control & set(ids.tolist()), repr(text)
    assert tokenizer.decode(tokenizer.encode_batch([CONTROL])[0]) == CONTROL


def test_text_comes_back(any_tokenizer, load):
    tokenizer = load(any_tokenizer)
    for text in TEXTS + fuzz(seed=1):
        expected = text if tokenizer.info.kind == "huggingface" else text.replace("▁", " ")  # sentencepiece's own mark
        ids = tokenizer.encode_batch([text])[0]
        assert tokenizer.decode(ids) == expected
        assert ids.dtype == np.int32 and (ids.size == 0 or ids.max() < tokenizer.info.vocab_size)


def test_info_of_a_trained_tokenizer(bpe):
    info = info_of(bpe)
    assert info["format"] == 1 and info["kind"] == "sentencepiece" and info["vocab_size"] == 1500
    assert (info["gist_tokens"], info["gist_ids"]) == (["<gist0>", "<gist1>", "<gist2>"], [4, 5, 6])
    assert (info["bos_id"], info["eos_id"], info["pad_id"]) == (1, 2, 3)
    assert info["hash"] == sha256((bpe / "tokenizer.model").read_bytes()).hexdigest()


def test_training_is_deterministic_and_leaves_no_trace_of_paths(bpe, speeches, tmp_path, monkeypatch):
    monkeypatch.chdir(speeches.parent)
    train_tokenizer(find_sources([speeches.name]), tmp_path / "again", vocab_size=1500, gist_levels=3,
                    user_symbols=("<|user|>", "a,b"))  # fmt: skip
    for path in sorted(bpe.iterdir()):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
        assert str(speeches).encode() not in path.read_bytes()


def test_long_lines_reach_the_trainer_whole_words_and_all():
    text = "one two " * 5000 + "x" * (3 * MAX_LINE) + "é" * MAX_LINE + "\n\nlast"
    lines = list(training_lines([text]))
    assert "".join(lines) == text.replace("\n", "")
    assert max(len(line.encode()) for line in lines) <= MAX_LINE
    assert all(line.startswith(" ") for line in lines[1:10])


def test_transformers_loads_the_directory(any_tokenizer, tmp_path, load):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    import_tokenizer(any_tokenizer, tmp_path / "t", gist_levels=3)
    ours = load(tmp_path / "t")
    config = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and config["clean_up_tokenization_spaces"] is False
    for theirs in (
        PreTrainedTokenizerFast.from_pretrained(tmp_path / "t"),
        AutoTokenizer.from_pretrained(tmp_path / "t"),
    ):
        assert len(theirs) == ours.info.vocab_size
        assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.info.eos_id, ours.info.pad_id)
        assert theirs.convert_tokens_to_ids(list(ours.info.gist_tokens)) == list(ours.info.gist_ids)
        plain = [t for t in TEXTS if t != CONTROL]
        for text, ids in zip(plain, ours.encode_batch(plain), strict=True):
            assert theirs.encode(text, add_special_tokens=False) == ids.tolist(), repr(text)


def test_import_of_own_directory_keeps_everything(bpe, tmp_path):
    import_tokenizer(bpe, tmp_path / "same", gist_levels=3)
    for path in bpe.iterdir():
        assert path.read_bytes() == (tmp_path / "same" / path.name).read_bytes(), path.name


def test_gists_are_appended_to_a_sentencepiece_model(bpe, tmp_path, load):
    info = import_tokenizer(bpe / "tokenizer.model", tmp_path / "more", gist_levels=5)
    assert info.vocab_size == 1502 and info.gist_ids == (4, 5, 6, 1500, 1501)
    assert info.hash == sha256((tmp_path / "more" / "tokenizer.model").read_bytes()).hexdigest() != info_of(bpe)["hash"]
    before, after = load(bpe), load(tmp_path / "more")
    texts = TEXTS + fuzz()
    for a, b in zip(before.encode_batch(texts), after.encode_batch(texts), strict=True):
        assert np.array_equal(a, b)
    assert Tokenizer.from_file(str(tmp_path / "more" / "tokenizer.json")).token_to_id("<gist4>") == 1501
    starts = np.load(tmp_path / "more" / "word_starts.npy")
    assert starts.shape == (1502,) and starts[1500:].all()


def test_links_are_appended_to_either_kind(bpe, byte_level, tmp_path, load):
    info = import_tokenizer(bpe, tmp_path / "s", gist_levels=4, links=2)
    assert (info.gist_ids, info.link_ids, info.vocab_size) == ((4, 5, 6, 1500), (1501, 1502), 1503)
    assert import_tokenizer(tmp_path / "s", tmp_path / "s3", gist_levels=4, links=3).link_ids == (1501, 1502, 1503)
    info = import_tokenizer(byte_level, tmp_path / "h", gist_levels=0, links=2)
    assert (info.gist_ids, info.link_ids) == ((), (1200, 1201)) and load(tmp_path / "h").info == info
    info = import_tokenizer(tmp_path / "h", tmp_path / "h3", gist_levels=1, links=3)
    assert (info.gist_ids, info.link_ids, info.vocab_size) == ((1202,), (1200, 1201, 1203), 1204)
    text = "a literal <link1> is text"
    for name in ("s", "h3"):
        assert not set(load(tmp_path / name).info.link_ids) & set(load(tmp_path / name).encode_batch([text])[0].tolist())


def test_a_trained_tokenizer_has_links(speeches, tmp_path, run):
    command = ("train-tokenizer", "--input", speeches, "--vocab-size", 600, "--gist-levels", 2, "--links", 5)
    status, out, err = run(*command, "--output", tmp_path / "t")
    assert status == 0 and "links: 6, 7, 8, 9, 10" in out, err
    assert info_of(tmp_path / "t")["link_ids"] == [6, 7, 8, 9, 10] and info_of(tmp_path / "t")["vocab_size"] == 600


def test_gists_are_appended_to_a_huggingface_tokenizer(byte_level, tmp_path, load):
    info = import_tokenizer(byte_level, tmp_path / "hf", gist_levels=2)
    assert info.kind == "huggingface" and info.vocab_size == 1202 and info.gist_ids == (1200, 1201)
    assert info.eos_id == 0 and info.pad_id == 1 and info.bos_id is None
    assert info.hash == sha256((tmp_path / "hf" / "tokenizer.json").read_bytes()).hexdigest()
    assert load(tmp_path / "hf").info == info
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"
    again = import_tokenizer(tmp_path / "hf", tmp_path / "hf2", gist_levels=2)
    assert again == info


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["<gist>", "<Gist>"], ["<gist>", "<Gist>", "<gist2>"]), (["<gist>"], ["<gist>", "<gist1>", "<gist2>"])],
)
@pytest.mark.parametrize("special", [True, False])
def test_gist_names_of_other_projects_are_recognised(byte_level, tmp_path, load, names, expected, special):
    tokenizer = Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    tokens = [AddedToken(n, special=special, normalized=False) for n in names]
    tokenizer.add_special_tokens(tokens) if special else tokenizer.add_tokens(tokens)
    (tmp_path / "in").mkdir()
    tokenizer.save(str(tmp_path / "in" / "tokenizer.json"))
    info = import_tokenizer(tmp_path / "in", tmp_path / "out", gist_levels=3)
    assert list(info.gist_tokens) == expected and info.gist_ids == (1200, 1201, 1202) and info.vocab_size == 1203
    out = load(tmp_path / "out")
    assert not set(info.gist_ids) & set(out.encode_batch(["".join(expected)])[0].tolist())


def test_bare_files_count_like_imports_without_new_gists(bpe, byte_level, tmp_path, load):
    for i, file in enumerate((bpe / "tokenizer.model", byte_level / "tokenizer.json")):
        lonely = tmp_path / str(i)
        lonely.mkdir()
        shutil.copy(file, lonely)
        bare = load(lonely / file.name).info
        assert bare == load(lonely).info == import_tokenizer(lonely / file.name, lonely / "out", gist_levels=0)
        assert bare.hash == sha256(file.read_bytes()).hexdigest()


def test_a_file_inside_a_directory_stands_for_the_directory(bpe, load):
    assert load(bpe / "tokenizer.json").info == load(bpe / "tokenizer.model").info == load(bpe).info


def test_unigram_with_special_pieces_in_its_model(tmp_path, load):
    """T5-like files have `</s>` in the model itself, where a plain search would find it in a text."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -5.0) for c in "▁abs</>")]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load(tmp_path)
    assert loaded.info.eos_id == 1
    assert 1 not in loaded.encode_batch(["a</s>b"])[0]


def test_an_end_of_document_token_that_is_not_marked_as_special(byte_level, tmp_path, load):
    spec = json.loads((byte_level / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    shutil.copy(byte_level / "tokenizer_config.json", tmp_path)
    tokenizer = load(tmp_path)
    assert tokenizer.info.eos_id == 0
    assert 0 not in tokenizer.encode_batch(["a<|endoftext|>b"])[0]


def test_a_model_that_spells_a_control_token_is_caught(tmp_path, load):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="</s>"):
        load(tmp_path).encode_batch(["a </s> a"])
    assert load(tmp_path).encode_batch(["a b"])[0].tolist() == [0, 2]


def test_dropout_is_off(byte_level, tmp_path, load):
    spec = json.loads((byte_level / "tokenizer.json").read_text())
    spec["model"]["dropout"] = 0.9
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    texts = ["of the people, by the people, for the people"]
    assert np.array_equal(load(tmp_path).encode_batch(texts)[0], load(byte_level).encode_batch(texts)[0])


def altered(bpe, path, change) -> None:
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((bpe / "tokenizer.model").read_bytes())
    change(model)
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda m: setattr(m.normalizer_spec, "remove_extra_whitespaces", True), "remove_extra_whitespaces"),
        (lambda m: setattr(m.normalizer_spec, "precompiled_charsmap", b"x"), "normalization rule is broken"),
        (lambda m: setattr(m.trainer_spec, "model_type", 4), "model type"),
        (lambda m: setattr(m.pieces[900], "piece", "<gist3>"), "<gist3>"),
    ],
)
def test_models_that_cannot_be_converted_are_refused(bpe, tmp_path, fails, change, word):
    altered(bpe, tmp_path / "odd.model", change)
    fails("import-tokenizer", "--input", tmp_path / "odd.model", "--output", tmp_path / "out", words=("odd.model", word))
    assert not (tmp_path / "out").exists()


def test_normalising_models_are_refused(speeches, tmp_path, fails):
    spm = sentencepiece.SentencePieceTrainer
    spm.train(input=str(next(speeches.iterdir())), model_prefix=str(tmp_path / "m"), vocab_size=300, minloglevel=2)
    words = ("m.model", "nmt_nfkc", "remove_extra_whitespaces")
    fails("import-tokenizer", "--input", tmp_path / "m.model", "--output", tmp_path / "out", words=words)


def shuffle_scores(model) -> None:
    """Merges in another order than that of the pieces."""
    normal = [p for p in model.pieces if p.type == model.SentencePiece.NORMAL]
    scores = [p.score for p in normal]
    random.Random(0).shuffle(scores)
    for piece, score in zip(normal, scores, strict=True):
        piece.score = score


def assert_conversion_agrees(directory, texts) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    ours = Tokenizer.from_file(str(directory / "tokenizer.json"))
    ours.encode_special_tokens = True
    for text in texts:
        assert ours.encode(text).ids == theirs.encode(text), repr(text)


def test_merges_follow_scores_not_ids(bpe, tmp_path):
    altered(bpe, tmp_path / "m.model", shuffle_scores)
    import_tokenizer(tmp_path / "m.model", tmp_path / "out")
    assert_conversion_agrees(tmp_path / "out", TEXTS + fuzz())


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_models_without_bytes_are_converted(speeches, tmp_path, model_type):
    sentencepiece.SentencePieceTrainer.train(
        input=str(sorted(speeches.iterdir())[-1]), model_prefix=str(tmp_path / "m"), vocab_size=400, minloglevel=2,
        model_type=model_type, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, required_chars="</>gist0123upadnkxA")  # fmt: skip
    import_tokenizer(tmp_path / "m.model", tmp_path / "out")
    # Equal sums of scores, which fuzz provokes, fall by rounding: compare real lines.
    lines = [line for path in speeches.iterdir() for line in path.read_text(encoding="utf-8").split("\n")]
    assert_conversion_agrees(tmp_path / "out", TEXTS + lines)


def test_dummy_prefix_is_converted(speeches, tmp_path, load):
    train_tokenizer(find_sources([str(speeches)]), tmp_path / "plain", vocab_size=700, gist_levels=0)
    altered(tmp_path / "plain", tmp_path / "m.model", lambda m: setattr(m.normalizer_spec, "add_dummy_prefix", True))
    import_tokenizer(tmp_path / "m.model", tmp_path / "out", gist_levels=2)
    ours = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    ours.encode_special_tokens = True
    for text in TEXTS + fuzz():
        assert ours.encode(text).ids == load(tmp_path / "out").encode_batch([text])[0].tolist(), repr(text)


def test_a_directory_whose_files_disagree_is_refused(bpe, unigram, tmp_path, fails):
    shutil.copytree(bpe, tmp_path / "mixed")
    shutil.copy(unigram / "tokenizer.model", tmp_path / "mixed")
    fails("inspect", "x", "--tokenizer", tmp_path / "mixed", words=("mixed", "hash"))
    (tmp_path / "mixed" / "tokenizer.model").unlink()
    fails("inspect", "x", "--tokenizer", tmp_path / "mixed", words=("tokenizer.model", "no such file"))


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (("--vocab-size", 100), 1, ("--vocab-size 100", "too small")),
        (("--vocab-size", 300), 1, ("--vocab-size 300", "characters")),
        (("--vocab-size", 500000), 1, ("--vocab-size 500000", "at most")),
        (("--vocab-size", 0), 2, ("--vocab-size", "at least 1")),
        (("--vocab-size", "many"), 2, ("--vocab-size", "many")),
        (("--vocab-size", 700, "--user-symbols", "a b"), 1, ("'a b'", "whitespace")),
        (("--vocab-size", 700, "--user-symbols", "<gist0>"), 1, ("'<gist0>'",)),
        (("--vocab-size", 700, "--links", 2, "--user-symbols", "<link2>"), 1, ("'<link2>'",)),
        (("--vocab-size", 700, "--links", -1), 2, ("--links", "at least 0")),
        (("--vocab-size", 700, "--gist-levels", -1), 2, ("--gist-levels", "at least 0")),
        (("--vocab-size", 700, "--character-coverage", 0.5), 2, ("--character-coverage", "0.98")),
    ],
)
def test_training_refuses_in_one_line(speeches, tmp_path, fails, options, status, words):
    fails("train-tokenizer", "--input", speeches, "--output", tmp_path / "t", *options, status=status, words=words)
    assert list(tmp_path.iterdir()) == []


def test_training_on_nothing(tmp_path, fails):
    (tmp_path / "empty.txt").write_text("\n\n")
    command = ("train-tokenizer", "--input", tmp_path / "empty.txt", "--vocab-size", 500)
    fails(*command, "--output", tmp_path / "t", words=("no text",))


def test_existing_directories_are_not_touched(bpe, tmp_path, fails, run):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    command = ("import-tokenizer", "--input", bpe, "--output", tmp_path / "full")
    fails(*command, words=("full", "exists already"))
    fails(*command, "--overwrite", words=("not a tokenizer directory",))
    assert (tmp_path / "full" / "thesis.tex").exists()
    assert run("import-tokenizer", "--input", bpe, "--output", tmp_path / "t")[0] == 0
    fails("import-tokenizer", "--input", bpe, "--output", tmp_path / "t", words=("--overwrite",))
    assert run("import-tokenizer", "--input", bpe, "--output", tmp_path / "t", "--overwrite")[0] == 0
    fails("import-tokenizer", "--input", bpe, "--output", tmp_path / "t" / "tokenizer.json", words=("not a directory",))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe rubbish", b'{"model": 3}'])
def test_rubbish_is_no_tokenizer(tmp_path, fails, name, content):
    (tmp_path / name).write_bytes(content)
    fails("import-tokenizer", "--input", tmp_path / name, "--output", tmp_path / "t", words=(name, "not a"))


def test_roles_by_name(byte_level, tmp_path, fails):
    shutil.copy(byte_level / "tokenizer.json", tmp_path)
    info = import_tokenizer(tmp_path / "tokenizer.json", tmp_path / "a", roles={"bos_token": "<|pad|>"}, gist_levels=1)
    assert (info.bos_id, info.eos_id, info.pad_id) == (1, 0, None)
    command = ("import-tokenizer", "--input", tmp_path / "tokenizer.json", "--output", tmp_path / "b")
    fails(*command, "--eos-token", "<nope>", words=("eos_token '<nope>'",))
