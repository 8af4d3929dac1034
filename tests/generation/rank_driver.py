"""What test_ranks.py runs on every rank: ``python rank_driver.py SCENARIO OUTPUT CHECKPOINT...``.

Each rank writes what it found to ``OUTPUT/RANK.json``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from weightkit.errors import WeightkitError
from weightkit.generation import Runtime
from weightkit.generation.ranks import open_on_ranks
from weightkit.layouts import open_checkpoint

PROMPTS = [[3, 4, 5, 6], [7, 8, 9, 10, 11, 12, 13]]
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "seed": 5}


def answers(runtime: Runtime) -> dict[str, object]:
    """Greedy tokens of one prompt and of two together, drawn ones, and what was read for them."""
    one = runtime.generate(PROMPTS[0], max_new_tokens=5)
    together = runtime.generate_many(PROMPTS, max_new_tokens=5)
    drawn = runtime.generate(PROMPTS[1], max_new_tokens=5, **SAMPLED)
    return {
        "one": list(one.token_ids),
        "together": [list(result.token_ids) for result in together],
        "drawn": list(drawn.token_ids),
        "read": runtime.weights.bytes_read,
        "read_by_all": drawn.bytes_read,
        "files": sorted(Path(path).name for path in runtime.weights._loader.reader._files),
    }


def generate(output: Path, checkpoints: list[Path]) -> None:
    """Answers of all checkpoints, and of the first two once more with little memory."""
    with open_on_ranks(checkpoints[0], device="cpu") as runtime:
        ranks, found = runtime.ranks, [answers(runtime)]
        for path in checkpoints[1:]:  # without meeting anew
            with Runtime(open_checkpoint(path, replicas_of=ranks.rank), device="cpu", ranks=ranks) as other:
                found.append(answers(other))
        for path in checkpoints[:2]:
            opened = open_checkpoint(path, replicas_of=ranks.rank)
            with Runtime(opened, device="cpu", ranks=ranks, memory_bytes=200_000, stream=True) as other:
                found.append(answers(other))
        (output / f"{ranks.rank}.json").write_text(json.dumps(found))


def generate_and_fail(output: Path, checkpoints: list[Path]) -> None:
    """Answers of all checkpoints. Then rank 1's file of the first changes, which it has not opened yet; rank 0 hangs in
    something that nothing ends, and the others wait."""
    with open_on_ranks(checkpoints[0], device="cpu") as runtime:
        ranks, found = runtime.ranks, []
        for path in checkpoints:
            with Runtime(open_checkpoint(path, replicas_of=ranks.rank), device="cpu", ranks=ranks) as other:
                found.append(answers(other))
        (output / f"{ranks.rank}.json").write_text(json.dumps(found))
        if ranks.rank == 0:
            time.sleep(3600)
        if ranks.rank == 1:
            os.utime(checkpoints[0] / "model1-mp4.safetensors")
        runtime.generate(PROMPTS[0])


def die(output: Path, checkpoints: list[Path]) -> None:
    """Rank 1 is killed, as by a system without memory, while rank 0 waits for it."""
    with open_on_ranks(checkpoints[0], device="cpu") as runtime:
        (output / f"{runtime.ranks.rank}.json").touch()
        if runtime.ranks.rank == 1:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        runtime.generate(PROMPTS[0])


if __name__ == "__main__":
    scenario, output, *paths = sys.argv[1:]
    try:
        {"generate": generate, "generate_and_fail": generate_and_fail, "die": die}[scenario](
            Path(output), [Path(path) for path in paths]
        )
    except WeightkitError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
