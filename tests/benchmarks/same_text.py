"""The same text? DeepSeek's generate.py on our rank file and on convert.py's, and ``weightkit generate``.

    python tests/benchmarks/same_text.py --work /data/work --peers PEERS/inference

Needs a CUDA device. A random checkpoint of full width (1.5 GB) is sharded for one rank by us and by convert.py;
generate.py says 16 greedy tokens for each of two prompts on either, and ``weightkit generate --dequantize`` on the FP8
checkpoint and on the rank file. Exit 1 unless all are the same. Without ``--dequantize`` sums are taken in another
order, and random weights have close logits: that text is shown, and may part from the others. generate.py is run from
a copy in which ``apply_chat_template`` gets ``return_dict=False``, without which it fails on transformers 5.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from measured import ENVIRONMENT

HERE = Path(__file__).resolve().parent
#: How generate.py prints an answer; a random one may hold line breaks.
COMPLETION = re.compile(r"^Completion: (.*?)\s*(?=^Prompt: |\Z)", re.DOTALL | re.MULTILINE)
PROMPTS = ("How many bytes has a BF16 value?", "Was ist ein Tensor?")
EXPERTS = "16"
TOKENS = ("--max-new-tokens", "16")
KERNELS = "weightkit generate, products with FP8 weights as stored"


def run(*command: str | Path) -> str:
    """What a Python program prints. Exits with the end of its errors where it fails."""
    line = [sys.executable, *map(str, command)]
    done = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=180)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(line)}: exit {done.returncode}\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def generate_py(scripts: Path, ranks: Path, config: Path, prompts: Path) -> list[str]:
    options = ("--ckpt-path", ranks, "--config", config, "--input-file", prompts, "--temperature", "0")
    return COMPLETION.findall(run(scripts / "generate.py", *options, *TOKENS))


def patched(peers: Path, scripts: Path) -> None:
    shutil.copytree(peers, scripts)
    path = scripts / "generate.py"
    wanted = "add_generation_prompt=True, return_dict=False)"
    path.write_text(path.read_text().replace("add_generation_prompt=True)", wanted))


def answers(work: Path, peers: Path) -> dict[str, list[str]]:
    """Who answered, and what to each prompt."""
    source, mine, theirs, scripts, prompts = (work / name for name in ("fp8", "ours", "convert", "demo", "prompts.txt"))
    run(HERE / "full_width.py", "--dir", source, "--experts", EXPERTS, "--vocab", "264", "--shard-gb", "0.5")
    run("-m", "weightkit", "shard", source, mine, "--mp", "1", "--quiet")
    convert = ("--hf-ckpt-path", source, "--save-path", theirs, "--n-experts", EXPERTS, "--model-parallel", "1")
    run(peers / "convert.py", *convert)
    patched(peers, scripts)
    prompts.write_text("\n".join(PROMPTS) + "\n")
    config = mine / "demo_config.json"
    found = {f"generate.py on {ranks.name}": generate_py(scripts, ranks, config, prompts) for ranks in (theirs, mine)}
    for folder in (source, mine):
        found[f"weightkit generate --dequantize on {folder.name}"] = generate(folder, "--dequantize")
    found[KERNELS] = generate(source)
    return found


def generate(folder: Path, *options: str) -> list[str]:
    command = ("-m", "weightkit", "generate", folder, *TOKENS, *options, "--quiet", "--prompt")
    return [run(*command, prompt).strip() for prompt in PROMPTS]


def main() -> None:
    parser = argparse.ArgumentParser(description="Hold generate.py's text against ours.")
    parser.add_argument("--work", type=Path, required=True, help="a folder inside is used, 5 GB")
    parser.add_argument("--peers", type=Path, required=True, help="DeepSeek's inference folder")
    args = parser.parse_args()
    work = args.work / "same_text"
    work.mkdir(parents=True)
    try:
        found = answers(work, args.peers)
    finally:
        shutil.rmtree(work)
    for who, texts in found.items():
        print(f"{who}: {texts!a}")
    del found[KERNELS]
    first = next(iter(found.values()))
    same = len(first) == len(PROMPTS) and all(texts == first for texts in found.values())
    print("the same text" if same else "DIFFERENT text")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
