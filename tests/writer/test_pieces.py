"""A file's content in pieces: neighbours copied together, the rest strip by strip, and no Inf made on the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import V3, write_safetensors

import weightkit as wk
from weightkit.checkpoint import Checkpoint, Stored
from weightkit.checkpoint.tensors import Cast, narrow
from weightkit.errors import WriteError
from weightkit.writer.pieces import COPY_BYTES, STRIP_BYTES, Copied, Made, pieces


def test_neighbours_are_copied_together() -> None:
    first, second = Stored("a", 100, "BF16", (4, 8)), Stored("a", 164, "F32", (2,))
    apart = Stored("b", 172, "F32", (2,))
    found = list(pieces({"first": first, "second": second, "apart": apart}))
    assert [(piece.copy.path, piece.copy.offset, piece.size_bytes) for piece in found if isinstance(piece, Copied)] == [
        ("a", 100, 72),
        ("b", 172, 8),
    ]


def test_columns_and_casts_are_made_in_their_place() -> None:
    whole = Stored("a", 0, "F32", (256, 64))
    found = list(
        pieces({"copied": whole, "columns": narrow(whole, 1, 8, 16), "cast": Cast(whole, "BF16"), "last": whole})
    )
    assert [type(piece) for piece in found] == [Copied, Made, Made, Copied]
    assert [piece.name for piece in found if isinstance(piece, Made)] == ["columns", "cast"]


def test_no_piece_is_large() -> None:
    large = Stored("a", 0, "F32", (1 << 17, 1 << 10))
    found = list(pieces({"copied": large, "cast": Cast(large, "BF16")}))
    assert sum(piece.size_bytes for piece in found) == (4 + 2) << 27
    assert max(piece.size_bytes for piece in found if isinstance(piece, Copied)) == COPY_BYTES
    assert max(piece.size_bytes for piece in found if isinstance(piece, Made)) == STRIP_BYTES


def test_a_value_beyond_f16_is_refused_by_name(tmp_path: Path) -> None:
    data = np.zeros(64 * 144, np.uint16)
    data[77] = 0x4780  # 65536 in BF16, the first power of two that F16 lacks
    write_safetensors(tmp_path / "head.safetensors", {"lm_head.weight": ("BF16", (64, 144), data.tobytes())})
    checkpoint = wk.open_checkpoint(tmp_path / "head.safetensors", config=V3.config())
    head = Checkpoint(tmp_path, "single file", {"lm_head.weight": Cast(checkpoint["lm_head.weight"], "F16")}, {})
    with pytest.raises(WriteError, match=r"lm_head.weight: values do not fit F16: .* found 1 that became Inf"):
        wk.write(head, tmp_path.parent / "f16", progress=False)
    assert not list((tmp_path.parent / "f16").glob("*.safetensors"))
