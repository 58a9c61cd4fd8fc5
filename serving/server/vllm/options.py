"""What sentei does not let vLLM's options do: run code that comes with a checkpoint.

vLLM takes its options in many spellings: shortened, with underscores, in a file, in JSON, in parts of JSON. So vLLM
parses them, and what comes out is checked, before anything of the model is read.

Where the line is: code of the checkpoint is refused (``trust_remote_code`` anywhere, a parser plugin inside the model's
directory). Options that load Python of the user's own (``--middleware``, ``--worker-cls``, ``--logits-processors``,
plugins that are installed) are the user's to give. Weights that are pickled (``--load-format pt``) are not refused:
vLLM reads them without running what they name. The nemotron-nas export needs ``trust_remote_code``; it is for servers
that sentei does not start.
"""

import dataclasses
import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from serving.server.api_keys import api_keys, warn_if_open
from serving.server.process import HOST
from toolchain.errors import SenteiError

_PLUGIN_FILES = ("tool_parser_plugin", "reasoning_parser_plugin")
_KEY_GUARD = "serving.server.vllm.key_guard.KeyGuard"  # as vLLM takes it; it needs Starlette


def refused_remote_code(option: str) -> SenteiError:
    """The error for an option that would run code from the checkpoint."""
    return SenteiError(f"{option} would run code from the checkpoint.", "sentei's checkpoints need none.")


def check_when_parsed() -> None:
    """Lets vLLM's parser end the program with exit code 2 if its result would run code from the checkpoint.

    A server whose options, those of a file included, name no host listens on loopback; vLLM's default is everywhere.
    """
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parse_args = FlexibleArgumentParser.parse_args

    def parse_and_check(self: Any, args: list[str] | None = None, namespace: Namespace | None = None) -> Namespace:
        parsed = parse_args(self, args, namespace)
        try:
            if _is_server(parsed):
                _complete(parsed)
            check_parsed(parsed)
        except SenteiError as error:
            print(f"Error: {error}", file=sys.stderr, flush=True)
            sys.exit(error.exit_code)
        return parsed

    FlexibleArgumentParser.parse_args = parse_and_check  # type: ignore[method-assign]


def check_parsed(parsed: Namespace) -> None:
    """Checks vLLM's options after vLLM has parsed them; warns of a server that is open to everybody.

    Raises:
        SenteiError: They would run code from the checkpoint, a key is empty, or nobody would ask for it.
    """
    options = vars(parsed)
    for name, value in options.items():
        if _trusts({name: value}):
            raise refused_remote_code(f"--{name.replace('_', '-')}")
    model = options.get("model_tag") or options.get("model")
    for name in _PLUGIN_FILES:
        if (plugin := options.get(name)) and model and _is_inside(plugin, model):
            raise refused_remote_code(f"--{name.replace('_', '-')} {plugin}")
    if _is_server(parsed):
        keys = api_keys(options.get("api_key"))
        if keys and options.get("grpc"):
            raise SenteiError("vLLM's gRPC server asks for no key.", "Leave out --grpc, or the key.")
        if not options.get("uds"):
            warn_if_open(options.get("host"), keys)


def _is_server(parsed: Namespace) -> bool:
    return vars(parsed).get("subparser") == "serve"


def _trusts(value: Any) -> bool:
    """Whether ``trust_remote_code`` is set somewhere in an option's value."""
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return any(
            (str(key).replace("-", "_") == "trust_remote_code" and each) or _trusts(each) for key, each in value.items()
        )
    return isinstance(value, Iterable) and not isinstance(value, str | bytes) and any(map(_trusts, value))


def _is_inside(file: str, directory: str) -> bool:
    return Path(file).resolve().is_relative_to(Path(directory).resolve())


def _complete(parsed: Namespace) -> None:
    """Has a server listen on loopback, names its model after its directory, and guards all paths if it has a key."""
    if not parsed.uds and parsed.host is None:
        parsed.host = HOST
    model = Path(vars(parsed).get("model_tag") or parsed.model)
    if parsed.served_model_name is None and model.is_dir():
        parsed.served_model_name = [model.resolve().name]
    if api_keys(parsed.api_key):
        # Inside the user's own, which may make our header of another one.
        parsed.middleware = [_KEY_GUARD, *parsed.middleware]
