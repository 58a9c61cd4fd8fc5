"""``sentei export`` and ``sentei verify``: an export is verified before it is called done."""

import importlib.util
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from toolchain.cli.arguments import CheckedTyper
from toolchain.cli.console import Output, pick_device, pick_dtype
from toolchain.cli.options import (
    AnyModelArgument,
    ForceOption,
    JsonOption,
    OffloadOption,
    OutOption,
    QuietOption,
    against_option,
    device_option,
    dtype_option,
    offload_option,
    tensor_parallel_option,
)
from toolchain.errors import CheckFailedError, SenteiError
from toolchain.outputs import held_in_place, writes_directory

VerifyingDeviceOption = Annotated[str, device_option(", to verify it on.")]
app = CheckedTyper(help="Make a deployable directory from a checkpoint, pruned or not.", no_args_is_help=True)


class Precision(StrEnum):
    """Weight precisions of an ONNX export."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"
    int8 = "int8"
    int4 = "int4"


class OnnxDevice(StrEnum):
    """What an ONNX export is made for."""

    cpu = "cpu"
    cuda = "cuda"


def default_precision(device: OnnxDevice) -> Precision:
    """Of an export for which nobody asks for one."""
    return Precision.fp32 if device is OnnxDevice.cpu else Precision.fp16


class VerifyEngine(StrEnum):
    """What runs the export while it is verified."""

    auto = "auto"
    transformers = "transformers"
    vllm = "vllm"
    onnx = "onnx"


@app.command("vllm")
@writes_directory
def export_vllm(
    model: AnyModelArgument,
    *,
    out: OutOption,
    dtype: Annotated[
        str, dtype_option("Dtype to store weights in: auto (unchanged), float32, bfloat16 or float16.")
    ] = "auto",
    tensor_parallel: Annotated[int, tensor_parallel_option()] = 1,
    max_shard_gb: Annotated[float, typer.Option(help="Largest weight file, in GB.")] = 5.0,
    device: VerifyingDeviceOption = "auto",
    offload: OffloadOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write a directory that stock vLLM serves with the sentei plugin."""
    output = Output(as_json=as_json, quiet=quiet)
    from export.vllm import export_vllm as run
    from toolchain.checkpoint.directory import resolve_model

    verified_on = pick_device(device)
    directory = resolve_model(model)

    run(
        directory,
        out,
        dtype=pick_dtype(dtype, auto=None),
        tensor_parallel=tensor_parallel,
        max_shard_bytes=int(max_shard_gb * 1e9),
        force=force,
    )
    _verify(output, out, directory, engine=VerifyEngine.transformers, device=verified_on, offload=offload)


