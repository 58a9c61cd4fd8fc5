"""``sentei deploy-kit``."""

from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from toolchain.cli.console import Output
from toolchain.cli.options import ForceOption, JsonOption, OutOption, QuietOption
from toolchain.outputs import check_output_directory, writes_directory


@writes_directory
def deploy_kit(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="One export, or the original and then the candidate.")
    ],
    *,
    out: OutOption,
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call the model; by default the first directory's name.")
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of prompt and answer together; by default the context that both models have."),
    ] = None,
    registry: Annotated[str, typer.Option(help="Registry for the images, such as registry.example:5000/llm.")] = (
        "localhost"
    ),
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write what operators need to deploy exports: images, Kubernetes, Envoy, dashboards, a canary and a runbook."""
    output = Output(as_json=as_json, quiet=quiet)
    from serving.deploy_kit.facts import gather
    from serving.deploy_kit.render import has_kserve, write_kit

    check_output_directory(out, force=force, inputs=directories)
    output.note("Reading all files for the tags of their images ...")
    kit = gather(
        directories, model_name=served_model_name, max_model_len=max_model_len, registry=registry,
        version=version("sentei"),
    )  # fmt: skip
    for side, directory in zip(kit.sides, directories, strict=True):
        if not side.was_verified:
            output.note(f"{directory} has no verification.json: it was never compared with another model.")
    if kit.max_model_len > (verified := min(side.context for side in kit.sides)):
        output.note(
            f"Above {verified} tokens, vLLM uses the long rotary factors for every prompt, also for short ones: "
            "that is not what was verified."
        )
    if kit.sides[0].engine == "vllm" and not has_kserve(kit):
        output.note("There is no file for KServe, whose shell would read the model's name as a command.")
    files = write_kit(kit, out, force=force)
    result: dict[str, Any] = {"kit": str(out), "files": files, "name": kit.name, "model_name": kit.model_name}
    output.result(result, lambda console: _show(console, out, files))


def _show(console: Console, out: Path, files: list[str]) -> None:
    console.print(f"{out}: {len(files)} files. Begin with {out / 'runbook.en.md'} or {out / 'runbook.ja.md'}.")
