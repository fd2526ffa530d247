"""Hugging Face fast tokenizers (tokenizer.json) behind the `Tokenizer` interface."""

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import tokenizers

from unfold.data_prep.errors import DataError
from unfold.data_prep.format.tokenizer import CONFIG_FILE, ControlToken, TokenizerInfo, find_gists, find_links, read_json, sha256
from unfold.data_prep.tokenization.word_starts import huggingface_word_starts

# Tried in this order where no tokenizer_config.json says which tokens these are.
USUAL_NAMES = {
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>"),
    "eos_token": ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>"),
    "pad_token": ("<pad>", "[PAD]", "<|padding|>"),
}
NEVER = -1e6  # a unigram score that loses against any other way to write the same text


class HuggingFaceTokenizer:
    """A tokenizer.json, used so that only its model's own pieces come out of a text.

    What the file may hold besides is switched off in memory: truncation, padding, dropout, and every way by which a
    literal control token in a text would become the control id.
    """

    def __init__(self, raw: bytes, roles: dict[str, str], name: str):
        """Load from the bytes of a tokenizer.json.

        Args:
            roles: 'bos_token', 'eos_token', 'pad_token' -> the token, where known.
            name: stands for the file in errors.

        Raises:
            DataError: not a tokenizer.json, or a role names a token that it does not have.
        """
        self._raw = raw
        spec, self._inner = parse_tokenizer(raw, name)
        vocab = self._inner.get_vocab(with_added_tokens=True)
        added = spec.get("added_tokens", [])
        if wrong := next((t for t in added if vocab.get(t["content"]) != t["id"]), None):
            raise DataError(
                f"{name}: its added token {wrong['content']!r} has id {wrong['id']}, but the tokenizers library gives it "
                f"{vocab.get(wrong['content'])}, the first free one; name the ids between as added tokens, too"
            )
        special = {t["content"]: t["id"] for t in added if t["special"]}
        for role, token in roles.items():
            if token not in vocab:
                raise DataError(
                    f"{name}: {role} {token!r} is not in its vocabulary; correct {CONFIG_FILE} beside it, "
                    f"or name the token by --{role.replace('_', '-')}"
                )
        named = {role: roles.get(role, next((n for n in names if n in special), None)) for role, names in USUAL_NAMES.items()}
        self.roles = {role: token for role, token in named.items() if token is not None}
        control = special | {token: vocab[token] for token in self.roles.values()}
        strips = {t["content"]: (t.get("lstrip", False), t.get("rstrip", False)) for t in added}
        self.control = {token: ControlToken(i, *strips.get(token, ())) for token, i in control.items()}
        gists = find_gists(special)
        self.info = TokenizerInfo(
            kind="huggingface",
            vocab_size=max(vocab.values()) + 1,
            gist_ids=tuple(special[g] for g in gists),
            link_ids=tuple(special[n] for n in find_links(special)),
            gist_tokens=tuple(gists),
            bos_id=vocab.get(named["bos_token"]),
            eos_id=vocab.get(named["eos_token"]),
            pad_id=vocab.get(named["pad_token"]),
            hash=sha256(raw),
        )
        self.unk_token = _unk_token(spec["model"])
        self._vocab = vocab
        self._inner = tokenizers.Tokenizer.from_str(json.dumps(_disarmed(spec, control)))
        self._inner.encode_special_tokens = True  # a literal special token in a text is text
        self._forbidden = np.zeros(self.info.vocab_size, dtype=bool)
        self._forbidden[[i for token, i in control.items() if token != self.unk_token]] = True

    @classmethod
    def from_file(cls, path: Path, roles: dict[str, str] | None = None) -> "HuggingFaceTokenizer":
        """Load a tokenizer.json; `roles` go before what the tokenizer_config.json beside it says."""
        return cls(path.read_bytes(), configured_roles(path.parent) | (roles or {}), str(path))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 [n_i]; see `encode_flat`."""
        ids, lengths = self.encode_flat(texts)
        return np.split(ids, np.cumsum(lengths)[:-1]) if len(texts) else []

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts, int32 [sum of lengths], and their lengths, int64 [texts].

        Raises:
            DataError: a character for which it has no token, or a control id came out all the same (a model that can spell it
                from ordinary pieces).
        """
        try:
            encoded = [e.ids for e in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]
        except Exception as e:  # tokenizers raises bare Exception
            raise DataError(f"the tokenizer cannot encode it ({str(e).splitlines()[0]}); give it an unknown token") from None
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        ids = np.fromiter(chain.from_iterable(encoded), np.int32, int(lengths.sum()))
        self.refuse_control(ids)
        return ids, lengths

    def refuse_control(self, ids: np.ndarray) -> None:
        """Raise DataError if a control id is among ids that came from a text."""
        found = self._forbidden[ids]
        if found.any():
            token = self._inner.id_to_token(int(ids[found][0]))
            raise DataError(f"the tokenizer turns the literal text {token!r} into a control id; remove it from the text")

    def plain_json(self) -> str:
        """The tokenizer.json that is in use: nothing in it alters a text or makes control ids of it."""
        return self._inner.to_str()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control ids stand for nothing."""
        return self._inner.decode([int(i) for i in ids if not self._forbidden[i]], skip_special_tokens=False)

    def word_starts(self) -> np.ndarray:
        """The word-start bitmap, bool [vocab_size]."""
        return huggingface_word_starts(self._raw, self._vocab)


def parse_tokenizer(raw: bytes, name: str) -> tuple[dict, tokenizers.Tokenizer]:
    """Parse the bytes of a tokenizer.json: its JSON, and the tokenizer.

    Raises:
        DataError: it is none.
    """
    try:
        return json.loads(raw.decode("utf-8-sig")), tokenizers.Tokenizer.from_str(raw.decode("utf-8-sig"))
    except Exception as e:  # tokenizers raises bare Exception
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise DataError(f"{name}: not a Hugging Face tokenizer.json: {reason}") from None


def configured_roles(directory: Path) -> dict[str, str]:
    """What a directory's tokenizer_config.json and special_tokens_map.json, if any, say of bos, eos and pad."""
    roles: dict[str, str] = {}
    for path in (directory / "special_tokens_map.json", directory / CONFIG_FILE):
        if path.exists():
            values = read_json(path)
            for role in USUAL_NAMES:
                token = values.get(role) if isinstance(values, dict) else None
                token = token.get("content") if isinstance(token, dict) else token
                if isinstance(token, str):
                    roles[role] = token
    return roles


def _unk_token(model: dict) -> str | None:
    if model["type"] == "Unigram":
        return None if model.get("unk_id") is None else model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def _disarmed(spec: dict, control: dict[str, int]) -> dict:
    """The same tokenizer, with nothing left that alters a text or makes control ids of it."""
    model = dict(spec["model"])
    if model["type"] == "BPE":
        model["dropout"] = None
        pairs = ((merge, merge if isinstance(merge, list) else merge.split(" ")) for merge in model["merges"])
        model["merges"] = [merge for merge, pair in pairs if "".join(pair) not in control]
    if model["type"] == "Unigram":
        unk = _unk_token(model)
        model["vocab"] = [[p, NEVER if p in control and p != unk else score] for p, score in model["vocab"]]
    added = [{**t, "special": t["special"] or t["content"] in control} for t in spec.get("added_tokens", [])]
    return {**spec, "model": model, "added_tokens": added, "truncation": None, "padding": None}
