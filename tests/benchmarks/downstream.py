"""An export in the hands of others: lm-evaluation-harness on a local task, dense and with gists, and llama.cpp by way of GGUF.

    pip install --target SITE --no-deps lm-eval==0.4.13 evaluate pytablewriter dataproperty mbstrdecoder pathvalidate tabledata \\
        tcolorpy typepy rouge-score nltk absl-py sacrebleu portalocker tabulate colorama lxml scikit-learn scipy joblib \\
        threadpoolctl sqlitedict dill word2number more_itertools chardet xllamacpp==2026.10.11549
    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36 -d DIR      # its script converts
    python -m tests.benchmarks.downstream --model EXPORT --site SITE --llama-cpp DIR/llama_cpp_python-0.3.36.tar.gz --output NEW

Prints one JSON object. xllamacpp, a wheel with llama.cpp in it, runs the GGUF file. Nothing of this is in requirements.txt: the
harness would bring forty packages that nothing else needs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
from pathlib import Path

TASK = """task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
ROWS = [
    {"question": "The Congress of the United States", "choices": [" of America", " a horse", " tea"], "label": 0},
    {"question": "Fellow citizens of the Senate and of the House of", "choices": [" fish", " Representatives"], "label": 1},
    {"question": "In the year 1932 the nation had, after a long and careful", "choices": [" study", " banana"], "label": 0},
]
# What is installed for the project comes first; SITE only adds to it.
HARNESS = "import sys; sys.path.append(sys.argv.pop(1)); from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
# Likeliest next tokens of each prompt, by llama.cpp in fp32 throughout: its cache, and what flash attention multiplies, are fp16
# unless told, which moves the log-probabilities of a random model by 0.008.
RUN_GGUF = """
import json, sys
sys.path.append(sys.argv[1])
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup = sys.argv[2], 512, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server, result = xllamacpp.Server(params), []
reserved = json.loads(sys.argv[6])
for ids, text in zip(json.loads(sys.argv[3]), json.loads(sys.argv[5])):
    # Its own tokenizer adds neither a space nor a BOS, and what is reserved is never sampled where that is said.
    asked = {"prompt": text, "max_tokens": 8, "temperature": 2.0, "logprobs": 1, "logit_bias": [[i, False] for i in reserved]}
    answer = server.handle_completions(asked)
    assert answer["usage"]["prompt_tokens"] == len(ids), answer
    assert not set(reserved) & {token["id"] for token in answer["choices"][0]["logprobs"]["content"]}, answer
    asked = {"prompt": ids, "max_tokens": 1, "temperature": 0.0, "logprobs": int(sys.argv[4]), "cache_prompt": False}
    answer = server.handle_completions(asked)
    assert answer["usage"]["prompt_tokens"] == len(ids), answer
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    result.append([[token["id"], token["logprob"]] for token in found])
print(json.dumps(result))
"""
LIKELIEST = 8
GGUF = "model.gguf"
MODES = {"dense": "", "gist": ",attn_implementation=gist"}


