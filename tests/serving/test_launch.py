"""The command lines, word by word, and everything that must keep one from being printed."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from serving.contract_server import _flags
from tiny import MOONLIGHT, V3, V3_BF16, V3_INT4, Gptq, Tiny, write_tiny

from weightkit.errors import PlanError, Problems, WeightkitError
from weightkit.layouts import open_checkpoint
from weightkit.serving import Launch, command
from weightkit.transforms import shard, strip_mtp
from weightkit.writer import write

#: Small, but with the widths that engines' kernels ask for.
WIDE: dict[str, Any] = {"hidden": 256, "kv_lora": 512, "rope": 64, "moe": 256, "shared": 1}
FP8 = replace(V3, **WIDE)
BF16 = replace(V3_BF16, **WIDE)
INT4 = replace(V3_INT4, **WIDE, gptq=Gptq(group_size=32))


def checkpoint_at(path: Path, model: Tiny, **files: str) -> Path:
    write_tiny(path, model)
    (path / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    for name, text in files.items():
        (path / f"{name}.json").write_text(text)
    return path


def launch(engine: str, path: Path, tp: int = 2, **options: Any) -> Launch:
    return command(engine, open_checkpoint(path), tp, **options)


def problems(engine: str, path: Path, tp: int = 2, **options: Any) -> list[str]:
    return [problem.message for problem in launch(engine, path, tp, **options).problems]


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_at(tmp_path_factory.mktemp("fp8") / "a b", FP8)


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_at(tmp_path_factory.mktemp("int4") / "int4", INT4)


LINES = {
    "vllm": "vllm serve {path} --host 127.0.0.1 --port 8000 --tensor-parallel-size 2 --max-model-len 512",
    "sglang": "python3 -m sglang.launch_server --model-path {path} --host 127.0.0.1 --port 30000 --tp-size 2 "
    "--context-length 512",
    "lmdeploy": "lmdeploy serve api_server {path} --backend pytorch --server-name 127.0.0.1 --server-port 23333 --tp 2 "
    "--session-len 512",
}
DRAFTS = {
    "vllm": """ --speculative-config '{"method":"mtp","num_speculative_tokens":2}'""",
    "sglang": " --speculative-algorithm EAGLE --speculative-num-steps 2 --speculative-eagle-topk 1"
    " --speculative-num-draft-tokens 3",
    "lmdeploy": " --speculative-algorithm deepseek_mtp --speculative-num-draft-tokens 2",
}


@pytest.mark.parametrize("engine", LINES)
def test_the_command(engine: str, fp8: Path) -> None:
    made = launch(engine, fp8)
    assert made.problems == ()
    assert made.shell == LINES[engine].format(path=f"'{fp8}'")
    assert shlex.split(made.shell) == list(made.argv)
    assert made.health_url == f"{made.endpoint}/health"
    assert all(check.ok for check in made.checks)
    assert "It has MTP layers, which are not used: --mtp 1 drafts with them." in made.notes
    assert json.loads(json.dumps(made.to_json()))["argv"] == list(made.argv)


@pytest.mark.parametrize("engine", LINES)
def test_options(engine: str, fp8: Path) -> None:
    made = launch(engine, fp8, mtp=2, context=128, host="0.0.0.0", port=9000)
    port = str({"vllm": 8000, "sglang": 30000, "lmdeploy": 23333}[engine])
    line = LINES[engine].format(path=f"'{fp8}'").replace("512", "128").replace("127.0.0.1", "0.0.0.0")
    assert made.problems == ()
    assert made.shell == line.replace(f" {port} ", " 9000 ") + DRAFTS[engine]
    assert made.endpoint == "http://127.0.0.1:9000"


@pytest.mark.parametrize("engine", LINES)
def test_the_engines_flags_are_all_it_uses(engine: str, fp8: Path) -> None:
    """The parser has each flag as the engine's sources declare it; abbreviations and unknown ones are errors."""
    start = 3 if engine == "sglang" else 1
    args = _flags(engine).parse_args(list(launch(engine, fp8, mtp=1).argv[start:]))
    assert (args.model, args.tp, args.host) == (str(fp8), 2, "127.0.0.1")


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_int4(engine: str, int4: Path) -> None:
    made = launch(engine, int4)
    assert made.problems == ()
    assert next(check.detail for check in made.checks if check.name == "weights") == "GPTQ"
    assert "quantization" not in made.shell  # both find it in the config


