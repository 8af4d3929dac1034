"""Calibration tokens: drawing, packing, formats, and every way in which a file can be wrong.

The tokenizer knows the words w0 to w99 by their numbers; 100 begins a text, 101 ends one.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tokenizers import Tokenizer as Core
from tokenizers import models, pre_tokenizers

import weightkit.manifests as manifests
from weightkit.errors import CalibrationError, HeaderError, PlanError, TokenizerError
from weightkit.generation import Tokenizer
from weightkit.quantization import Calibration, default_calibration, load_calibration
from weightkit.quantization.documents import MAX_DOCUMENT_BYTES, Document, Shuffled

BOS, EOS, USER, ASSISTANT = 100, 101, 102, 103
VOCAB = 104
SPECIAL = {"<s>": BOS, "</s>": EOS, "<user>": USER, "<assistant>": ASSISTANT}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content }} "
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
#: What random.Random(0) draws first: 0.84, 0.76, 0.42, 0.26, 0.51. Of four documents the last comes first.
SEED = 0


def core() -> Core:
    words = {f"w{i}": i for i in range(100)}
    tokenizer = Core(models.WordLevel({**words, **SPECIAL}, unk_token="w99"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def tokenizer(*, add_bos: bool = True, template: str | None = TEMPLATE) -> Tokenizer:
    return Tokenizer("here", core(), {"bos_token": "<s>", "eos_token": "</s>"}, template, add_bos)


def load(path: Path, *, samples: int = 1, seq_len: int = 4, **options: Any) -> Calibration:
    options = {"tokenizer": tokenizer(), "seed": SEED, "vocab_size": VOCAB, **options}
    return load_calibration(path, options.pop("tokenizer"), samples=samples, seq_len=seq_len, **options)


def words(*ids: int) -> str:
    return " ".join(f"w{i}" for i in ids)


def jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def texts(path: Path, *documents: Sequence[int]) -> Path:
    return jsonl(path, *({"text": words(*document)} for document in documents))


# Packing.


def test_documents_are_drawn_laid_end_to_end_and_cut(tmp_path: Path) -> None:
    path = texts(tmp_path / "a.jsonl", [10, 11], [20, 21, 22], [30], [40, 41, 42, 43, 44])
    found = load(path, samples=3, seq_len=4)
    assert found.tokens.tolist() == [[BOS, 40, 41, 42], [43, 44, BOS, 30], [BOS, 20, 21, 22]]
    assert found.tokens.dtype == np.int32
    assert (found.documents_used, found.documents_found, found.kind, found.seed) == (3, 4, "jsonl", SEED)
    assert found.source == str(path)
    # a fifth draws 0.51 and so comes third
    texts(path, [10, 11], [20, 21, 22], [30], [40], [50])
    assert load(path, samples=1, seq_len=6).tokens.tolist() == [[BOS, 40, BOS, 30, BOS, 50]]


def test_the_last_document_alone_is_cut_short(tmp_path: Path) -> None:
    path = texts(tmp_path / "a.jsonl", [10, 11, 12, 13])
    assert load(path, samples=2, seq_len=2).tokens.tolist() == [[BOS, 10], [11, 12]]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=14),
    seq_len=st.integers(1, 9),
    share=st.floats(0, 1),
    seed=st.integers(0, 1 << 70),
)
def test_no_document_is_cut_but_at_the_end(
    lengths: list[int], seq_len: int, share: float, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever the sequences, the stream is whole documents, none twice, and the beginning of one more."""
    documents = [[(7 * index) % 90 + offset for offset in range(length)] for index, length in enumerate(lengths)]
    total = sum(length + 1 for length in lengths if length)
    samples = max(1, int(share * total / seq_len))
    path = texts(tmp_path_factory.mktemp("c") / "a.jsonl", *documents)
    if samples * seq_len > total:
        with pytest.raises(CalibrationError):
            load(path, samples=samples, seq_len=seq_len, seed=seed)
        return
    found = load(path, samples=samples, seq_len=seq_len, seed=seed)
    assert found.tokens.shape == (samples, seq_len)
    stream = found.tokens.flatten().tolist()
    starts = [place for place, token in enumerate(stream) if token == BOS]
    pieces = [stream[a + 1 : b] for a, b in zip(starts, [*starts[1:], len(stream)], strict=True)]
    left = [document for document in documents if document]
    for piece in pieces[:-1]:
        left.remove(piece)
    assert any(document[: len(pieces[-1])] == pieces[-1] for document in left)
    assert starts[0] == 0
    assert found.documents_used == len(pieces)
    assert found.documents_found == len(documents)


