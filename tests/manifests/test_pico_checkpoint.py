"""The checkpoint that ships: its bytes are the manifest's, its traps are there, its answers are right in every form."""

from __future__ import annotations

import ast
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import Contents, read_published, read_safetensors
from tokenizers import Tokenizer

import weightkit.manifests as manifests
from weightkit.family import Architecture, blueprint, is_mtp
from weightkit.generation import Runtime
from weightkit.layouts import open_checkpoint
from weightkit.manifests.pico import evaluate_runtime
from weightkit.manifests.pico.evaluate import accuracy, evaluation_questions
from weightkit.manifests.pico.questions import Question
from weightkit.manifests.pico.tokenizer import train_tokenizer
from weightkit.transforms import cast
from weightkit.writer import write

MANIFEST = manifests.load("pico")
FOLDER = MANIFEST.path or Path("no checkpoint ships")
INDEX: dict[str, str] = json.loads((FOLDER / "model.safetensors.index.json").read_text())["weight_map"]
MOST_BYTES = 12_000_000
LEAST_RIGHT = 0.95
MTP = "model.layers.3."


def published(*keys: str) -> Any:
    """A figure of the manifest's ``[evaluation]``."""
    value: Any = MANIFEST.evaluation
    for key in keys:
        value = value[key]
    return value


@pytest.fixture(scope="module")
def tensors() -> Contents:
    return read_published(FOLDER)


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    """The first 20 of each category and language of those that the published figures are for."""
    return evaluation_questions(20)


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pico") / "bf16"
    write(cast(open_checkpoint(FOLDER), "bf16"), folder, device="cpu", progress=False)
    return folder


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime(FOLDER, device="cpu", dtype="f32") as runtime:
        yield runtime


# --- bytes ----------------------------------------------------------------------------------------