def test_a_relative_path_is_made_absolute(fp8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(fp8.parent)
    assert str(fp8) in launch("vllm", Path(fp8.name)).argv


def test_f32_weights_are_computed_in_bf16(tmp_path: Path) -> None:
    """SGLang's and LMDeploy's own choice for F32 is FP16, in which this family overflows."""
    path = checkpoint_at(tmp_path / "f32", BF16)
    from weightkit.transforms import cast

    write(cast(open_checkpoint(path), "f32"), tmp_path / "out", progress=False)
    for engine in LINES:
        made = launch(engine, tmp_path / "out")
        assert made.problems == ()
        assert " --dtype bfloat16" in made.shell
        assert "The weights are F32; it computes in BF16." in made.notes
        assert "--dtype" not in launch(engine, path).shell


def test_code_of_the_checkpoint_runs_only_where_the_tokenizer_is_such(tmp_path: Path, fp8: Path) -> None:
    assert "--trust-remote-code" not in launch("vllm", fp8).shell
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}}
    path = checkpoint_at(tmp_path / "kimi", FP8, tokenizer_config=json.dumps(tokenizer))
    (path / "tokenization_kimi.py").write_text("class TikTokenTokenizer: pass\n")
    for engine in LINES:
        made = launch(engine, path)
        assert made.problems == ()
        assert made.shell.endswith(" --trust-remote-code")
        assert "Read it first." in made.notes[0]


def test_all_problems_at_once(tmp_path: Path) -> None:
    path = checkpoint_at(tmp_path / "bad", replace(FP8, mtp_layers=0))
    (path / "tokenizer.json").unlink()
    (path / "chat_template.jinja").unlink()
    made = launch("vllm", path, 3, context=100_000, mtp=1)
    with pytest.raises(Problems) as caught:
        made.require()
    text = str(caught.value)
    assert "vLLM cannot serve this checkpoint" in text
    assert "num_attention_heads: 16 attention heads cannot be split over 3 ranks" in text
    assert "Legal --tp for this checkpoint: 1, 2." in text
    assert "--context: the model knows no such positions: expected at most 512, found 100000." in text
    assert "there are no MTP layers to draft with" in text
    assert "no tokenizer: expected one of tokenizer.json, tokenizer.model" in text
    assert "no chat template, so that no conversation can be answered" in text


def test_rank_files_are_not_for_engines(tmp_path: Path, fp8: Path) -> None:
    write(shard(strip_mtp(open_checkpoint(fp8)), mp=2), tmp_path / "mp2", progress=False)
    for engine in LINES:
        (problem,) = launch(engine, tmp_path / "mp2").problems
        assert problem.message.endswith("as the hubs publish them: expected an index and shards, found 2 mp ranks.")
        assert problem.fix == "Join them first: weightkit merge."


def test_lmdeploy_reads_no_gptq(int4: Path) -> None:
    (problem,) = launch("lmdeploy", int4).problems
    assert problem.message == f"{int4}: LMDeploy 0.16.0 does not read these weights: " + (
        "expected BF16, F16, F32, FP8, found GPTQ."
    )


def test_experts_are_cut_between_groups(tmp_path: Path) -> None:
    path = checkpoint_at(tmp_path / "g", replace(INT4, gptq=Gptq(group_size=128)))
    assert problems("vllm", path, 2) == []
    assert "256 columns of an expert (group size 128) are not 4 times whole 128s" in problems("vllm", path, 4)[-1]


def test_fp8_left_beside_int4(tmp_path: Path) -> None:
    path = checkpoint_at(tmp_path / "mixed", replace(INT4, fp8=True))
    found = problems("vllm", path)
    assert (
        "model.layers.0.self_attn.q_a_proj.weight: left beside GPTQ weights, where engines take it for one of them: "
        in ("\n".join(found))
    )
    assert not any("scale_inv: left" in message for message in found)  # F32 is nothing to stumble over


