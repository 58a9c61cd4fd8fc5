"""What a user chooses for a benchmark, and whether these choices go together."""

import importlib.util
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from serving.benchmark.engine_options import EngineShape, read_vllm_options
from serving.benchmark.goodput import ATTAINMENT
from serving.benchmark.metrics import DEFAULT_PRIMARY, check_primary
from serving.benchmark.workload import Slo, Workload
from serving.engines.spec import PANDAS, SERVERS, EngineSpec, engine_spec
from serving.server.process import HOST, START_TIMEOUT_S
from toolchain.devices import parse_device
from toolchain.errors import MissingDependencyError, SenteiError

MIN_REPEATS = 3
STALL_TIMEOUT_S = 600.0
# Below half nobody is served; above, no search of affordable length tells a share from a higher one.
_LEAST_ATTAINMENT, _MOST_ATTAINMENT = 0.5, 0.995
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """How both models are measured.

    Attributes:
        engine: What runs both; a name of :data:`serving.engines.spec.ENGINES`.
        workloads: See :func:`serving.benchmark.workload.make_workloads`. The verdict is about the first.
        slo: If given, the highest request rate that meets these limits is searched for too; servers alone.
        attainment: The share of the requests that must meet them.
        repeats: How often both are measured.
        primary: The metric that decides; the others are marked as exploratory.
        device: ``auto``, ``cpu`` or ``cuda``, of Transformers and ONNX; ``auto`` is an ONNX export's own. Servers and
            vLLM have theirs.
        dtype: Computed in; by default the checkpoint's own. An ONNX export has its precision built in.
        engine_options: Options for vLLM or the server, for both models.
        urls: Servers that run already, the original's and then the pruned model's; servers alone.
        api_key: What these servers ask for. It is never written.
        mixed_precision: Whether the models may differ in precision; what is gained is then not pruning's alone.
        price_per_hour: Of the machine, in any currency; gives the cost of a million output tokens.
        start_timeout_s: How long a server, or a worker's loading, may take until it is ready.
        stall_timeout_s: How long an engine may go without a token before it counts as hung; without a server, each
            2048 tokens of a batch's prompts have as long.
    """

    engine: str
    workloads: Sequence[Workload]
    slo: Slo | None = None
    attainment: float = ATTAINMENT
    repeats: int = 5
    primary: str = DEFAULT_PRIMARY
    device: str = "auto"
    dtype: str | None = None
    engine_options: Sequence[str] = ()
    urls: Sequence[str] = ()
    api_key: str | None = field(default=None, repr=False)
    mixed_precision: bool = False
    price_per_hour: float | None = None
    start_timeout_s: float = START_TIMEOUT_S
    stall_timeout_s: float = STALL_TIMEOUT_S

    @property
    def spec(self) -> EngineSpec:
        """What is known of the engine.

        Raises:
            SenteiError: There is no such engine.
        """
        return engine_spec(self.engine)

    @property
    def widest(self) -> Workload:
        """The workload with the most requests in flight: a warm-up must be as wide."""
        return max(self.workloads, key=lambda workload: workload.width)

    @property
    def shape(self) -> EngineShape:
        """What the engine's options change of what is expected.

        Raises:
            SenteiError: One of them changes it in a way that is not modelled.
        """
        return read_vllm_options(self.engine_options) if self.spec.is_vllm else EngineShape()

    @property
    def options(self) -> dict[str, Any]:
        """The choices beside engine and load, as ``results.json`` has them."""
        return {
            "device": self.device, "dtype": self.dtype, "repeats": self.repeats,
            "engine_options": list(self.engine_options), "urls": list(self.urls), "primary": self.primary,
            "price_per_hour": self.price_per_hour,
            # Results from before had no such choice.
            **({"mixed_precision": True} if self.mixed_precision else {}),
        }  # fmt: skip


