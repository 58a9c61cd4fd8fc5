"""What several rows share."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.accidents.onnx_service import KEY, TEMPLATE, Service
from tests.conftest import SMALL_VOCABULARY, make_pico
from toolchain.checkpoint.directory import copy_companions


@pytest.fixture(scope="session")
def service(pico_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The ONNX server as a user starts it, with ``VLLM_API_KEY`` set."""
    from export.onnx_graph import export_onnx
    from serving.server.onnx.server import running_server

    source, out = tmp_path_factory.mktemp("source") / "pico", tmp_path_factory.mktemp("onnx") / "pico"
    make_pico(source, head_dim=16, vocab_size=SMALL_VOCABULARY)
    copy_companions(pico_model, source)
    (source / "chat_template.jinja").write_text(TEMPLATE)
    export_onnx(source, out)
    log = tmp_path_factory.mktemp("log") / "server.log"
    with ExitStack() as stack:
        # Only while it starts: the servers of later tests are to be open.
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_API_KEY", KEY)
            url = stack.enter_context(running_server(out, options=["--max-num-seqs", "2"], log=log))
        yield Service(url, log, out)
