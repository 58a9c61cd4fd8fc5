"""``sentei serve`` and ``sentei generate``."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from toolchain.cli.console import Output, compute_dtype, pick_device
from toolchain.cli.options import DeviceOption, DtypeOption, JsonOption, QuietOption, seed_option
from toolchain.cli.terminal import printable
from toolchain.errors import MissingDependencyError, SenteiError

_AUTO, _SERVABLE = "auto", ("vllm", "onnx")


def serve(
    context: typer.Context,
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A model, pruned, quantised, or neither; or an ONNX export.")
    ],
    engine: Annotated[str, typer.Option(help="vllm or onnx; auto chooses by what DIR holds.")] = "auto",
    force: Annotated[
        bool, typer.Option("--force", help="Serve what failed its verification, or does not fit, with a warning.")
    ] = False,
    require_signature: Annotated[
        Path | None, typer.Option(metavar="KEY.pub", help="Serve only if every byte is what this key's owner signed.")
    ] = None,
) -> None:
    """Start an OpenAI server on loopback: vLLM with the plugin, or ONNX Runtime. Options after -- go to the server."""
    from serving.engines.spec import ENGINES
    from serving.onnx_export.files import is_onnx_export

    if require_signature is not None:
        from serving.signing.signature import check_signature

        check_signature(directory, require_signature)
    is_onnx = is_onnx_export(directory)
    if engine not in (_AUTO, *_SERVABLE):
        raise SenteiError(f"--engine {engine!r} is not known.", "Choose auto, vllm or onnx.")
    if engine != _AUTO and is_onnx != ENGINES[engine].reads_onnx:
        kind = "an ONNX export" if is_onnx else "no ONNX export"
        raise SenteiError(f"{directory} is {kind}; engine {engine!r} cannot serve it.", "Use --engine auto.")
    from serving.before_serving import check_before_serving

    if is_onnx:
        check_before_serving(directory, context.args, force=force)
        _serve_onnx(directory, context.args)
        return
    from toolchain.checkpoint.quantized import open_servable

    open_servable(directory)
    check_before_serving(directory, context.args, force=force)
    from serving.server.vllm.server import serve as run

    raise typer.Exit(run(directory, context.args))


def _serve_onnx(directory: Path, options: list[str]) -> None:
    try:
        from serving.server.onnx.server import serve
    except ModuleNotFoundError as error:
        raise MissingDependencyError(str(error.name).partition(".")[0], "onnx") from error
    serve(directory, options)


def generate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint, or an ONNX export.")],
    *,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write, at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above 0, tokens are sampled.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the likeliest tokens whose probabilities add up to this.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from this many likeliest tokens; 0 means all.")] = 0,
    seed: Annotated[int | None, seed_option("Seed for sampling.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Try a model: continue a prompt."""
    output = Output(as_json=as_json, quiet=quiet)
    if max_new_tokens < 1:
        raise SenteiError(f"--max-new-tokens {max_new_tokens} is less than 1.")
    from serving.engines.generate import stream_text
    from serving.engines.sampling import Sampling
    from serving.onnx_export.files import is_onnx_export
    from toolchain.checkpoint.directory import open_checkpoint

    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    is_onnx = is_onnx_export(directory)
    if is_onnx:
        if (device, dtype) != ("auto", "auto"):
            raise SenteiError(
                "An ONNX export runs where and in what it was made for; --device and --dtype are for checkpoints.",
                "Leave them out.",
            )
        pieces = stream_text(directory, prompt, max_new_tokens=max_new_tokens, sampling=sampling, chat=chat)
    else:
        picked = pick_device(device)
        dtype_ = compute_dtype(dtype, picked, open_checkpoint(directory).dtype)
        pieces = stream_text(
            directory, prompt, max_new_tokens=max_new_tokens, sampling=sampling, chat=chat, dtype=dtype_, device=picked,
            note=output.note,
        )  # fmt: skip
    parts = []
    for piece in pieces:
        parts.append(piece)
        if not as_json:
            sys.stdout.write(printable(piece) if sys.stdout.isatty() else piece)
            sys.stdout.flush()
    engine = "onnx" if is_onnx else "transformers"
    output.result({"prompt": prompt, "text": "".join(parts), "engine": engine}, lambda console: console.print())