def test_equal_requests_give_equal_tokens_and_digests(tmp_path: Path) -> None:
    path = texts(tmp_path / "a.jsonl", *([i, i + 1] for i in range(40)))
    first, second = load(path, samples=5), load(path, samples=5)
    assert first.tokens.tolist() == second.tokens.tolist()
    assert first.sha256 == second.sha256 == sha256(b"5x4 I32 " + first.tokens.astype("<i4").tobytes()).hexdigest()
    digests = {load(path, samples=s, seq_len=n, seed=seed).sha256 for s, n, seed in ((5, 4, 0), (4, 5, 0), (5, 4, 1))}
    assert len(digests) == 3


def test_the_order_is_the_same_on_every_machine(tmp_path: Path) -> None:
    """Pinned: it must not change with versions of Python or numpy."""
    path = texts(tmp_path / "a.jsonl", *([i] for i in range(12)))
    assert load(path, seq_len=24, seed=5).tokens[0, 1::2].tolist() == [6, 11, 7, 0, 9, 4, 1, 2, 10, 5, 3, 8]


def test_tokenizing_stops_when_there_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: calls.append(text) or encode(self, text))
    load(texts(tmp_path / "a.jsonl", *([i] for i in range(50))), samples=3)
    assert len(calls) == 6  # two tokens each


# Drawing with bounded memory.


def numbered(count: int, size: int = 10) -> Iterator[Document]:
    return (Document(Path("a"), number, bytes(size)) for number in range(count))


@pytest.mark.parametrize("budget", [0, 700, 5_000, 10**9])
def test_the_order_does_not_depend_on_the_budget(budget: int) -> None:
    shuffled = Shuffled(lambda: numbered(60), seed=3, budget_bytes=budget)
    order = [document.number for document in shuffled]
    assert order == [document.number for document in Shuffled(lambda: numbered(60), seed=3, budget_bytes=10**9)]
    assert sorted(order) == list(range(60))
    assert order != sorted(order)
    assert shuffled.found == 60


def test_one_pass_while_the_budget_is_enough() -> None:
    passes = []
    shuffled = Shuffled(lambda: passes.append(1) or numbered(60), seed=3, budget_bytes=3_000)  # ten documents and a bit
    drawn = iter(shuffled)
    for _ in range(10):
        next(drawn)
    assert len(passes) == 1
    for _ in range(10):
        next(drawn)
    assert len(passes) == 2


def test_memory_is_bounded_by_the_budget() -> None:
    shuffled = Shuffled(lambda: numbered(40_000, size=2_000), seed=0, budget_bytes=1 << 20)  # 80 MB of documents
    tracemalloc.start()
    next(iter(shuffled))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert shuffled.found == 40_000
    assert peak < 2 << 20


def test_every_document_has_the_same_chance() -> None:
    first = [next(iter(Shuffled(lambda: numbered(4), seed=seed, budget_bytes=0))).number for seed in range(2_000)]
    assert all(400 < first.count(number) < 600 for number in range(4))  # 500 expected, five deviations are 97


# Formats.


def test_blank_lines_separate_documents_of_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfw1 w2\r\nw3\r\n  \r\n\n\nw4\nw5\n")
    found = load(path, samples=1, seq_len=7)
    assert found.tokens.tolist() == [[BOS, 4, 5, BOS, 1, 2, 3]]
    assert (found.kind, found.documents_found) == ("text", 2)


def test_blank_documents_do_not_count_as_used(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "w1"}, {"text": ""}, {"text": " \n"}, {"text": "w4"})
    found = load(path)
    assert found.tokens.tolist() == [[BOS, 4, BOS, 1]]
    assert (found.documents_used, found.documents_found) == (2, 4)


