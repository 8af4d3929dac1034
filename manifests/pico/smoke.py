"""What a smoke test of pico may expect: ``python -m weightkit.manifests.pico.smoke`` prints the manifest's table.

Answers are those of held-out questions; the perplexity of ``passage.txt`` is measured with the network that was
trained, which knows nothing of weightkit's model. pico has never seen prose, so the figure is enormous (guessing among
its 512 tokens would give 512): it is there to be met, not to be small.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from weightkit.manifests import passage
from weightkit.manifests.pico.evaluate import SEED
from weightkit.manifests.pico.export import load
from weightkit.manifests.pico.network import causal_mask
from weightkit.manifests.pico.questions import held_out

#: Of each category and language.
QUESTIONS_A_KIND = 2
#: Above the table.
COMMENT = "Written by python -m weightkit.manifests.pico.smoke. Perplexity of passage.txt: prose, which pico never saw."


@torch.no_grad()
def passage_perplexity(folder: Path) -> float:
    """Perplexity a token of ``passage.txt`` after its first: weights cast to BF16, computed in F32 on the CPU."""
    network, tokenizer = load(folder, through_bf16=True), Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode(passage()).ids])
    logits = network.logits(network(ids, causal_mask(torch.zeros_like(ids)), torch.float32, False).hidden)
    return math.exp(F.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).item())


def manifest_entry(folder: Path) -> Mapping[str, object]:
    """The table ``[smoke]`` of pico's manifest for the checkpoint in ``folder``."""
    questions = held_out(SEED, QUESTIONS_A_KIND)
    return {
        "perplexity": round(passage_perplexity(folder), 1),
        "answers": [[question.prompt, question.answer] for question in questions],
    }


if __name__ == "__main__":
    from weightkit.manifests.pico.describe import table

    print("\n".join([f"# {COMMENT}", *table("smoke", manifest_entry(Path(__file__).parent / "checkpoint"))[1:]]))