def harness(model: Path, site: Path, output: Path, mode: str) -> list[list[float]]:
    """Log-likelihood of each choice of each row, nats, as the harness has it from a mode of MODES."""
    output.mkdir(parents=True)
    (output / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (output / "task.yaml").write_text(TASK.format(rows=output / "rows.jsonl"))
    model_args = f"pretrained={model},dtype=float32,trust_remote_code=True{MODES[mode]}"
    flags = ["--model", "hf", "--model_args", model_args, "--tasks", "local_choice", "--include_path", output, "--device", "cpu"]
    flags += ["--batch_size", "1", "--output_path", output / "results", "--log_samples"]
    done = subprocess.run([sys.executable, "-c", HARNESS, str(site), *map(str, flags)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"lm-eval ended with {done.returncode}: {done.stderr[-2000:]}")
    samples = next((output / "results").rglob("samples_local_choice_*.jsonl"))
    rows = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    return [[float(choice[0]) for choice in row["filtered_resps"]] for row in rows]


def ours(model: Path) -> list[list[float]]:
    """The same from our own dense reader of the export."""
    from unfold.pretrain.command import build_parser
    from unfold.pretrain.evaluate.answering import Reader
    from unfold.pretrain.evaluate.subject import load_subject

    line = ["evaluate", "perplexity", "--model", str(model), "--mode", "dense", "--data", "none", "--output", "none"]
    subject = load_subject(build_parser().parse_args(line))
    reader = Reader(subject, subject.variants[0])
    result = []
    for row in ROWS:
        sequence = reader.read([], subject.encode(row["question"]))
        result.append(reader.weigh(sequence, [subject.continuation(row["question"], choice) for choice in row["choices"]]))
    return result


def to_gguf(model: Path, archive: Path, output: Path) -> int:
    """Convert into GGUF of ``output`` with llama.cpp's script out of the source distribution of llama-cpp-python; returns the
    number of tensors that the file holds."""
    output.mkdir(parents=True)
    with tarfile.open(archive) as tar:
        members = [
            m
            for m in tar
            if "/vendor/llama.cpp/" in m.name and ("/gguf-py/" in m.name or "/convert" in m.name or "/conversion/" in m.name)
        ]
        tar.extractall(output, members=members, filter="data")
    root = next(output.glob("*/vendor/llama.cpp"))
    file = output / GGUF
    command = [sys.executable, root / "convert_hf_to_gguf.py", model, "--outfile", file, "--outtype", "f32"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"convert_hf_to_gguf.py ended with {done.returncode}: {done.stderr[-2000:]}")
    count = (
        "import sys; sys.path.insert(0, sys.argv[1]); from gguf import GGUFReader; print(len(GGUFReader(sys.argv[2]).tensors))"
    )
    counted = subprocess.run(
        [sys.executable, "-c", count, str(root / "gguf-py"), str(file)], capture_output=True, text=True, check=True
    )
    return int(counted.stdout)


def gguf_difference(model: Path, file: Path, site: Path) -> float:
    """Largest difference of log-probabilities, nats: the likeliest next tokens of each row by llama.cpp, and the same tokens by
    transformers on the export that the file was made of, dense."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [tokenizer.encode(row["question"]) for row in ROWS]
    command = [sys.executable, "-c", RUN_GGUF, site, file, json.dumps(prompts), LIKELIEST]
    reserved = json.loads((model / "generation_config.json").read_text()).get("suppress_tokens", [])
    command += [json.dumps([row["question"] for row in ROWS]), json.dumps(reserved)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"llama.cpp ended with {done.returncode}: {done.stderr[-2000:]}")
    theirs = json.loads(done.stdout.splitlines()[-1])
    reference, largest = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), 0.0
    for ids, found in zip(prompts, theirs, strict=True):
        assert len(found) == LIKELIEST, found
        with torch.no_grad():
            ours = reference(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        largest = max(largest, *(abs(float(ours[token]) - value) for token, value in found))
    return largest


def difference(a: list[list[float]], b: list[list[float]]) -> float:
    """Largest difference of two lists of log-likelihoods."""
    return max(abs(x - y) for row, other in zip(a, b, strict=True) for x, y in zip(row, other, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, metavar="EXPORT", help="made by python -m pretrain export")
    parser.add_argument("--site", type=Path, metavar="SITE", help="directory with lm-eval and what it needs")
    parser.add_argument("--llama-cpp", type=Path, metavar="FILE", help="source distribution of llama-cpp-python")
    parser.add_argument("--output", type=Path, required=True, metavar="NEW_DIR")
    args = parser.parse_args()
    result: dict = {"model": str(args.model)}
    if args.site:
        likelihoods = {mode: harness(args.model, args.site, args.output / mode, mode) for mode in MODES}
        result |= {"harness": likelihoods, "dense_difference_from_ours": difference(likelihoods["dense"], ours(args.model))}
    if args.llama_cpp:
        result["gguf_tensors"] = to_gguf(args.model, args.llama_cpp, args.output / "gguf")
    if args.llama_cpp and args.site:
        result["gguf_difference"] = gguf_difference(args.model, args.output / "gguf" / GGUF, args.site)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