def test_every_file_is_the_manifests() -> None:
    found = {
        file.name: {"size_bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in FOLDER.iterdir()
    }
    assert found == MANIFEST.files


def test_it_is_small_enough_to_ship() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= MOST_BYTES


def test_tensors_are_the_blueprints(tensors: Contents) -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert {key: config[key] for key in MANIFEST.config} == MANIFEST.config
    expected = blueprint(Architecture.from_config(config)).values()
    assert {name: (dtype, shape) for name, (dtype, shape, _) in tensors.items()} == {
        record.name: (record.dtype, record.shape) for record in expected if not record.optional
    }


def test_totals_are_the_manifests(tensors: Contents) -> None:
    assert MANIFEST.expected is not None
    assert len(tensors) == MANIFEST.expected.tensors
    assert sum(len(data) for _, _, data in tensors.values()) == MANIFEST.expected.size_bytes
    assert len(set(INDEX.values())) == MANIFEST.expected.files


def test_every_file_goes_into_the_wheel() -> None:
    with (Path(__file__).parents[2] / "pyproject.toml").open("rb") as file:
        patterns = manifests.tomllib.load(file)["tool"]["setuptools"]["package-data"]["*"]
    assert [name for name in MANIFEST.files if not any(fnmatchcase(name, pattern) for pattern in patterns)] == []


# --- what makes it worth testing on ----------------------------------------------------------------


def test_a_weight_and_its_scale_lie_in_different_shards() -> None:
    apart = [name for name, file in INDEX.items() if INDEX.get(f"{name}_scale_inv", file) != file]
    assert len(set(INDEX.values())) >= 3
    assert len(apart) >= 3


def test_last_blocks_of_some_weights_are_parts_of_blocks(tensors: Contents) -> None:
    partial = {
        name for name, (dtype, shape, _) in tensors.items() if dtype == "F8_E4M3" and any(n % 128 for n in shape)
    }
    assert {name.split("self_attn.")[-1] for name in partial} >= {"q_a_proj.weight", "kv_a_proj_with_mqa.weight"}
    for name in partial:
        assert tensors[f"{name}_scale_inv"][1] == tuple(-(-width // 128) for width in tensors[name][1])


def test_the_mtp_layer_is_there_with_its_copies(tensors: Contents) -> None:
    arch = Architecture.from_config(MANIFEST.config)
    mtp = {name for name in tensors if is_mtp(name, arch)}
    assert mtp == {name for name in tensors if name.startswith(MTP)}
    assert {f"{MTP}{name}.weight" for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm")} <= mtp
    assert tensors[f"{MTP}embed_tokens.weight"] == tensors["model.embed_tokens.weight"]
    assert tensors[f"{MTP}shared_head.head.weight"] == tensors["lm_head.weight"]
    assert all(any(tensors[name][2]) for name in mtp)


# --- where it comes from ---------------------------------------------------------------------------


def test_the_log_is_of_this_checkpoint() -> None:
    """The training that the log tells of ended in the manifest's figures and this folder's bytes."""
    log = (FOLDER.parent / "train.log").read_text(encoding="utf-8")
    (trained,) = (line.split("trained: ")[1] for line in log.splitlines() if "trained: " in line)
    with (FOLDER.parent / "manifest.toml").open("rb") as file:
        assert ast.literal_eval(trained) == manifests.tomllib.load(file)["training"]
    for name in ("fp8", "bf16"):
        right, count = published(name, "accuracy", "overall"), published(name, "accuracy", "questions")
        text = published(name, "perplexity", "text")
        assert f"{name}: {right:.2%} of {count} right;" in log
        assert f"perplexity {text:.4f}, " in log
    files = list(FOLDER.iterdir())
    assert f"done: {sum(file.stat().st_size for file in files):,} bytes in {len(files)} files" in log


def test_the_published_figures_are_for_these_questions() -> None:
    digest = hashlib.sha256(repr([(q.prompt, q.answer) for q in evaluation_questions()]).encode()).hexdigest()
    assert len(evaluation_questions()) == published("fp8", "accuracy", "questions")
    assert digest == "f41a333998a4afe94b28125dfe585b3b6fab633ec4e44ef10062be9a03ab2dca"


@pytest.mark.slow
def test_its_tokenizer_is_trained_on_these_questions() -> None:
    shipped, again = Tokenizer.from_file(str(FOLDER / "tokenizer.json")), train_tokenizer()
    assert again.get_vocab() == shipped.get_vocab()


# --- what it answers -------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "dtype"), [("fp8", "bf16"), ("bf16", "f32")])
def test_it_answers_held_out_questions(form: str, dtype: str, bf16: Path, questions: list[Question]) -> None:
    with Runtime(FOLDER if form == "fp8" else bf16, device="cpu", dtype=dtype) as runtime:
        answers = evaluate_runtime.greedy_answers(runtime, questions)
    result = accuracy(questions, answers)
    assert result["questions"] == 240
    assert result["overall"] >= LEAST_RIGHT
    assert min(result["by_category"].values()) >= 0.85
    assert min(result["by_language"].values()) >= LEAST_RIGHT


def test_batches_answer_as_generate_does(runtime: Runtime, questions: list[Question]) -> None:
    some = questions[::16]
    assert {question.category for question in some} == {question.category for question in questions}
    generated = [runtime.generate(question.prompt, max_new_tokens=24) for question in some]
    assert [one.text for one in generated] == evaluate_runtime.greedy_answers(runtime, some)
    assert {one.stopped_by for one in generated} == {"eos"}


def test_perplexity_is_the_manifests(runtime: Runtime) -> None:
    found = evaluate_runtime.perplexity(runtime, evaluation_questions())
    assert found["tokens"] == published("fp8", "perplexity", "tokens")
    assert found["text"] == pytest.approx(published("fp8", "perplexity", "text"), rel=0.01)
    assert found["answers"] == pytest.approx(published("fp8", "perplexity", "answers"), rel=0.01)


# --- beside transformers ---------------------------------------------------------------------------


def transformers_state(folder: Path) -> dict[str, torch.Tensor]:
    """The cast's tensors in F32 as transformers holds them: a layer's experts in one tensor, gate above up, no MTP."""
    state: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, dict[str, torch.Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for file in sorted(folder.glob("*.safetensors")):
        for name, (dtype, shape, data) in read_safetensors(file).items():
            if name.startswith(MTP):
                continue
            stored = {"BF16": torch.bfloat16, "F32": torch.float32}[dtype]
            value = torch.frombuffer(bytearray(data), dtype=stored).reshape(shape).float()
            if ".experts." in name:
                stem, _, rest = name.partition(".experts.")
                expert, projection = rest.removesuffix(".weight").split(".")
                experts[f"{stem}.experts"][int(expert)][projection] = value
            else:
                state[name] = value
    for stem, by_expert in experts.items():
        ordered = [by_expert[expert] for expert in range(len(by_expert))]
        state[f"{stem}.gate_up_proj"] = torch.stack([torch.cat((one["gate_proj"], one["up_proj"])) for one in ordered])
        state[f"{stem}.down_proj"] = torch.stack([one["down_proj"] for one in ordered])
    return state


def test_logits_are_those_of_transformers(bf16: Path, questions: list[Question]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.DeepseekV3Config(**json.loads((bf16 / "config.json").read_text()))
    oracle = transformers.DeepseekV3ForCausalLM(config).float().eval()
    oracle.load_state_dict(transformers_state(bf16), strict=True)
    tokenizer = Tokenizer.from_file(str(bf16 / "tokenizer.json"))
    text = "".join(f"<｜User｜>{q.prompt}<｜Assistant｜>{q.answer}<｜end▁of▁sentence｜>" for q in questions)
    ids = torch.tensor(tokenizer.encode(text).ids[: 4 * 300]).view(4, 300)
    with Runtime(bf16, device="cpu", dtype="f32") as runtime, torch.inference_mode():
        found, expected = runtime.model(ids), oracle(ids).logits
    assert found.dtype == expected.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