@pytest.mark.parametrize(
    ("gptq", "said"),
    [
        (Gptq(group_size=32, sym=False), "read only symmetric weights"),
        (Gptq(group_size=16), "no kernel for this group size: expected -1, 32, 64, 128, found 16"),
    ],
)
def test_what_marlin_has_no_kernel_for(gptq: Gptq, said: str, tmp_path: Path) -> None:
    path = checkpoint_at(tmp_path / "g", replace(INT4, gptq=gptq))
    for engine in ("vllm", "sglang"):
        assert any(said in message for message in problems(engine, path, 1))


def test_the_hidden_size_in_tiles(tmp_path: Path) -> None:
    path = checkpoint_at(tmp_path / "g", replace(INT4, hidden=288))
    assert any("expected a multiple of 128, found 288" in message for message in problems("vllm", path, 1))


def edit_rules(path: Path, change: dict[str, str]) -> None:
    """Replace patterns of ``dynamic`` in both places."""
    for name in ("config.json", "quantize_config.json"):
        content = json.loads((path / name).read_text())
        holder = content["quantization_config"] if name == "config.json" else content
        holder["dynamic"] = {change.get(rule, rule): value for rule, value in holder["dynamic"].items()}
        (path / name).write_text(json.dumps(content))


def test_rules_that_do_not_match_the_fused_name(tmp_path: Path) -> None:
    """The names in the files match, but the engines ask for gate_up_proj and fused_qkv_a_proj."""
    path = checkpoint_at(tmp_path / "g", INT4)
    edit_rules(
        path,
        {
            r"-:.*layers\.0\.mlp\..*": r"-:.*layers\.0\.mlp\.(gate_proj|up_proj|down_proj)$",
            r"-:.*self_attn\..*": r"-:.*self_attn\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)$",
        },
    )
    assert problems("vllm", path) == []  # it looks at what is stored besides
    found = problems("sglang", path)
    assert [message.partition(":")[0] for message in found] == [
        "model.layers.0.self_attn.fused_qkv_a_proj_with_mqa",
        "model.layers.0.mlp.gate_up_proj",
        "model.layers.1.self_attn.fused_qkv_a_proj_with_mqa",
        "model.layers.2.self_attn.fused_qkv_a_proj_with_mqa",
    ]
    assert found[1].endswith("than what is stored: expected quantized, found not quantized.")


def test_a_rule_that_keeps_experts_which_are_quantized(tmp_path: Path) -> None:
    path = checkpoint_at(tmp_path / "g", INT4)
    edit_rules(path, {r"-:.*layers\.0\.mlp\..*": r"-:.*layers\.(0|1)\.mlp\.(gate_up_proj|experts|.*_proj)$"})
    assert any(
        message.startswith("model.layers.1.mlp.experts: quantization_config.dynamic tells the engine otherwise")
        for message in problems("vllm", path)
    )


def test_sglang_and_attention_in_int4(tmp_path: Path) -> None:
    path = checkpoint_at(tmp_path / "g", replace(INT4, gptq=Gptq(group_size=32, everything=True)))
    assert problems("vllm", path) == []
    assert all("no GPTQ in the attention of this family" in message for message in problems("sglang", path))


def test_sglang_drafts_with_no_unquantized_experts(int4: Path) -> None:
    assert problems("vllm", int4, mtp=1) == []
    assert not any("--mtp" in note for note in launch("sglang", int4).notes)
    (message,) = problems("sglang", int4, mtp=1)
    assert message.startswith(
        "model.layers.3.mlp.experts: SGLang takes the routed experts of every layer for quantized"
    )


def test_vllm_needs_the_published_mla_widths(tmp_path: Path) -> None:
    path = checkpoint_at(tmp_path / "narrow", replace(BF16, kv_lora=64, rope=32))
    assert problems("vllm", path, 1) == [
        "kv_lora_rank, qk_rope_head_dim: vLLM's MLA kernels are made for the published widths: expected 512, 64, found "
        "64, 32."
    ]
    made = launch("sglang", path, 1)
    assert made.problems == ()
    assert "Whether SGLang has attention kernels for these widths is not known." in made.notes