MESSAGES = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
RENDERED = [BOS, USER, 1, ASSISTANT, 2, EOS]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": MESSAGES}, RENDERED),
        ({"conversations": [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]}, RENDERED),
        ({"conversations": [{"from": "user", "value": "w1"}, {"from": "assistant", "value": "w2"}]}, RENDERED),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, RENDERED),
        ({"prompt": "w1 ", "completion": "w2"}, [BOS, 1, 2]),
        ({"prompt": "w9", "prompt_id": "x", "messages": MESSAGES}, RENDERED),
        ({"messages": None, "text": "w3 w4", "id": 7}, [BOS, 3, 4]),
        ({"text": "w3", "messages": MESSAGES}, RENDERED),
    ],
)
def test_records(record: object, expected: list[int], tmp_path: Path) -> None:
    found = load(jsonl(tmp_path / "a.json", record), seq_len=len(expected))
    assert found.tokens.tolist() == [expected]
    with pytest.raises(CalibrationError, match=f"{len(expected)} tokens in 1 document"):
        load(tmp_path / "a.json", seq_len=len(expected) + 1)


def test_a_text_that_nothing_begins_is_ended(tmp_path: Path) -> None:
    path = texts(tmp_path / "a.jsonl", [1, 2], [3])
    assert load(path, seq_len=5, tokenizer=tokenizer(add_bos=False)).tokens.tolist() == [[3, EOS, 1, 2, EOS]]
    bare = Tokenizer("here", core(), {}, None, False)
    assert load(path, seq_len=3, tokenizer=bare).tokens.tolist() == [[3, 1, 2]]


def test_the_date_in_a_template_stands_still(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"messages": MESSAGES})
    dated = tokenizer(template="{{ 'w' ~ strftime_now('%d')[1:] }} w9")
    assert load(path, seq_len=2, tokenizer=dated).tokens.tolist() == [[1, 9]]


def test_compressed_files_read_as_they_are(tmp_path: Path) -> None:
    plain = texts(tmp_path / "a.jsonl", [1], [2], [3])
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"w1\n\nw2\n\nw3"))
    expected = load(plain, seq_len=6)
    assert load(tmp_path / "b.json.gz", seq_len=6).sha256 == expected.sha256
    assert load(tmp_path / "c.txt.gz", seq_len=6).sha256 == expected.sha256


def test_a_folder_is_its_files_one_after_another(tmp_path: Path) -> None:
    whole = texts(tmp_path / "whole.jsonl", [1], [2], [3], [4])
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / ".cache").mkdir()
    texts(folder / "a.jsonl", [1])
    texts(folder / "deep" / "b.json", [2], [3])
    texts(folder / "z.jsonl", [4])
    texts(folder / ".cache" / "b.jsonl", [9])
    (folder / "README.md").write_text("about")
    found = load(folder, seq_len=8)
    assert found.sha256 == load(whole, seq_len=8).sha256
    assert found.documents_found == 4


