"""What sets one engine apart from another: which models it runs, who runs it, and which settings it takes."""

from collections.abc import Mapping
from dataclasses import dataclass

from toolchain.errors import SenteiError

# A module, the library that brings it, and the extra of sentei that asks for it.
Library = tuple[str, str, str]
_ONNX, _VLLM = ("onnxruntime_genai", "onnxruntime-genai", "onnx"), ("vllm", "vllm", "vllm")
# vLLM's client reads files of prompts with it, and asks for it in an extra of its own.
PANDAS: Library = ("pandas", "pandas", "vllm")


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """One engine.

    Attributes:
        name: As the command line has it.
        reads_onnx: It runs ONNX exports, which have their precision and their device built in. The others run
            checkpoints.
        is_vllm: vLLM runs the model. It reserves the memory that it is told to.
        is_server: It answers requests as they come.
        in_worker: A process of sentei's own runs it. That takes a device, and no options of the engine.
        libraries: What must be installed.
        undefined: Metrics that it cannot measure.
    """

    name: str
    reads_onnx: bool = False
    is_vllm: bool = False
    is_server: bool = False
    in_worker: bool = False
    libraries: tuple[Library, ...] = ()
    undefined: frozenset[str] = frozenset()


_SPECS = (
    EngineSpec(name="transformers", in_worker=True),
    EngineSpec(name="onnx", reads_onnx=True, in_worker=True, libraries=(_ONNX,)),
    EngineSpec(name="vllm", is_vllm=True, is_server=True, libraries=(_VLLM,)),
    # vLLM's own client drives this server too.
    EngineSpec(name="onnx-server", reads_onnx=True, is_server=True, libraries=(_ONNX, _VLLM)),
    EngineSpec(
        name="vllm-offline",
        is_vllm=True,
        libraries=(_VLLM,),
        # Without a stream of tokens there is none of the times in between.
        undefined=frozenset({"mean_ttft_ms", "mean_tpot_ms", "mean_itl_ms", "p99_itl_ms"}),
    ),
)
ENGINES: Mapping[str, EngineSpec] = {each.name: each for each in _SPECS}
SERVERS = tuple(each.name for each in _SPECS if each.is_server)


def engine_spec(name: str) -> EngineSpec:
    """The engine of this name.

    Raises:
        SenteiError: There is none.
    """
    if name not in ENGINES:
        raise SenteiError(f"Engine {name!r} is not known.", f"Choose one of {', '.join(ENGINES)}.")
    return ENGINES[name]
