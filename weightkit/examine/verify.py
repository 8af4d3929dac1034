"""Hold a checkpoint against everything that is known of it, and report all that is wrong in one run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from weightkit import manifests
from weightkit.checkpoint import Header
from weightkit.checkpoint.remote import locate
from weightkit.errors import CheckpointError, FormatError, PlanError, WeightkitError
from weightkit.examine.checksums import (
    NONE_KNOWN,
    Known,
    Sha256,
    known_files,
    shipped_manifest,
    size_problems,
)
from weightkit.examine.code import code_problems
from weightkit.examine.declared import Declared, read_declared, reconcile
from weightkit.examine.gptq_values import IntegerScan, wishes
from weightkit.examine.loaders import config_problems, demo_problems, generation_problems
from weightkit.examine.replicas import Digests, Replicas, spans_of
from weightkit.examine.report import Check, Report
from weightkit.examine.rope import rope_notes
from weightkit.examine.sides import quantize_config_problems, read_sides
from weightkit.examine.stream import Consumer, Readers, Reading, read_all
from weightkit.examine.survey import Survey, attempt, survey
from weightkit.examine.tensors import partner_problems, published_names, published_or_none, replicated, tensor_problems
from weightkit.examine.tokenizer import tokenizer_problems
from weightkit.examine.values import ValueScan
from weightkit.family import Architecture, Expected
from weightkit.manifests import Manifest
from weightkit.remote.path import is_remote
from weightkit.units import human_bytes

QUICK = "left out of a quick check"


def verify(
    path: str | Path,
    *,
    config: str | Path | Mapping[str, object] | None = None,
    manifest: str | None = None,
    quick: bool = False,
    values: bool = False,
    jobs: int | None = None,
    readers: Readers | None = None,
    progress: bool = True,
) -> Report:
    """Verify a checkpoint in any layout; never stops at the first problem, and changes nothing.

    Index, files and headers are held against each other; tensors against the blueprint that follows from the config;
    the config against the tensors; side files against what names them. Unless ``quick``, the SHA-256 of every file that
    a lock or manifest records is computed, and what is whole on every rank is compared between ranks.

    Args:
        path: a folder in the published layout or of rank files, or one safetensors file; here, or at an address.
        config: the model's ``config.json`` (a path or its content) where the folder has none.
        manifest: the name of the published checkpoint that this must be; its totals and checksums are checked too.
        quick: read headers only, no tensor data.
        values: look at every weight and scale for NaN, Inf and scales that are not positive; of GPTQ at group numbers
            and zero points too.
        jobs: files read at once; default ``JOBS``.
        readers: who reads the files' data; default this process.
        progress: show a bar while tensor data is read.

    Raises:
        NotACheckpointError: there is nothing at the path.
        PlanError: no such manifest; ``readers`` of a source at an address.
        HubError: an address that nothing can be had from.
    """
    started = time.monotonic()
    known_manifest = manifests.load(manifest) if manifest is not None else None
    path = locate(path)
    if readers is not None and is_remote(path):
        raise PlanError("files at an address are read by this process alone", where=path, fix="Use --executor local.")
    found = survey(path)
    run = _Run(found, read_declared(found.folder, config), known_manifest or shipped_manifest(found.folder))
    run.check_headers()
    run.check_tensors()
    run.check_manifest()
    run.check_sides()
    run.check_data(quick=quick, values=values, jobs=jobs, readers=readers, progress=progress)
    return run.report(time.monotonic() - started)


@dataclass
class _Run:
    """One call's findings, gathered check by check."""

    survey: Survey
    declared: Declared
    manifest: Manifest | None
    problems: list[WeightkitError] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    expected: Mapping[str, Expected] | None = None
    arch: Architecture | None = None
    hashed_bytes: int = 0

    def report(self, wall_s: float) -> Report:
        headers = self.survey.scan.headers.values()
        return Report(
            path=self.survey.path,
            layout=self.survey.layout,
            files=len(headers),
            tensors=sum(len(header.entries) for header in headers),
            size_bytes=sum(header.file_size - header.data_offset for header in headers),
            problems=tuple(self.problems),
            checks=tuple(self.checks),
            notes=tuple(self.notes),
            hashed_bytes=self.hashed_bytes,
            wall_s=wall_s,
        )

    def _did(self, name: str, detail: str) -> None:
        self.checks.append(Check(name, True, detail))

    def _did_not(self, name: str, why: str) -> None:
        self.checks.append(Check(name, False, why))

    def check_headers(self) -> None:
        """Files, headers and index, as the survey found them; what loaders want in the metadata."""
        self.problems += self.survey.problems
        scan, index = self.survey.scan, self.survey.index
        self._did("headers", f"{len(scan.headers):,} of {len(scan.headers) + len(scan.problems):,} files")
        if index is not None:
            self._did("index", f"{len(index.weight_map):,} tensors, both ways")
        elif self.survey.layout == "published":
            self._did_not("index", "there is none that can be read")
        without = [file for file, header in scan.headers.items() if header.metadata.get("format") != "pt"]
        if self.survey.ranks is not None or self.survey.mixed:
            if without:
                self.notes.append(
                    f"{len(without):,} rank files without metadata format pt; the demo does not ask for it"
                )
            return
        self.problems += [
            FormatError(
                "no metadata format pt, so loaders refuse the file",
                where=self.survey.folder / file,
                expected="'format': 'pt' in __metadata__",
                found=scan.headers[file].metadata or "none",
                fix="Write it again: weightkit strip, cast and shard write it always.",
            )
            for file in without
        ]

    def check_tensors(self) -> None:
        """The config against the tensors, and the tensors against the blueprint."""
        self.problems += self.declared.problems
        if self.survey.mixed:
            self._did_not("tensors", "rank files of several degrees lie together")
            return
        held = published_names(self.survey)
        names = held.keys() | (self.survey.index.weight_map.keys() if self.survey.index is not None else set[str]())
        if self.declared.arch is not None and held:
            result = attempt(
                lambda: reconcile(
                    self.declared,
                    held,
                    names if self.survey.complete else None,
                    has_mtp=self.survey.ranks is None,
                ),
                self.declared.where,
            )
            if isinstance(result, WeightkitError):
                self.problems.append(result)
            else:
                self.expected, self.arch, found = result
                self.problems += found
        self._compare()

    def _compare(self) -> None:
        expected, arch = self.expected, self.arch
        if expected is None or arch is None:
            why = (
                "no header could be read" if not self.survey.scan.headers else "the config does not say what to expect"
            )
            self._did_not("tensors", f"{why}; only scales against weights, by name")
            self.problems += partner_problems(self.survey)
            return
        found = attempt(lambda: tensor_problems(self.survey, expected, arch), self.survey.path)
        self.problems += [found] if isinstance(found, WeightkitError) else found
        self._did("tensors", f"names, dtypes, shapes, scales against {arch.member}, {len(expected):,} tensors")

    def check_manifest(self) -> None:
        """Totals against those that a manifest expects of a published checkpoint."""
        manifest = self.manifest
        if manifest is None or manifest.expected is None or self.survey.layout != "published":
            return
        if self.survey.scan.problems:
            self._did_not("totals", "not all headers could be read")
            return
        elements: dict[str, int] = {}
        count = 0
        for _, entry in self.survey.held():
            size = 1
            for length in entry.shape:
                size *= length
            elements[entry.dtype] = elements.get(entry.dtype, 0) + size
            count += 1
        expected = manifest.expected
        size_bytes = sum(header.file_size - header.data_offset for header in self.survey.scan.headers.values())
        pairs: list[tuple[str, int, int]] = [
            ("tensors", expected.tensors, count),
            ("bytes of data", expected.size_bytes, size_bytes),
            *[
                (f"elements in {dtype}", expected.elements.get(dtype, 0), elements.get(dtype, 0))
                for dtype in sorted(expected.elements.keys() | elements.keys())
            ],
        ]
        if expected.files is not None:
            pairs.append(("files", expected.files, len(self.survey.scan.headers)))
        self.problems += [
            CheckpointError(
                f"the number of {what} is not that of {manifest.title}",
                where=self.survey.path,
                expected=f"{wanted:,}",
                found=f"{there:,}",
                fix=f"Fetch {manifest.title} again, or name the manifest that this checkpoint is.",
            )
            for what, wanted, there in pairs
            if wanted != there
        ]
        self._did("totals", f"against the manifest of {manifest.name}")

    def check_sides(self) -> None:
        """Code, tokenizer and other small files."""
        own = self.declared.config if self.declared.own else None
        folder, arch = self.survey.folder, self.arch or self.declared.arch
        contents, problems = read_sides(folder, own)
        self.problems += problems
        self.problems += code_problems(folder, contents)
        vocab_size = arch.vocab_size if arch is not None else None
        for problems, notes in (
            tokenizer_problems(folder, contents, vocab_size),
            quantize_config_problems(folder, contents),
        ):
            self.problems += problems
            self.notes += notes
        self._check_loaders(own)
        self._did("side files", "code named by auto_map, tokenizer, chat template, JSON files")

    def _check_loaders(self, own: Mapping[str, object] | None) -> None:
        """What no tensor tells, held against the architecture that the tensors have."""
        arch, folder = self.arch or self.declared.arch, self.survey.folder
        if arch is None:
            return
        if own is not None:
            self.problems += config_problems(own, arch, self.declared.where)
            self.notes += rope_notes(own)
        self.problems += generation_problems(folder, arch)
        if self.survey.ranks is not None:
            fp8 = any(entry.dtype == "F8_E4M3" for _, entry in self.survey.held())
            self.problems += demo_problems(folder, arch, fp8=fp8)

    def check_data(
        self, *, quick: bool, values: bool, jobs: int | None, readers: Readers | None, progress: bool
    ) -> None:
        """What needs the files' bytes: checksums, values, replicas; each file is read once for all of them."""
        known, problems = known_files(self.survey, self.manifest)
        self.problems += problems
        problems, intact = size_problems(self.survey, known)
        self.problems += problems
        hashed = [] if quick else intact
        replicas = self._replicas(quick=quick)
        readings = self._readings(known, hashed, replicas, values=values)
        shown = progress and bool(readings)
        if readers is None:
            self.problems += read_all(readings, jobs=jobs, desc="verify", progress=shown)
        elif readings:
            self.problems += readers.read_all(readings, desc="verify", progress=shown)
        if replicas is not None:
            self.problems += replicas.problems()
            self._did("replicas", f"{len(replicas.names):,} tensors, the same bytes on {len(replicas.by_file)} ranks")
        self.hashed_bytes = sum(known.files[name].size_bytes for name in hashed)
        self._say_checksums(known, hashed, quick=quick)
        if values:
            more = "; group numbers and zero points" if self.arch is not None and self.arch.is_gptq else ""
            self._did("values", f"every float, for NaN and Inf; scales, for being positive{more}")
        else:
            self._did_not("values", "not asked for")

    def _say_checksums(self, known: Known, hashed: list[str], *, quick: bool) -> None:
        if not known.files:
            self._did_not("checksums", NONE_KNOWN if not known.source else f"{known.source} does not name this file")
        elif quick:
            self._did_not("checksums", f"{QUICK}; sizes are those in {known.source}, or reported")
        else:
            self._did("checksums", f"{len(hashed):,} files, {human_bytes(self.hashed_bytes)}, by {known.source}")
            unnamed = len(self.survey.scan.headers.keys() - known.files.keys())
            if unnamed:
                self.notes.append(f"{unnamed:,} weight files have no known checksum: {known.source} does not name them")

    def _replicas(self, *, quick: bool) -> Replicas | None:
        """Consumers that digest what is whole on every rank; None where there is nothing to compare."""
        ranks, headers = self.survey.ranks, self.survey.scan.headers
        if ranks is None or len(headers) < 2:
            return None
        if quick or self.expected is None:
            self._did_not("replicas", QUICK if quick else "the config does not say what is whole on every rank")
            return None
        names = replicated(ranks, self.expected)
        forms = [{entry.name: (entry.dtype, entry.shape) for entry in header.entries} for header in headers.values()]
        same = frozenset(
            name for name in names if name in forms[0] and all(f.get(name) == forms[0][name] for f in forms)
        )
        return Replicas(same, {file: Digests(header, same) for file, header in headers.items()})

    def _integer_scan(self, file: str, header: Header) -> list[Consumer]:
        """For a file of a GPTQ checkpoint."""
        arch, expected, ranks = self.arch, self.expected, self.survey.ranks
        if arch is None or expected is None or arch.quantization is None or not arch.is_gptq:
            return []
        cut = ranks if ranks is not None and ranks.kind == "mp" else None
        wished = wishes(
            header,
            expected,
            arch.quantization,
            published=str if ranks is None else published_or_none,
            rank=cut.names().index(file) if cut is not None else 0,
            ranks=cut.size if cut is not None else 1,
        )
        return [IntegerScan(file, header, wished)] if wished else []

    def _readings(self, known: Known, hashed: list[str], replicas: Replicas | None, *, values: bool) -> list[Reading]:
        readings: list[Reading] = []
        headers = self.survey.scan.headers
        for name in dict.fromkeys([*headers, *hashed]):
            path, header = self.survey.folder / name, headers.get(name)
            consumers: list[Consumer] = []
            spans: list[tuple[int, int]] = []
            if header is not None and replicas is not None:
                consumers.append(replicas.by_file[name])
                spans = spans_of(header, replicas.names)
            if header is not None and values:
                consumers += [ValueScan(name, header), *self._integer_scan(name, header)]
                spans = [(header.data_offset, header.file_size)]
            if name in hashed:
                consumers.append(Sha256(path, known.files[name], known.source))
                spans = [(0, known.files[name].size_bytes)]
            if consumers:
                readings.append(Reading(path, spans, consumers, header))
        return readings
