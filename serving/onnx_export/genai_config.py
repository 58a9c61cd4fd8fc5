"""``genai_config.json`` by a closed list: an export may come from a stranger, and this file can run code.

onnxruntime-genai loads the library that ``custom_ops_library`` names, takes addresses in memory among the options of
a provider, and hands every session option that it does not know to ONNX Runtime. So a key that is not in this module is
refused. The keys are those that onnxruntime-genai's model builder writes for decoders of text, and a few harmless ones
that people add. No text may hold a quote or a backslash, so that no other parser can read the file in another way.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from toolchain.errors import SenteiError

_LONGEST_PLACE = 200
# A file name without a folder. It cannot be "..", hidden, or one of ONNX Runtime's tags for addresses in memory.
BARE_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.+-]*$"

_Text = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.%/:+ -]*$", max_length=200)]
_Switch = Literal["0", "1"]
_Size = Annotated[int, Field(ge=1, le=2**16)]
_Length = Annotated[int, Field(ge=1, le=2**31 - 1)]
_Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
_Token = Annotated[int, Field(ge=-1, le=2**31 - 1)]
_Tokens = _Token | Annotated[list[_Token], Field(max_length=1000)] | None


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class _CudaOptions(_Closed):
    enable_cuda_graph: _Switch = "0"
    enable_skip_layer_norm_strict_mode: _Switch = "0"
    device_id: Annotated[str, Field(pattern=r"^[0-9]{1,3}$")] = "0"


class _CpuOptions(_Closed):
    pass


class _Provider(_Closed):
    cpu: _CpuOptions | None = None
    cuda: _CudaOptions | None = None


class _SessionOptions(_Closed):
    provider_options: Annotated[list[_Provider], Field(max_length=4)] = []
    log_id: _Text = ""
    log_severity_level: Annotated[int, Field(ge=0, le=4)] = 2
    intra_op_num_threads: Annotated[int, Field(ge=0, le=1024)] = 0
    inter_op_num_threads: Annotated[int, Field(ge=0, le=1024)] = 0
    enable_cpu_mem_arena: bool = True
    enable_mem_pattern: bool = True
    graph_optimization_level: Literal[
        "ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_LAYOUT", "ORT_ENABLE_ALL"
    ] = "ORT_ENABLE_ALL"
    allow_spinning: _Switch = Field("1", alias="session.intra_op.allow_spinning")
    device_allocator: _Switch = Field("0", alias="session.use_device_allocator_for_initializers")
    fpa_intb_gemm: _Switch = Field("0", alias="ep.cuda.fpa_intb_gemm")
    disabled_optimizers: Literal["MatMulNBitsFusion"] | None = Field(
        None, alias="optimization.disable_specified_optimizers"
    )


class _Inputs(_Closed):
    input_ids: _Text = ""
    attention_mask: _Text = ""
    position_ids: _Text = ""
    past_key_names: _Text = ""
    past_value_names: _Text = ""
    past_key_scale_names: _Text = ""
    past_value_scale_names: _Text = ""


class _Outputs(_Closed):
    logits: _Text = ""
    present_key_names: _Text = ""
    present_value_names: _Text = ""
    present_key_scale_names: _Text = ""
    present_value_scale_names: _Text = ""


class _SlidingWindow(_Closed):
    window_size: _Length
    slide_key_value_cache: bool = False
    slide_inputs: bool = False
    layers: Annotated[list[_Count], Field(max_length=4096)] = []
    cache_slack: _Count = 0


class _Decoder(_Closed):
    filename: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+-]*\.onnx$", max_length=200)]
    head_size: _Size
    num_attention_heads: _Size
    num_key_value_heads: _Size
    num_hidden_layers: _Size = 1
    hidden_size: Annotated[int, Field(ge=1, le=2**20)] = 1
    session_options: _SessionOptions
    inputs: _Inputs = _Inputs()
    outputs: _Outputs = _Outputs()
    sliding_window: _SlidingWindow | None = None


class _Model(_Closed):
    type: Annotated[str, Field(pattern=r"^[a-z0-9_.-]*$", max_length=100)] = ""
    context_length: _Length
    vocab_size: _Length
    eos_token_id: _Tokens
    bos_token_id: _Tokens = None
    pad_token_id: _Tokens = None
    bot_token_id: _Tokens = None
    eot_token_id: _Tokens = None
    bor_token_id: _Tokens = None
    eor_token_id: _Tokens = None
    decoder: _Decoder


class _Search(_Closed):
    """What is searched for where the caller does not say it; sentei says it."""

    do_sample: bool = False
    early_stopping: bool = True
    past_present_share_buffer: bool = True
    max_length: _Count = 0
    min_length: _Count = 0
    batch_size: _Count = 1
    num_beams: _Count = 1
    num_return_sequences: _Count = 1
    no_repeat_ngram_size: _Count = 0
    chunk_size: _Count = 0
    random_seed: int = -1
    top_k: int = 50
    top_p: float = 1.0
    temperature: float = 1.0
    diversity_penalty: float = 0.0
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0


class GenaiConfig(_Closed):
    """The whole file."""

    model: _Model
    search: _Search = _Search()


def parse_genai_config(content: Any, where: str) -> GenaiConfig:
    """Checks the file's content against the closed list.

    Args:
        content: As :func:`toolchain.json_files.read_json` read it.
        where: Names the file in the error.

    Raises:
        SenteiError: A key is not on the list, or something is missing or out of range.
    """
    try:
        return GenaiConfig.model_validate(content)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        for each in found:
            if each["type"] == "extra_forbidden":
                raise SenteiError(
                    f"{where}: {_place(each['loc'])} is not known to sentei and could run code.",
                    "Export the model again from its checkpoint, or remove the key.",
                ) from error
        raise SenteiError(
            f"{where} is damaged ({_place(found[0]['loc'])}: {found[0]['msg']}).", "Export the model again."
        ) from error


def _place(location: tuple[int | str, ...]) -> str:
    """The way to a key; it is the stranger's, so it must not move the terminal's cursor."""
    return ascii(".".join(map(str, location)))[1:-1][:_LONGEST_PLACE]
