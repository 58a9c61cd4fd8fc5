"""Every file that the product reads: a good one, how it is spoiled, and what is then asked of it."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from gguf import GGUFWriter
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from serving.benchmark.comparison.runs import compare_results
from serving.benchmark.journal import Journal, open_journal
from serving.benchmark.workload import read_prompts
from serving.onnx_export.files import check_files, read_settings
from serving.readiness import examine_directory
from serving.report.render import render_report
from serving.server.vllm.lora_check import check_adapters
from serving.signing.keys import open_signing_key
from serving.signing.signature import check_signature, write_signature
from serving.vllm_plugin.weights import stored_shapes
from tests.conftest import make_pico, prune_by_hand
from tests.quantized import write_quantized
from tests.readers.spoiling import spoiled_bytes, spoiled_json
from tests.serving.report.test_render import (
    write_evaluation,
    write_plan,
    write_summary,
    write_sweep,
    write_verification,
)
from tests.toolchain.costs.made import make_costs
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.checkpoint.licences import stated_licences
from toolchain.checkpoint.quantized import open_servable
from toolchain.costs.document import read_costs
from toolchain.errors import SenteiError
from toolchain.evaluate.local_tasks import load_hellaswag, load_user_questions
from toolchain.heal.heal import _kept_if_trained
from toolchain.model import gguf as gguf_import
from toolchain.model.decilm import is_nemotron_nas
from toolchain.model.gguf_header import read_gguf_header
from toolchain.model.loading import load_model, load_tokenizer
from toolchain.outputs import HEALING, Unfinished
from toolchain.parts_cache import Parts, losses_file, read_losses
from toolchain.plan.plan import load_plan, load_sweep
from toolchain.plan.sweep_document import SweepDocument, SweptPlan
from toolchain.plan.views import difference, reasons
from toolchain.prune.budget.target import budget_of, check_targets, parse_targets, predicted
from toolchain.prune.unfinished import read_identity
from toolchain.text.sources import read_documents


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One file.

    Attributes:
        make: Writes good files into an empty directory.
        file: The one of them that is spoiled.
        read: What the product does with the directory.
        spoiled: Strategy over the good bytes.
        slow: How many times fewer inputs it gets.
    """

    make: Callable[[Path], object]
    file: str
    read: Callable[[Path], object]
    spoiled: Callable[[bytes], Any] = spoiled_json
    slow: int = 1


def _model(directory: Path, **overrides: object) -> None:
    make_pico(directory, vocab_size=64, num_hidden_layers=2, **overrides)
    write_tokenizer(directory)


def _pruned(directory: Path) -> None:
    _model(directory / "source")
    prune_by_hand(directory / "source", directory, removed_attention={1}, width=(48, 31).__getitem__)
    write_tokenizer(directory)


def _sharded(directory: Path) -> None:
    _model(directory)
    names = open_checkpoint(directory).tensors
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _quantized(directory: Path) -> None:
    _model(directory / "source", hidden_size=64, head_dim=32, intermediate_size=64)
    write_quantized(directory / "source", directory, "w4a16")