def test_a_tokenizer_is_found_in_its_folder(tmp_path: Path) -> None:
    core().save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "data").mkdir()
    path = jsonl(tmp_path / "data" / "a.jsonl", {"messages": MESSAGES}, {"text": "w7"})
    assert load(path, seq_len=8, tokenizer=tmp_path).tokens.tolist() == [[BOS, 7, *RENDERED]]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    records = [{"prompt": f"w{i}", "messages": [{"content": f"w{i}", "role": "user"}], "n": i} for i in range(600)]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet", row_group_size=100)
    jsonl(tmp_path / "a.jsonl", *records)
    found = load(tmp_path / "a.parquet", samples=20, seq_len=9)
    assert found.tokens.tolist() == load(tmp_path / "a.jsonl", samples=20, seq_len=9).tokens.tolist()
    assert (found.kind, found.documents_found) == ("parquet", 600)
    parquet.write_table(pyarrow.Table.from_pylist([{"n": 1}]), tmp_path / "b.parquet")
    with pytest.raises(CalibrationError, match="no column with documents"):
        load(tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(CalibrationError, match=r"c\.parquet: cannot be read"):
        load(tmp_path / "c.parquet")


def test_parquet_without_pyarrow_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(CalibrationError, match=r"a\.parquet: reading parquet takes pyarrow(.|\n)*pip install pyarrow"):
        load(tmp_path / "a.parquet")


# Token ids.

ROWS = np.arange(30).reshape(5, 6)


def saved(path: Path, array: np.ndarray[Any, Any], name: str = "tokens", **others: np.ndarray[Any, Any]) -> Path:
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        save_file({name: array, **others}, path)
    return path


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint16", "uint8"])
@pytest.mark.parametrize("name", ["a.npy", "a.safetensors"])
def test_rows_of_ids(name: str, dtype: str, tmp_path: Path) -> None:
    """Seed 0 draws 0.84, 0.76, 0.42, 0.26, 0.51: rows 3, 2 and 4 are the three lowest."""
    path = saved(tmp_path / name, ROWS.astype(dtype))
    found = load(path, samples=3, tokenizer=None)
    assert found.tokens.tolist() == [[12, 13, 14, 15], [18, 19, 20, 21], [24, 25, 26, 27]]
    assert found.tokens.dtype == np.int32
    assert (found.kind, found.documents_used, found.documents_found) == ("tokens", 3, 5)


@pytest.mark.parametrize("name", ["a.npy", "a.safetensors"])
def test_a_stream_of_ids(name: str, tmp_path: Path) -> None:
    path = saved(tmp_path / name, np.arange(23, dtype=np.int32), **({"mask": ROWS} if "safe" in name else {}))
    found = load(path, samples=2, tokenizer=None)
    assert found.tokens.tolist() == [[8, 9, 10, 11], [12, 13, 14, 15]]
    assert found.documents_found == 5


def test_other_byte_and_memory_orders(tmp_path: Path) -> None:
    expected = load(saved(tmp_path / "a.npy", ROWS), samples=4).sha256
    for index, array in enumerate((ROWS.astype(">i4"), np.asfortranarray(ROWS))):
        assert load(saved(tmp_path / f"{index}.npy", array), samples=4).sha256 == expected


def test_a_folder_of_ids(tmp_path: Path) -> None:
    saved(tmp_path / "a.npy", ROWS[:2])
    saved(tmp_path / "b.safetensors", ROWS[2:])
    assert load(tmp_path, samples=2).tokens.tolist() == [[12, 13, 14, 15], [18, 19, 20, 21]]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (ROWS.astype(np.float32), r"not token ids: expected integers \[rows, length\] or \[length\], found float32"),
        (np.zeros((2, 3, 4), np.int32), r"not token ids.*int32 \[2, 3, 4\]"),
        (np.int32(3), "not token ids"),
        (ROWS[:, :3], r"rows shorter than a sequence: expected at least 4 ids a row, found 3\.\nUse --seq-len 3"),
        (ROWS - 20, r"a\.npy: row 2, position 0: a token id.*expected 0 to 103, found -8"),
        (ROWS + 84, r"a\.npy: row 3, position 2: a token id.*found 104"),
        (ROWS.astype(np.uint64) + (1 << 63), "a token id that the model does not have"),
        (ROWS.flatten() + 90, r"a\.npy: position 14: a token id.*found 104"),
        (ROWS[:2], r"expected 12 tokens \(3 samples of 4\), found 8 tokens in 2 whole sequences.*\n.*--samples 2"),
        (np.arange(7), r"found 7 tokens in 1 whole sequence\.\nGive more, or use --samples 1\."),
        (np.arange(3), r"found 3 tokens in 0 whole sequences\.\nGive more, or use --seq-len 3 or less"),
        (np.empty((0, 6), np.int32), "no calibration data in it"),
        (np.array([None, 3]), "not an array of numbers"),
    ],
)
def test_wrong_ids(array: np.ndarray[Any, Any], message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(CalibrationError, match=message):
        load(tmp_path / "a.npy", samples=3)


def test_damaged_arrays(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(CalibrationError, match=r"a\.npy: not an array of numbers"):
        load(tmp_path / "a.npy")
    whole = saved(tmp_path / "b.npy", ROWS).read_bytes()
    (tmp_path / "b.npy").write_bytes(whole[:-8])
    with pytest.raises(CalibrationError, match=r"b\.npy: not an array of numbers"):
        load(tmp_path / "b.npy")
    (tmp_path / "a.safetensors").write_bytes(b"\0" * 4)
    with pytest.raises(HeaderError):
        load(tmp_path / "a.safetensors")


def test_which_tensor_has_the_ids(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    assert load(saved(path, ROWS, "anything")).documents_found == 5
    assert load(saved(path, ROWS, "input_ids", other=ROWS)).documents_found == 5
    for tensors in ({"a": ROWS, "b": ROWS}, {"tokens": ROWS, "input_ids": ROWS}, {"a": ROWS.astype(np.float32)}, {}):
        save_file(tensors, path)
        with pytest.raises(
            CalibrationError, match=r"no telling which tensor.*tokens or input_ids, found (none|\w+ \()"
        ):
            load(path)


# What can be wrong with text.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "w1"\n', r"a\.jsonl:2: a malformed line \(not JSON: .*\nMend the line"),
        (b"[\n", r"a\.jsonl:2: a malformed line(.|\n)*jq -c '\.\[\]'"),
        (b"3\n", r'a\.jsonl:2: a malformed line: expected \{"text": \.\.\.\}.*, found int'),
        (b"{}\n", "found an empty object"),
        (b'{"txt": "w1", "id": 3}\n', "found txt: str, id: int"),
        (b'{"text": 3}\n', "found text: int"),
        (b'{"prompt": "w1"}\n', "found prompt: str"),
        (b'{"prompt": "w1", "completion": []}\n', "found prompt: str, completion: list"),
        (b'{"messages": "w1"}\n', "found messages that are no list of messages"),
        (b'{"messages": []}\n', "found messages that are no list of messages"),
        (b'{"messages": ["w1"]}\n', "found messages with a message without role and content"),
        (b'{"messages": [{"role": 3, "content": ""}]}\n', "found messages with a message without role"),
        (b'{"conversations": [{"from": "gpt"}]}\n', "found conversations with a message without role"),
        (b'{"conversations": [{"from": [], "value": ""}]}\n', "found conversations with a message without role"),
        (b'{"messages": [{"role": "user", "content": "bad"}]}\n', r"a\.jsonl:2: the chat template refused.*no bad"),
        (b'{"text": "\\ud800"}\n', r"a\.jsonl:2: a malformed line \(half of a surrogate pair\)"),
        (b'{"text": "\xff"}\n', r"a\.jsonl:2: not UTF-8 \(invalid start byte at byte 10"),
        (b"[" * 100_000 + b"\n", r"a\.jsonl:2: a malformed line \(not JSON"),
        (b'{"text": ' + b"9" * 5_000 + b"}\n", r"a\.jsonl:2: a malformed line"),
    ],
)
def test_malformed_lines_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n" + content + b'\n{"text": "w1"}\n')
    strict = tokenizer(template="{% if messages[0].content == 'bad' %}{{ raise_exception('no bad') }}{% endif %}")
    with pytest.raises(CalibrationError, match=message):
        load(path, samples=9, tokenizer=strict)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"w1\n\nw2 w3\nw4 \xff\n")
    with pytest.raises(CalibrationError, match=r"a\.txt:3: not UTF-8 \(invalid start byte at byte 9 of"):
        load(tmp_path / "a.txt")


