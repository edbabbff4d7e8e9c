"""A finished run's adapter, merged folder and GGUF file, pushed to a Hub on 127.0.0.1 and pulled back by id: do they agree?

    python tests/pulled_back.py runs/grpo_demo --merged runs/grpo_demo/export/merged --gguf runs/grpo_demo/export/gguf-q8_0

Every one is loaded by the library that others load it with, in a process that has nothing else: PeftModel,
AutoModelForCausalLM, llama_cpp.Llama. Greedily; in batches of 25, by llama.cpp one question after the other.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import combinations
from pathlib import Path

from hub_server import serve

from posttrain.records import Example, read_jsonl
from posttrain.runs.manifest import read_manifest

TOKEN = "hf_canaryCanaryCanaryCanaryCanary42"
REPO, BASE = "me/pulled-back", "me/its-base"
BEGIN = """
import json, sys, torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

place, name, packed, dtype, num_tokens, prompts = json.load(sys.stdin)

def say(model, tokenizer):
    tokenizer.padding_side = "left"
    for first in range(0, len(prompts), 25):
        ids = tokenizer.apply_chat_template(prompts[first:first + 25], add_generation_prompt=True, padding=True,
                                            return_dict=True, return_tensors="pt")
        made = model.generate(**ids, max_new_tokens=num_tokens, do_sample=False,
                              eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
        yield from tokenizer.batch_decode(made[:, ids["input_ids"].shape[1]:], skip_special_tokens=True)
"""
PEFT = f"""{BEGIN}
from peft import PeftConfig, PeftModel

base = PeftConfig.from_pretrained(place).base_model_name_or_path
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                         bnb_4bit_compute_dtype=torch.bfloat16)
form = {{"quantization_config": nf4}} if packed else {{}}
base = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype), **form)
print(json.dumps([*say(PeftModel.from_pretrained(base, place), AutoTokenizer.from_pretrained(place))]))
"""
MERGED = f"""{BEGIN}
folder = snapshot_download(place, allow_patterns=name + "/*") + "/" + name
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
print(json.dumps([*say(model, AutoTokenizer.from_pretrained(folder))]))
"""
LLAMA_CPP = """
import json, sys
from huggingface_hub import hf_hub_download
from llama_cpp import Llama

place, name, _, _, num_tokens, prompts = json.load(sys.stdin)
model = Llama(hf_hub_download(place, name) if place else name, n_ctx=0, verbose=False)
said = [model.create_chat_completion(prompt, max_tokens=num_tokens, temperature=0) for prompt in prompts]
print(json.dumps([one["choices"][0]["message"]["content"] for one in said]))
"""


def pulled_back(run_dir, prompts, num_tokens, merged, gguf=None, dtype="bfloat16"):
    """Push a run with its variants, then ask what a stranger gets of each. Returns its answers by name.

    `before` are those of the GGUF file that was pushed. `dtype`: in which transformers loads what it loads.
    """
    manifest = read_manifest(run_dir)
    packed, base = manifest.model["quantization"] != "none", Path(manifest.model["name_or_path"])
    file = next(gguf.glob("*.gguf")) if gguf else None
    with serve(TOKEN) as hub, tempfile.TemporaryDirectory() as home:
        hub.create(BASE, files={entry.name: entry.read_bytes() for entry in base.iterdir() if entry.is_file()})

        def started(*command, say=None):
            done = subprocess.run(
                [sys.executable, *map(str, command)],
                input=json.dumps(say),
                env=environment(hub, home),
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr[-4000:]
            return done.stdout

        variants = [folder for folder in (merged, gguf) if folder]
        started("-m", "posttrain.hub", run_dir, "--repo-id", REPO, "--public", "--base-model", BASE, "--with", *variants)

        def ask(code, place, name):
            return json.loads(started("-c", code, say=[place, str(name), packed, dtype, num_tokens, prompts]))

        said = {"adapter": ask(PEFT, REPO, ""), "merged": ask(MERGED, REPO, merged.name)}
        if file:
            said["before"] = ask(LLAMA_CPP, None, file.absolute())
            said["gguf"] = ask(LLAMA_CPP, REPO, f"{gguf.name}/{file.name}")
    return said


def environment(hub, home):
    """Nothing of the Hub but this one, and no login: what is pulled back is public."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    ours = {"HF_ENDPOINT": hub.url, "HF_HOME": home, "HF_TOKEN": TOKEN}
    return kept | ours | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def same(one, other):
    """How many answers are. Bytes that are no text are a sign in transformers, and nothing in llama.cpp."""
    return sum(a.replace("\ufffd", "") == b.replace("\ufffd", "") for a, b in zip(one, other, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--merged", type=Path, required=True)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    rows = read_jsonl(Path(read_manifest(args.run_dir).data["path"], "test.jsonl"), Example)[: args.questions]
    said = pulled_back(args.run_dir, [row.prompt for row in rows], args.max_new_tokens, args.merged, args.gguf, args.dtype)
    for one, other in combinations(said, 2):
        print(f"{one} and {other}: {same(said[one], said[other])} of {len(rows)} answers are the same")


if __name__ == "__main__":
    main()
