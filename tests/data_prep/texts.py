"""Strings on which tokenizers differ, if they do."""

import json
import random

CONTROL = "<s>a</s> <unk><pad><gist0> <gist2><|endoftext|><|pad|> [MASK] <0x0A>"

TEXTS = [
    "Hello  world", " lead", "trail  ", "a\tb\nc\n\n  d\r\nx", "naïve café ﬁ ① ½ Ĝĉ", "日本語 テキスト",
    "😀👩\u200d👩 e\u0302", "1234567 3.14", "\u200bzero a\u00a0b \ufeffx", "▁x ▁▁ y▁", "nul\x00bell\x07",
    "--------- ======= ..... aaaaaaaaaa abababab", "<|user|>hi<|user|>", "a,ba,b a, b",
    "if (x) {\n\treturn;\n}\n", CONTROL, "x" * 5000, "é" * 300, "of the people, by the people",
]  # fmt: skip


def fuzz(n: int = 400, seed: int = 0) -> list[str]:
    """Strings of mixed scripts, spaces, control characters and repeats."""
    rng = random.Random(seed)
    ranges = [(32, 126), (32, 126), (0, 31), (0xA0, 0x24F), (0x370, 0x4FF), (0x4E00, 0x4E80), (0x1F600, 0x1F640)]
    words = ["the", " people", "  ", "\n", "ing", " <gist0>", "</s>", "<0x41>", "0", "--", "▁", "a,b"]

    def part() -> str:
        if rng.random() < 0.4:
            return rng.choice(words) * rng.choice((1, 1, 1, 2, 5))
        low, high = rng.choice(ranges)
        return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 6)))

    return ["".join(part() for _ in range(rng.randint(0, 25))) for _ in range(n)]


def write_jsonl(path, texts) -> None:
    """A jsonl file of texts."""
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))


def contents(prefix) -> dict[str, bytes]:
    """The bytes of a shard's three files."""
    return {s: open(f"{prefix}{s}", "rb").read() for s in (".bin", ".idx", ".json")}
