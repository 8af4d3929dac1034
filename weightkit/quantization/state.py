"""What a stopped quantization leaves in its target, beside the writer's journal: reports of layers, and activations.

.weightkit/quantization/layer-00003.json       the report of a finished layer
.weightkit/quantization/after-00007.bin        hidden states after a layer, of all sequences, as they lie in memory
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import torch

from weightkit.checkpoint.json_file import json_bytes, read_json_object
from weightkit.durable import PARTIAL, STATE_DIR, sync_folder, write_whole
from weightkit.errors import FormatError
from weightkit.quantization.report import LayerReport

_SNAPSHOT = re.compile(r"after-(\d{5})\.bin")
_WRITE_BYTES = 64 << 20


class State:
    """The folder of one quantization's state. ``ranks`` write their parts of a snapshot to one file."""

    def __init__(self, target: Path) -> None:
        self.folder = target / STATE_DIR / "quantization"

    def clear(self) -> None:
        """All of it goes."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def keep_report(self, report: LayerReport) -> None:
        """Write a finished layer's report."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self._report(report.layer), json_bytes(report.to_json()))

    def report(self, layer: int) -> LayerReport | None:
        """That of a layer that an earlier run finished; None where it is missing or damaged."""
        path = self._report(layer)
        if not path.is_file():
            return None
        try:
            return LayerReport.from_json(read_json_object(path))
        except FormatError:
            return None

    def latest_snapshot(self, before: int, size_bytes: int) -> int | None:
        """The last layer below ``before`` whose states are kept, all ``size_bytes`` of them."""
        found = [
            int(match[1])
            for path in (self.folder.iterdir() if self.folder.is_dir() else ())
            if (match := _SNAPSHOT.fullmatch(path.name)) and path.stat().st_size == size_bytes
        ]
        return max((layer for layer in found if layer < before), default=None)

    @property
    def snapshot_bytes(self) -> int:
        """Disk that kept states take now, those that were never finished among them."""
        found = self.folder.glob("after-*.bin*")
        return sum(path.stat().st_blocks * 512 for path in found)

    def begin_snapshot(self, layer: int, size_bytes: int) -> None:
        """Make room for the states after ``layer``; before ranks write."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._partial(layer).open("wb") as file:
            file.truncate(size_bytes)

    def write_part(self, layer: int, hidden: torch.Tensor, first: int) -> None:
        """Write sequences ``first`` and on: ``hidden`` [sequences, seq_len, width]."""
        per_sequence = hidden[0].nbytes
        step = max(1, _WRITE_BYTES // per_sequence)
        with self._partial(layer).open("r+b", buffering=0) as file:
            file.seek(first * per_sequence)
            for part in hidden.split(step):
                view = part.contiguous().view(torch.uint8).cpu().numpy().reshape(-1).data
                while len(view):
                    view = view[file.write(view) :]
            os.fdatasync(file.fileno())

    def finish_snapshot(self, layer: int) -> None:
        """All parts are there: this snapshot takes the place of the one before."""
        self._partial(layer).rename(self._snapshot(layer))
        sync_folder(self.folder)
        for path in self.folder.iterdir():
            match = _SNAPSHOT.fullmatch(path.name)
            if match and int(match[1]) != layer:
                path.unlink()

    def read_part(self, layer: int, hidden: torch.Tensor, first: int) -> None:
        """Fill ``hidden`` [sequences, seq_len, width] with the states of sequences ``first`` and on."""
        per_sequence = hidden[0].nbytes
        step = max(1, _WRITE_BYTES // per_sequence)
        with self._snapshot(layer).open("rb", buffering=0) as file:
            file.seek(first * per_sequence)
            for part in hidden.split(step):
                raw = bytearray(part.nbytes)
                view = memoryview(raw)
                while len(view):
                    count = file.readinto(view)
                    if not count:
                        raise FormatError("the kept activations end early", where=self._snapshot(layer))
                    view = view[count:]
                part.copy_(torch.frombuffer(raw, dtype=torch.uint8).view(hidden.dtype).view(part.shape))

    def _report(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05}.json"

    def _snapshot(self, layer: int) -> Path:
        return self.folder / f"after-{layer:05}.bin"

    def _partial(self, layer: int) -> Path:
        return self.folder / f"after-{layer:05}.bin{PARTIAL}"