def test_a_config_that_is_not_true_of_the_tensors(tmp_path: Path) -> None:
    path = checkpoint_at(tmp_path / "lie", FP8)
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    assert any("the config and the tensors disagree on FP8" in message for message in problems("vllm", path))


def test_exceptions_of_fp8_that_part_a_fused_layer(tmp_path: Path) -> None:
    path = checkpoint_at(tmp_path / "mixed", FP8)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["model.layers.1.self_attn.q_a_proj"]
    (path / "config.json").write_text(json.dumps(config))
    for engine, found in (("vllm", 1), ("sglang", 1), ("lmdeploy", 0)):
        assert sum("its parts are not all alike" in message for message in problems(engine, path)) == found


def test_a_missing_tensor_is_found_before_anything_is_loaded(tmp_path: Path) -> None:
    path = checkpoint_at(tmp_path / "holes", BF16)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "n_routed_experts": 10}))
    assert any("model.layers.1.mlp.experts.9" in message for message in problems("vllm", path))


def test_a_config_elsewhere_is_no_use_to_an_engine(tmp_path: Path) -> None:
    path = checkpoint_at(tmp_path / "bare", BF16)
    (path / "config.json").rename(tmp_path / "config.json")
    made = command("vllm", open_checkpoint(path, config=tmp_path / "config.json"), 1)
    assert any("vLLM reads the config beside the weights" in problem.message for problem in made.problems)


def test_moonlight_has_no_mtp_layers(tmp_path: Path) -> None:
    path = checkpoint_at(tmp_path / "moon", replace(MOONLIGHT, **WIDE))
    made = launch("vllm", path, 1)
    assert made.problems == ()
    assert not any("MTP" in note for note in made.notes)


def test_no_such_engine(fp8: Path) -> None:
    with pytest.raises(PlanError, match="no such engine: expected vllm, sglang, lmdeploy, demo"):
        launch("llama.cpp", fp8)


DEMO = replace(BF16, hidden=7168, heads=2, q_lora=64, intermediate=256, experts=2, groups=1, layers=2, mtp_layers=0)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rank files for the demo, whose router has a bias only at the published width."""
    folder = tmp_path_factory.mktemp("demo")
    path = checkpoint_at(folder / "published", replace(DEMO, nope=64, v=64))
    (path / "inference").mkdir()
    (path / "inference/generate.py").write_text("")
    write(shard(open_checkpoint(path), mp=2), folder / "mp2", progress=False)
    return folder / "mp2"


def test_the_demo(ranks: Path) -> None:
    made = launch("demo", ranks, 2)
    assert [problem.message for problem in made.problems] == []
    assert made.shell == (
        f"torchrun --nproc-per-node 2 {ranks}/inference/generate.py --ckpt-path {ranks} --config "
        f"{ranks}/demo_config.json"
    )
    assert made.endpoint is None
    assert f"{ranks.parent}/generate.py" in launch("demo", ranks, 2, demo=ranks.parent).argv


def test_the_demo_loads_as_many_ranks_as_there_are_files(ranks: Path) -> None:
    (message,) = problems("demo", ranks, 4)
    assert message.endswith("model0-mp4.safetensors and so on: expected 4 mp ranks, found 2 mp ranks.")
    assert "expected 2 mp ranks, found published." in problems("demo", ranks.parent / "published", 2)[0]


def test_what_the_demo_does_not_do(ranks: Path, tmp_path: Path, int4: Path) -> None:
    found = problems("demo", ranks, 2, mtp=1, context=100)
    assert any("max_seq_len in demo_config.json" in message for message in found)
    assert any("DeepSeek's demo does not draft" in message for message in found)
    write(shard(strip_mtp(open_checkpoint(int4)), mp=2), tmp_path / "mp2", progress=False)
    found = problems("demo", tmp_path / "mp2", 2)
    assert any("does not read these weights" in message and "found GPTQ" in message for message in found)
    assert any("its router has a bias only where dim is 7168" in message for message in found)


def test_problems_are_weightkit_errors(fp8: Path) -> None:
    with pytest.raises(WeightkitError):
        launch("demo", fp8).require()