@app.command("onnx")
@writes_directory
def export_onnx(
    model: AnyModelArgument,
    *,
    out: OutOption,
    precision: Annotated[
        Precision | None,
        typer.Option(help="fp32, int8 or int4 on cpu (fp32 if not given); fp16, bf16, int8 or int4 on cuda (fp16)."),
    ] = None,
    device: Annotated[
        OnnxDevice, typer.Option(help="Device that the export is for; cuda needs no GPU here.")
    ] = OnnxDevice.cpu,
    offload: Annotated[
        bool, offload_option("No effect: the export holds the whole model, and its verification one layer at a time.")
    ] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write an ONNX graph with KV cache for onnxruntime-genai and plain ONNX Runtime."""
    output = Output(as_json=as_json, quiet=quiet)
    from export.onnx_graph import export_onnx as run
    from toolchain.checkpoint.directory import resolve_model

    directory = resolve_model(model)

    picked = precision or default_precision(device)
    run(directory, out, precision=picked.value, device=device.value, force=force, on_progress=output.note)
    _verify(output, out, directory, engine=VerifyEngine.onnx, device=pick_device("auto"), offload=offload)


@app.command("nemotron-nas")
@writes_directory
def export_nemotron_nas(
    model: AnyModelArgument,
    *,
    out: OutOption,
    device: VerifyingDeviceOption = "auto",
    offload: OffloadOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write DeciLM's form for servers that take no plugin: stock vLLM with trust_remote_code, and llama.cpp."""
    output = Output(as_json=as_json, quiet=quiet)
    from export.decilm import export_nemotron_nas as run
    from toolchain.checkpoint.directory import resolve_model

    verified_on = pick_device(device)
    directory = resolve_model(model)

    told = run(directory, out, force=force)
    output.note(
        f"{out} needs trust_remote_code: a server that loads it runs configuration_decilm.py of that directory."
    )
    if told["llama_cpp_obstacle"]:
        output.note(f"llama.cpp cannot have it: {told['llama_cpp_obstacle']}.")
    if importlib.util.find_spec("vllm") is None:
        output.note("vLLM is not installed: weights were compared, answers were not. Run sentei verify where it is.")
        output.result({"directory": str(out), **told}, lambda console: _show(console, out, told))
        return
    _verify(output, out, directory, engine=VerifyEngine.vllm, device=verified_on, offload=offload)


def verify(
    exported: Annotated[Path, typer.Argument(metavar="EXPORTED", help="What sentei export wrote.")],
    *,
    against: Annotated[str | None, against_option("The checkpoint it was made from.")] = None,
    signature: Annotated[
        Path | None,
        typer.Option(metavar="KEY.pub", help="Check instead that every byte is what this key's owner signed."),
    ] = None,
    engine: Annotated[VerifyEngine, typer.Option(help="What runs the export.")] = VerifyEngine.auto,
    text: Annotated[Path | None, typer.Option(help="Prompts from this text instead of the built-in ones.")] = None,
    device: Annotated[str, device_option(", to compute the reference on.")] = "auto",
    dtype: Annotated[str, dtype_option("Dtype of the reference: auto (float32), bfloat16 or float16.")] = "auto",
    offload: OffloadOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run the same prompts through an export and its checkpoint, or check its signature; fail if something differs."""
    output = Output(as_json=as_json, quiet=quiet)
    if signature is not None:
        if (against, engine, text, device, dtype, offload) != (None, VerifyEngine.auto, None, "auto", "auto", False):
            raise SenteiError(
                "--signature looks at files alone; the other options are about answers.", "Give one or the other."
            )
        _verify_signature(output, exported, signature)
        return
    if against is None:
        raise SenteiError(
            "sentei verify needs something to compare with.",
            "Give --against MODEL, the checkpoint that the export was made from, or --signature KEY.pub.",
        )
    from serving.signing.signed_files import SIGNATURE_FILE
    from toolchain.checkpoint.directory import resolve_model

    if (exported / SIGNATURE_FILE).exists():
        raise SenteiError(
            f"{exported} is signed, and the verdict would be written into it, which ends the signature.",
            f"Check it with --signature KEY.pub; or delete {SIGNATURE_FILE}, verify, and sign again.",
        )
    _verify(
        output,
        exported,
        resolve_model(against),
        engine=engine,
        text=text,
        device=pick_device(device),
        dtype=dtype,
        offload=offload,
    )


def _verify_signature(output: Output, exported: Path, public_key: Path) -> None:
    from serving.signing.signature import check_signature

    output.note(f"Checking {exported} ...")
    signed = check_signature(exported, public_key)
    result = {"directory": str(exported), "files": len(signed.files), "key_sha256": signed.key_sha256}
    said = f"{exported}: all {result['files']} files are as they were signed, by key {signed.key_sha256[:16]}"
    output.result(result, lambda console: console.print(said))


def _verify(
    output: Output,
    exported: Path,
    against: Path,
    *,
    engine: VerifyEngine,
    device: str,
    offload: bool,
    text: Path | None = None,
    dtype: str = "auto",
) -> None:
    import torch

    from serving.verify.verify import verify as run

    computed_in = pick_dtype(dtype, auto=torch.float32)
    assert computed_in is not None
    output.note(f"Verifying {exported} against {against} on {device} ...")
    with held_in_place(exported):
        verdict: dict[str, Any] = run(
            exported, against, engine=engine.value, text=text, device=device, dtype=computed_in, offload=offload,
            progress=output.progress,
        )  # fmt: skip
    if verdict["not_run"]:
        output.note(verdict["not_run"])
    output.result({"directory": str(exported), **verdict}, lambda console: _show(console, exported, verdict))
    if not verdict["passed"]:
        raise CheckFailedError(
            f"{exported} differs from {against} beyond the tolerances.", "Do not deploy it; see verification.json."
        )


def _show(console: Console, exported: Path, verdict: dict[str, Any]) -> None:
    passed, style = ("verified", None) if verdict["passed"] else ("FAILED", "red")
    console.print(f"{exported}: {passed} ({verdict['engine']})", style=style)
    for key, value in verdict.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and key != "schema_version":
            console.print(f"  {key:<36} {value:.6g}")
