"""Every exchange of ranks, with unequal and empty parts, checked by its values.

    torchrun --nproc-per-node SIZE exchanges.py DEVICE

On GPUs each rank prints what joining took: seconds, and memory outside torch.
"""

from __future__ import annotations

import sys
import time

import torch

from weightkit.ranks.ranks import Ranks

#: Rows that each of two ranks sends to each.
ROWS = ([[3, 2], [0, 5]], [[0, 0], [4, 0]], [[0, 0], [0, 0]], [[9, 3000], [2000, 7]])
WIDTH = 7168


def main() -> None:
    began, device = time.monotonic(), Ranks.device(sys.argv[1])
    torch.ones(1, device=device)
    before = free_mib(device)
    ranks = Ranks.join(device)
    joined, took_s = free_mib(device), time.monotonic() - began
    objects(ranks)
    tensors(ranks, device)
    for rows in ROWS if ranks.size == 2 else ():
        parts(ranks, device, rows)
    ranks.wait()
    if device.type == "cuda":
        more = joined - free_mib(device) - torch.cuda.memory_reserved() // 2**20
        print(f"rank {ranks.rank}: joined in {took_s:.1f} s, {before - joined} MiB, later {more} MiB more", flush=True)
    ranks.leave()


def free_mib(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] >> 20 if device.type == "cuda" else 0


def objects(ranks: Ranks) -> None:
    assert ranks.everybodys({ranks.rank: "x" * ranks.rank}) == [{rank: "x" * rank} for rank in range(ranks.size)]


def tensors(ranks: Ranks, device: torch.device) -> None:
    me, everyone = ranks.rank, range(ranks.size)
    total = torch.zeros(1000, WIDTH, device=device)
    ranks.in_turn(total, lambda sum_so_far: sum_so_far.mul_(10).add_(me + 1))
    assert total.unique().tolist() == [float("".join(str(rank + 1) for rank in everyone))]
    assert ranks.sum(torch.full((64, WIDTH), float(me), device=device)).unique().tolist() == [float(sum(everyone))]
    gathered = ranks.gather(torch.full((1_000_001,), me, dtype=torch.uint8, device=device))
    assert [part.unique().tolist() for part in gathered] == [[rank] for rank in everyone]
    assert ranks.broadcast(torch.full((5,), me + 3, dtype=torch.uint8, device=device)).tolist() == [3] * 5


def parts(ranks: Ranks, device: torch.device, rows: list[list[int]]) -> None:
    outgoing = [
        torch.full((n, WIDTH), float(ranks.rank), dtype=torch.bfloat16, device=device) for n in rows[ranks.rank]
    ]
    arrived = torch.cat(ranks.exchange(outgoing, [sent[ranks.rank] for sent in rows]))
    expected = [float(rank) for rank, sent in enumerate(rows) for _ in range(sent[ranks.rank])]
    assert arrived.shape == (len(expected), WIDTH)
    assert torch.equal(arrived.float(), torch.tensor(expected, device=device)[:, None].expand(-1, WIDTH))


if __name__ == "__main__":
    main()