def check_settings(settings: BenchmarkSettings, num_models: int) -> None:
    """Refuses what cannot be measured, before anything is read.

    Raises:
        SenteiError: A setting that cannot be, or that this engine does not take.
        MissingDependencyError: The engine is not installed.
    """
    if not settings.workloads:
        raise SenteiError("There is nothing to measure: no load is given.")
    spec = settings.spec
    check_primary(settings.primary, output_len=settings.workloads[0].output_len, undefined=spec.undefined)
    if settings.repeats < MIN_REPEATS:
        raise SenteiError(
            f"{settings.repeats} repeats cannot give an interval worth printing.",
            f"Use at least {MIN_REPEATS}, better 5.",
        )
    if not spec.is_server and (settings.urls or settings.slo):
        raise SenteiError(f"Engine {spec.name} takes no --url and no --slo.", f"They are for {' and '.join(SERVERS)}.")
    if not _LEAST_ATTAINMENT <= settings.attainment <= _MOST_ATTAINMENT:
        raise SenteiError(
            f"attainment is {settings.attainment}; it must be from {_LEAST_ATTAINMENT} to {_MOST_ATTAINMENT}.",
            "It is the share of requests that must meet the limits, such as 0.95.",
        )
    if settings.urls:
        _check_urls(settings.urls, num_models)
    elif num_models == 1:
        raise SenteiError(
            "There is nothing to compare with.", "Give the pruned model too, or one running server's --url."
        )
    _check_device_and_dtype(settings)
    _check_engine_options(settings)
    libraries = (*spec.libraries, PANDAS) if settings.widest.prompts else spec.libraries
    for module, library, extra in libraries:
        if importlib.util.find_spec(module) is None:
            raise MissingDependencyError(library, extra)


def _check_device_and_dtype(settings: BenchmarkSettings) -> None:
    spec, dtype = settings.spec, settings.dtype
    parse_device(settings.device)
    if dtype is not None and (dtype not in _DTYPES or spec.reads_onnx):
        allowed = "leave it out: an ONNX export has its precision built in" if spec.reads_onnx else ", ".join(_DTYPES)
        raise SenteiError(f"dtype {dtype!r} is not possible with engine {spec.name}.", f"Allowed: {allowed}.")
    if settings.device != "auto" and not spec.in_worker:
        owner = "its export" if spec.reads_onnx else "the vLLM that is installed"
        raise SenteiError(f"Engine {spec.name} takes no --device: {owner} decides.", "Leave it out.")


def _check_engine_options(settings: BenchmarkSettings) -> None:
    spec, names = settings.spec, [option.split("=")[0] for option in settings.engine_options]
    if names and spec.in_worker:
        raise SenteiError(f"Engine {spec.name} takes no engine options.", "They are for vLLM and for servers.")
    if names and settings.urls:
        raise SenteiError("Engine options are for servers that sentei starts; with --url it starts none.")
    if not spec.reads_onnx and "--dtype" in names:
        raise SenteiError("The engine option --dtype would hide the precision from the results.", "Use --dtype.")
    if any(name.replace("_", "-") == "--api-key" for name in names):
        raise SenteiError("--api-key would be written into the results.", "Set VLLM_API_KEY: both sides take it.")
    _ = settings.shape


def _check_urls(urls: Sequence[str], num_models: int) -> None:
    """Refuses anything but one server for each model."""
    if len(urls) != num_models or any(not url.startswith(("http://", "https://")) for url in urls):
        raise SenteiError(
            f"--url takes one server for each model, the original's first; given: {', '.join(urls)}.",
            "Write --url http://127.0.0.1:8000 --url http://127.0.0.1:8001, or name one model.",
        )
    if len(set(map(_address, urls))) < len(urls):
        raise SenteiError(f"--url {urls[0]} is given for both models.", "Give each model's own server.")


def _address(url: str) -> tuple[str, str | None, int | None, str]:
    try:
        parts = urllib.parse.urlsplit(url)
        host = HOST if parts.hostname == "localhost" else parts.hostname
        return parts.scheme, host, parts.port, parts.path.rstrip("/")
    except ValueError as error:
        raise SenteiError(f"--url {url} is not a URL ({error}).", "Write it like http://127.0.0.1:8000.") from error