def write_tokenizer(directory: Path) -> None:
    words = {word: number for number, word in enumerate(["<s>", "</s>", "?", "a", "b", "c"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="?")
    wrapped.save_pretrained(directory)
    (directory / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


def _sweep(directory: Path) -> None:
    for name in ("one", "other"):
        (directory / name).mkdir()
        write_plan(directory / name)
    base = load_plan(directory / "one").document.base_model
    common = {"target_sparsity": 0.25, "sparsity": 0.25, "num_block_parameters": 7_500, "metric": 26.0}
    swept = [
        SweptPlan(directory=name, num_attention_removals=1, stopped_because=None, **common) for name in ("one", "other")
    ]
    sweep = SweepDocument(
        schema_version=1, kind="sweep", base_model=base, metric="perplexity", metric_original=20.0, plans=swept
    )
    (directory / "sweep.json").write_text(sweep.to_json())


def _results(directory: Path) -> None:
    for write in (write_plan, write_summary, write_evaluation, write_verification, write_sweep):
        write(directory)


def _onnx(directory: Path) -> None:
    from export.onnx_graph import export_onnx

    _model(directory / "source", head_dim=16)
    export_onnx(directory / "source", directory / "export")


def _gguf(directory: Path) -> None:
    writer = GGUFWriter(directory / "model.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(16)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(8)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(4)
    writer.add_token_list(["a", "b", "c", "d"])
    layer = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    for name in ("token_embd", *(f"blk.0.{each}" for each in layer)):
        writer.add_tensor(f"{name}.weight", np.zeros((4 if name == "token_embd" else 8, 8), np.float32))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.zeros(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _adapter(directory: Path) -> None:
    _model(directory / "model")
    shapes = {"lora_A": (2, 32), "lora_B": (32, 2)}
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    weights = {f"{module}.{kind}.weight": torch.zeros(shape) for kind, shape in shapes.items()}
    save_file(weights, directory / "adapter_model.safetensors")


def _journal(directory: Path) -> None:
    journal = Journal(directory)
    journal.record((0, 0, "original"), {"output_throughput": 1.5, "failed": 0}, {"device": "cpu"})
    journal.record_failure((0, 0, "pruned"), num_requests=3, error="hung")
    (directory / "out.unfinished").mkdir()
    (directory / "out.unfinished" / "settings.json").write_text(json.dumps({"repeats": 3}))


def _reopen(directory: Path) -> None:
    shutil.rmtree(directory / "out", ignore_errors=True)
    shutil.copyfile(directory / "measured.jsonl", directory / "out.unfinished" / "measured.jsonl")
    with open_journal(directory / "out", {"repeats": 3}, force=False, resume=True, inputs=()):
        pass


_INPUTS = {"steps": 3, "text": "a", "sources": []}


def _training(directory: Path) -> None:
    checkpoint = directory / "out.heal" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 1}))
    (directory / "out.heal" / "inputs.json").write_text(json.dumps(_INPUTS))


def _go_on(directory: Path) -> None:
    if not (inputs := directory / "out.heal" / "inputs.json").exists():  # the last state was no good
        inputs.write_text(json.dumps(_INPUTS))
    work = Unfinished(directory / "out", HEALING, force=False, resume=True)
    with suppress(KeyboardInterrupt), work.working(_INPUTS), _kept_if_trained(work):
        raise KeyboardInterrupt  # and what a checkpoint says of itself is read


def _part(directory: Path) -> None:
    Parts(directory).get("piqa", {"seed": 0}, lambda: {"scores": [0.5, 1.0]})
    next(directory.glob("*.json")).rename(directory / "part.json")


def _read_part(directory: Path) -> object:
    parts = Parts(directory)
    path = parts._path("piqa", {"seed": 0})
    assert path is not None
    (directory / "part.json").replace(path)
    try:
        return parts.get("piqa", {"seed": 0}, dict)
    finally:
        path.replace(directory / "part.json")


def _losses(directory: Path) -> None:
    losses = np.linspace(0, 9, 6, dtype=np.float32).reshape(2, 3)
    Parts(directory).get_with_losses("text", {}, lambda: ({}, losses), losses.shape)
    next(directory.glob("*.safetensors")).rename(losses_file(directory / "part"))


def _views(directory: Path) -> list[object]:
    plan = load_plan(directory)
    cut = [plan.cut(step).summary() for step in range(len(plan.steps))]
    every = [reasons(plan, layer) for layer in range(len(plan.layout))]
    return [plan.summary(), plan.steps, plan.removed_attention, difference(plan, plan.cut(0)), *cut, *every]


def _curve(directory: Path) -> object:
    from serving.report.curve import render_curve

    plans = load_sweep(directory)
    assert plans
    render_curve(plans, directory / "curve.html", force=True)
    return [plan.steps for plan in plans.values()]


def _report(directory: Path) -> object:
    return render_report([directory], directory / "out" / "report.md", force=True)


def _open(directory: Path) -> object:
    checkpoint = open_servable(directory)
    examine_directory(directory)
    is_nemotron_nas(directory)
    return checkpoint.shapes, stored_shapes(directory), load_model(directory)


def _read_onnx(directory: Path) -> object:
    export = directory / "export"
    examine_directory(export)
    return read_settings(export), check_files(export)


def _open_quantized(directory: Path) -> object:
    opened = open_servable(directory)
    examine_directory(directory)
    return opened.shapes, opened.dtype, [opened.matrix(name) for name in getattr(opened, "matrices", ())]


def _sign(directory: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    (directory / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    (directory / "key.pub").write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    (directory / "signed").mkdir()
    (directory / "signed" / "config.json").write_text("{}")
    write_signature(directory / "signed", open_signing_key(str(directory / "key.pem"), lambda: None))


def _check_signature(directory: Path) -> object:
    return check_signature(directory / "signed", directory / "key.pub")


def _card(directory: Path) -> None:
    (directory / "README.md").write_text(
        "---\nlicense: [mit, other]\nlicense_name: a\ntags: &a {b: c}\n---\n# A model\n"
    )


def _write_lines(name: str, *rows: object) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def _parquet(directory: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["one text", "and another"]}), directory / "text.parquet")


def _documents(name: str) -> Callable[[Path], object]:
    return lambda directory: list(read_documents(directory / name))


def _prompts(directory: Path) -> None:
    write_tokenizer(directory)
    _write_lines("prompts.jsonl", {"prompt": "a b", "output_tokens": 3})(directory)


_QUESTION = {"prompt": "a", "choices": ["b", "c"], "answer": 1, "subject": "s"}
_HELLASWAG = {"ind": 1, "context": "Cooking: A. B", "endings": ["a", "b"], "label": "0"}


def _costs(directory: Path) -> None:
    (directory / "costs.json").write_text(make_costs({}).document.to_json(indent=1))


def _predict(directory: Path) -> None:
    costs = read_costs(directory / "costs.json").document
    targets = parse_targets(["speedup=1.2", "memory=1MB@1x1", "ttft=1ms"])
    with suppress(SenteiError):
        check_targets(targets, costs, 256)
    for target in targets:
        predicted(target, costs, costs.whole)
        budget_of(target, costs)


READERS: dict[str, Reader] = {
    "config": Reader(make=_model, file="config.json", read=_open, slow=2),
    "config of a pruned model": Reader(make=_pruned, file="config.json", read=_open, slow=2),
    "index": Reader(make=_sharded, file="model.safetensors.index.json", read=_open, slow=2),
    "safetensors": Reader(make=_model, file="model.safetensors", read=_open, spoiled=spoiled_bytes, slow=2),
    "generation config": Reader(make=_model, file="generation_config.json", read=load_model, slow=2),
    "quantised config": Reader(make=_quantized, file="config.json", read=_open_quantized),
    "quantised weights": Reader(
        make=_quantized, file="model.safetensors", read=_open_quantized, spoiled=spoiled_bytes
    ),
    "tokenizer.json": Reader(make=write_tokenizer, file="tokenizer.json", read=load_tokenizer),
    "tokenizer_config.json": Reader(make=write_tokenizer, file="tokenizer_config.json", read=load_tokenizer),
    "special tokens": Reader(make=write_tokenizer, file="special_tokens_map.json", read=load_tokenizer),
    "plan": Reader(make=write_plan, file="plan.json", read=_views),
    "scores": Reader(make=write_plan, file="plan.safetensors", read=_views, spoiled=spoiled_bytes),
    "interrupted search": Reader(make=write_plan, file="plan.json", read=read_identity),
    "sweep": Reader(make=_sweep, file="sweep.json", read=_curve, slow=2),
    "plan of a sweep": Reader(make=_sweep, file="one/plan.json", read=_curve, slow=2),
    **{
        f"report of {name}": Reader(make=_results, file=name, read=_report, slow=2)
        for name in ("plan.json", "pruning_summary.json", "evaluation.json", "verification.json", "results.json")
    },
    "comparison": Reader(make=_results, file="results.json", read=lambda d: compare_results(d, d)),
    "genai config": Reader(make=_onnx, file="export/genai_config.json", read=_read_onnx),
    "export record": Reader(make=_onnx, file="export/sentei_export.json", read=_read_onnx),
    "signature": Reader(make=_sign, file="signed/model.sig", read=_check_signature),
    "public key": Reader(make=_sign, file="key.pub", read=_check_signature, spoiled=spoiled_bytes),
    "private key": Reader(
        make=_sign, file="key.pem", spoiled=spoiled_bytes,
        read=lambda d: open_signing_key(str(d / "key.pem"), lambda: None),
    ),
    "model card": Reader(make=_card, file="README.md", read=stated_licences, spoiled=spoiled_bytes),
    "GGUF": Reader(
        make=_gguf, file="model.gguf", spoiled=spoiled_bytes,
        read=lambda d: gguf_import._model_class(d / "model.gguf", read_gguf_header(d / "model.gguf")),
    ),
    "JSONL text": Reader(
        make=_write_lines("text.jsonl", {"text": "one"}, {"text": "two"}), file="text.jsonl",
        read=_documents("text.jsonl"), spoiled=spoiled_bytes,
    ),
    "a line of text": Reader(make=_write_lines("text.jsonl", {"text": "one"}), file="text.jsonl",
                             read=_documents("text.jsonl")),
    "plain text": Reader(make=_write_lines("text.txt", "one"), file="text.txt", read=_documents("text.txt"),
                         spoiled=spoiled_bytes),
    "parquet": Reader(make=_parquet, file="text.parquet", read=_documents("text.parquet"), spoiled=spoiled_bytes),
    "questions": Reader(make=_write_lines("q.jsonl", _QUESTION), file="q.jsonl",
                        read=lambda d: load_user_questions(file=str(d / "q.jsonl"))),
    "questions of lm-eval": Reader(make=_write_lines("q.jsonl", _HELLASWAG), file="q.jsonl",
                                   read=lambda d: load_hellaswag(file=str(d / "q.jsonl"), fields=["endings", "label"])),
    "prompts": Reader(make=_prompts, file="prompts.jsonl",
                      read=lambda d: read_prompts(d / "prompts.jsonl", output_len=None, tokenizer=d)),
    "adapter": Reader(make=_adapter, file="adapter_model.safetensors", spoiled=spoiled_bytes,
                      read=lambda d: check_adapters(d / "model", ["--lora-modules", f"a={d}"])),
    "journal": Reader(make=_journal, file="measured.jsonl", read=Journal, spoiled=spoiled_bytes),
    "settings of a benchmark": Reader(make=_journal, file="out.unfinished/settings.json", read=_reopen),
    "inputs of a healing": Reader(make=_training, file="out.heal/inputs.json", read=_go_on),
    "state of a training": Reader(make=_training, file="out.heal/checkpoint-1/trainer_state.json", read=_go_on),
    "costs": Reader(make=_costs, file="costs.json", read=_predict),
    "part of an evaluation": Reader(make=_part, file="part.json", read=_read_part),
    "losses of an evaluation": Reader(
        make=_losses, file="part.safetensors", spoiled=spoiled_bytes,
        read=lambda d: read_losses(d / "part.json", (2, 3)),
    ),
}  # fmt: skip