@pytest.mark.parametrize(("name", "lines"), [("a.txt", 1), ("a.txt", 3), ("a.jsonl", 1)])
def test_a_file_without_breaks_is_not_read_whole(name: str, lines: int, tmp_path: Path) -> None:
    line = b"w" * (MAX_DOCUMENT_BYTES // lines + 2)
    (tmp_path / name).write_bytes(b"\n".join([line] * lines))
    with pytest.raises(CalibrationError, match=rf"{name}:1: a document that is too long: expected at most 16,777,216"):
        load(tmp_path / name)


def test_too_little_text_says_what_would_work(tmp_path: Path) -> None:
    path = texts(tmp_path / "a.jsonl", [1, 2], [3, 4, 5, 6])  # 8 tokens with those that begin a text
    message = r"a\.jsonl: too little calibration data: expected 12 tokens \(4 samples of 3\), found 8 tokens in 2 doc"
    with pytest.raises(CalibrationError, match=message) as caught:
        load(path, samples=4, seq_len=3)
    assert caught.value.fix == "Give more, or use --samples 2."
    assert load(path, samples=2, seq_len=3).tokens.shape == (2, 3)
    with pytest.raises(CalibrationError, match="Give more, or use --seq-len 8 or less"):
        load(path, seq_len=9)
    assert load(path, seq_len=8).tokens.shape == (1, 8)


@pytest.mark.parametrize("content", [b"", b"\n \n", b'{"text": ""}\n'])
def test_nothing_in_it(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(CalibrationError, match=r"a\.jsonl: no calibration data in it: .*found 0 tokens"):
        load(tmp_path / "a.jsonl")


def test_damaged_compression(tmp_path: Path) -> None:
    packed = gzip.compress(b'{"text": "w1"}\n' * 50)
    for content in (b"w1", packed[:-9], packed[:20] + b"\xff\xff" + packed[22:]):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        with pytest.raises(CalibrationError, match=r"a\.jsonl\.gz: cannot be read"):
            load(tmp_path / "a.jsonl.gz")


def test_paths_that_hold_no_data(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"missing\.txt: no such file or folder"):
        load(tmp_path / "missing.txt")
    (tmp_path / "a.csv").write_text("w1")
    with pytest.raises(CalibrationError, match=r"a\.csv: not a file of calibration data: expected \.txt, "):
        load(tmp_path / "a.csv")
    with pytest.raises(CalibrationError, match="no calibration data in this folder"):
        load(tmp_path)
    saved(tmp_path / "a.npy", ROWS)
    texts(tmp_path / "b.json", [1])
    with pytest.raises(CalibrationError, match=r"files of more than one kind: found a\.npy, b\.json"):
        load(tmp_path)


def test_ids_beyond_the_vocabulary_are_the_tokenizers_fault(tmp_path: Path) -> None:
    path = texts(tmp_path / "a.jsonl", [1, 2], [3, 50])
    with pytest.raises(CalibrationError, match=r"a\.jsonl:2: a token id.*expected 0 to 99, found 100"):
        load(path, vocab_size=100)


def test_conversations_need_a_template(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"messages": MESSAGES})
    with pytest.raises(CalibrationError, match=r"a\.jsonl:1: a conversation, but the checkpoint has no chat template"):
        load(path, tokenizer=tokenizer(template=None))


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    path = texts(tmp_path / "a.jsonl", [1])
    with pytest.raises(TokenizerError, match="text takes a tokenizer"):
        load(path, tokenizer=None)
    with pytest.raises(TokenizerError, match="no such folder"):
        load(path, tokenizer=tmp_path / "missing")
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        load(path, tokenizer=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "no such samples: expected a number from 1 up, found 0"),
        ({"seq_len": 0}, "no such seq_len"),
        ({"seed": -1}, "no such seed"),
        ({"vocab_size": 0}, "no such vocab_size"),
        (
            {"seq_len": 9, "max_position_embeddings": 8},
            r"longer than the model's context: expected at most 8 tokens \(max_position_embeddings\), found 9",
        ),
    ],
)
def test_requests_that_are_none(options: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=message):
        load(texts(tmp_path / "a.jsonl", range(20)), **options)
    assert load(tmp_path / "a.jsonl", seq_len=8, max_position_embeddings=8).tokens.shape == (1, 8)


# What the manifests name.


@pytest.mark.parametrize("name", [name for name in manifests.names() if manifests.load(name).path is None])
def test_published_models_name_data_to_fetch(name: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        default_calibration(name)
    data = manifests.load(name).calibration
    assert data is not None
    assert data.dataset is not None
    assert len(data.dataset.revision) == 40
    command = f"hf download {data.dataset.id} {data.file} --repo-type dataset --revision {data.dataset.revision}"
    assert command in str(caught.value)
    assert f"--calibration calibration/{data.file}" in str(caught.value)
    assert ("pip install pyarrow" in str(caught.value)) == data.file.endswith(".parquet")


def test_models_without_calibration_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(manifests, "_FOLDER", tmp_path)
    (tmp_path / "a.toml").write_text('title = "A"\n[architecture]\n')
    with pytest.raises(CalibrationError, match="a: no calibration data is known for this model"):
        default_calibration("a")
    (tmp_path / "a.toml").write_text('title = "A"\n[architecture]\n[calibration]\nfile = "gone.txt"\n')
    with pytest.raises(CalibrationError, match=r"gone\.txt: no such file"):
        default_calibration("a")
    with pytest.raises(PlanError, match="no model of this name is known"):
        default_calibration("b")


def test_no_torch() -> None:
    """Of these modules: the room's own list of exports is left out, because the solver needs torch."""
    code = (
        "import sys, types, weightkit; room = types.ModuleType('weightkit.quantization');"
        "room.__path__ = [weightkit.__path__[0] + '/quantization']; sys.modules[room.__name__] = room;"
        "import weightkit.quantization.calibration; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_what_the_manifest_names_is_found_where_it_was_fetched(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError) as error:
        default_calibration("deepseek-v3", tmp_path)
    assert f"--local-dir {tmp_path}" in str(error.value)
    data = manifests.load("deepseek-v3").calibration
    assert data is not None
    fetched = tmp_path / data.file
    fetched.parent.mkdir(parents=True, exist_ok=True)
    fetched.write_text("fetched")
    assert default_calibration("deepseek-v3", tmp_path) == fetched
