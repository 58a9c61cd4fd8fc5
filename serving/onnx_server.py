"""OpenAI's HTTP endpoints for an ONNX export, on loopback unless told otherwise.

``python -m serving.onnx_server DIR [options]``. One thread owns the model and decodes all answers together
(:mod:`serving.onnx_batch`); the event loop of the HTTP server only passes texts on.
"""

import argparse
import asyncio
import json
import os
import queue
import socket
import sys
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import jinja2
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from serving.answer_text import AnswerText, Piece
from serving.onnx_batch import BatchRequest, OnnxBatch
from serving.onnx_engine import OnnxEngine
from serving.openai_protocol import ChatCompletionRequest, CompletionRequest, Reply
from serving.sampling import Sampler
from serving.vllm_launcher import end_with_parent
from serving.vllm_server import HOST, START_TIMEOUT_S, free_port, running_process
from toolchain.errors import SenteiError
from toolchain.modeling import load_tokenizer

DEFAULT_MAX_NUM_SEQS = 8
_DEFAULT_MAX_TOKENS = 16  # OpenAI's, of completions


def serve(directory: Path, options: Sequence[str]) -> None:
    """Serves an export until a signal comes.

    Args:
        directory: The export.
        options: ``--host``, ``--port``, ``--max-num-seqs`` and ``--max-model-len``, as vLLM calls them.

    Raises:
        SenteiError: The export is damaged or does not fit, or the address is taken.
        MissingDependencyError: onnxruntime is not installed.
    """
    given = _parse(options)
    listener = _bind(given.host, given.port)  # before the model is loaded: an address that is taken is told at once
    api = OnnxApi(directory, max_num_seqs=given.max_num_seqs, max_model_len=given.max_model_len)
    # An answer under way does not keep the server from stopping.
    config = uvicorn.Config(api.app(), access_log=False, timeout_graceful_shutdown=1)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])


@contextmanager
def running_server(
    directory: Path,
    *,
    port: int | None = None,
    options: Sequence[str] = (),
    log: Path,
    timeout_s: float = START_TIMEOUT_S,
) -> Iterator[str]:
    """Runs :func:`serve` in a process of its own; see :func:`serving.vllm_server.running_server`."""
    port = port or free_port()
    command = [sys.executable, "-m", "serving.onnx_server", str(directory.resolve()), *options, "--port", str(port)]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    with running_process("ONNX", command, environment, port=port, log=log, timeout_s=timeout_s) as base_url:
        yield base_url


class OnnxApi:
    """The endpoints, and the thread behind them."""

    def __init__(self, directory: Path, *, max_num_seqs: int, max_model_len: int | None) -> None:
        """Loads the model.

        Args:
            directory: The export; its full path is the model's name, as in vLLM.
            max_num_seqs: Answers at once; more wait.
            max_model_len: Tokens of prompt and answer; ``None`` is the model's context.

        Raises:
            SenteiError: The export is damaged, or memory or context are too small.
        """
        self._engine = OnnxEngine(directory)
        self._settings = self._engine.settings
        self._tokenizer = load_tokenizer(directory)
        self._name = str(directory.resolve())
        self._max_model_len = max_model_len or self._engine.batch_context_length
        try:
            self._batch = OnnxBatch(self._engine, max_num_seqs=max_num_seqs, max_model_len=self._max_model_len)
        except (MemoryError, RuntimeError) as error:  # the latter of CUDA
            raise SenteiError(
                f"There is no memory for {max_num_seqs} answers of {self._max_model_len} tokens.",
                "Lower --max-model-len or --max-num-seqs.",
            ) from error
        self._thread = _BatchThread(self._batch)

    def app(self) -> FastAPI:
        """The application; its life is the thread's."""

        @asynccontextmanager
        async def life(_: FastAPI) -> AsyncIterator[None]:
            self._thread.start()
            yield
            self._thread.stop()

        app = FastAPI(lifespan=life, docs_url=None, redoc_url=None)  # those pages load scripts from the internet
        app.add_api_route("/v1/completions", self.completions, methods=["POST"], response_model=None)
        app.add_api_route("/v1/chat/completions", self.chat_completions, methods=["POST"], response_model=None)
        app.add_api_route("/v1/models", self.models)
        app.add_api_route("/health", self.health, response_model=None)
        app.add_api_route("/metrics", self.metrics, response_class=PlainTextResponse)
        app.add_exception_handler(SenteiError, _refused)
        app.add_exception_handler(RequestValidationError, _refused)
        app.add_exception_handler(HTTPException, _refused)
        return app

    async def completions(self, body: CompletionRequest, connection: Request) -> Response:
        """Continues a prompt."""
        prompt = body.single_prompt
        ids = self._tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        return await self._answer(body, ids, body.max_tokens or _DEFAULT_MAX_TOKENS, connection)

    async def chat_completions(self, body: ChatCompletionRequest, connection: Request) -> Response:
        """Answers the last message of a chat."""
        if not self._tokenizer.chat_template:
            raise SenteiError("This model has no chat template.", "Use /v1/completions.")
        try:
            text = self._tokenizer.apply_chat_template(body.text_messages, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise SenteiError(f"messages: the model's chat template refuses them ({error}).") from error
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        rest = max(1, self._max_model_len - len(ids))
        return await self._answer(body, ids, body.max_completion_tokens or body.max_tokens or rest, connection)

    def models(self) -> dict[str, Any]:
        """The one model."""
        model = {"id": self._name, "object": "model", "created": 0, "owned_by": "sentei"}
        return {"object": "list", "data": [{**model, "max_model_len": self._max_model_len}]}

    def health(self) -> Response:
        """200 while answers can be given."""
        return Response(status_code=200 if self._thread.is_alive() else 503)

    def metrics(self) -> str:
        """Tokens since the start, in and out, under vLLM's names."""
        counts = {"prompt": self._batch.prompt_tokens, "generation": self._batch.generation_tokens}
        return "".join(f"vllm:{name}_tokens_total {count}\n" for name, count in counts.items())

    async def _answer(
        self, body: CompletionRequest | ChatCompletionRequest, ids: list[int], max_tokens: int, connection: Request
    ) -> Response:
        if body.model not in (None, self._name):
            raise HTTPException(404, f"The model {body.model!r} does not exist; this server has {self._name!r}.")
        self._check_length(ids, max_tokens)
        reply = Reply(chat=isinstance(body, ChatCompletionRequest), model=self._name, prompt_tokens=len(ids))
        pieces = _Pieces()
        text = AnswerText(
            self._tokenizer.backend_tokenizer,
            ids,
            max_tokens=max_tokens,
            stop_ids=() if body.ignore_eos else self._settings.eos_token_ids,
            stop_strings=body.stop_strings,
            emit=pieces.put,
        )
        request = BatchRequest(prompt=ids, take=text.take, fail=pieces.put, sampler=Sampler(body.sampling))
        self._thread.submit(request)
        if body.stream:
            events = _events(reply, pieces, request, include_usage=body.stream_options.include_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        return await _unless_gone(connection, request, _whole(reply, pieces))

    def _check_length(self, ids: Sequence[int], max_tokens: int) -> None:
        if not ids:
            raise SenteiError("The prompt is empty.")
        if not all(0 <= token < self._settings.vocab_size for token in ids):
            raise SenteiError(f"The prompt has token ids outside of 0 to {self._settings.vocab_size - 1}.")
        if len(ids) + max_tokens > self._max_model_len:
            raise SenteiError(
                f"The prompt has {len(ids)} tokens and {max_tokens} more are asked for; the context of this server "
                f"holds {self._max_model_len}.",
                "Shorten the prompt, or lower max_tokens.",
            )


class _BatchThread(threading.Thread):
    """Runs the batch while there is anything in it."""

    def __init__(self, batch: OnnxBatch) -> None:
        super().__init__(daemon=True)
        self._batch, self._stopping = batch, False
        self._arriving: queue.SimpleQueue[BatchRequest | None] = queue.SimpleQueue()

    def submit(self, request: BatchRequest) -> None:
        """From any thread: gives a request a row as soon as there is one."""
        self._arriving.put(request)

    def stop(self) -> None:
        """Ends the thread after the token that it is at."""
        self._stopping = True
        self._arriving.put(None)
        self.join()

    def run(self) -> None:
        """See the class."""
        while not self._stopping:
            with suppress(queue.Empty):
                while self._batch.has_room and (request := self._arriving.get(block=self._batch.is_empty)):
                    if not request.cancelled:
                        self._batch.join(request)
            try:
                self._batch.step()
            except Exception as error:  # whatever it is, the next requests may go well
                self._batch.fail(error)


class _Pieces:
    """Pieces on their way from the batch's thread to the event loop; an error is the last of them."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Piece | Exception] = asyncio.Queue()

    def put(self, piece: Piece | Exception) -> None:
        with suppress(RuntimeError):  # the server has ended meanwhile
            self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        while True:
            piece = await self._queue.get()
            if isinstance(piece, Exception):
                raise piece
            yield piece
            if piece.finish_reason:
                return


async def _whole(reply: Reply, pieces: _Pieces) -> Response:
    text, num_tokens = "", 0
    async for piece in pieces:
        text, num_tokens = text + piece.text, num_tokens + 1
        if piece.finish_reason:
            return JSONResponse(reply.whole(text, piece.finish_reason, num_tokens))
    raise AssertionError("pieces end with a finish reason or an error")


async def _events(reply: Reply, pieces: _Pieces, request: BatchRequest, *, include_usage: bool) -> AsyncIterator[str]:
    """The answer as server-sent events, one for each token."""
    num_tokens = 0
    try:
        async for piece in pieces:
            num_tokens += 1
            yield _event(reply.chunk(piece.text, piece.finish_reason, first=num_tokens == 1))
        if include_usage:
            yield _event(reply.usage_chunk(num_tokens))
        yield "data: [DONE]\n\n"
    except SenteiError as error:
        yield _event(_error(500, str(error)))
    finally:  # also where the client has gone
        request.cancelled = True


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _unless_gone(connection: Request, request: BatchRequest, answer: Coroutine[Any, Any, Response]) -> Response:
    """Waits for an answer for as long as the client does."""
    gone, done = asyncio.create_task(_disconnection(connection)), asyncio.create_task(answer)
    try:
        await asyncio.wait({gone, done}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            return Response(status_code=499)  # which nobody reads
        if isinstance(error := done.exception(), SenteiError):
            return JSONResponse(_error(500, str(error)), 500)
        return done.result()
    finally:
        request.cancelled = True
        gone.cancel()
        done.cancel()


async def _disconnection(connection: Request) -> None:
    while (await connection.receive())["type"] != "http.disconnect":
        pass


async def _refused(_: Request, error: Exception) -> Response:
    """Bad requests, in OpenAI's form."""
    if isinstance(error, HTTPException):
        return JSONResponse(_error(error.status_code, str(error.detail)), error.status_code)
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:]) or "body"
        return JSONResponse(_error(400, f"{place}: {first['msg']}."), 400)
    return JSONResponse(_error(400, str(error)), 400)


def _error(status: int, message: str) -> dict[str, Any]:
    kind = "internal_server_error" if status == 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def _parse(options: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sentei serve DIR --engine onnx --", allow_abbrev=False)
    parser.add_argument("--host", default=HOST, help="address to listen on")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--max-num-seqs", type=_positive, default=DEFAULT_MAX_NUM_SEQS, help="answers at once; more wait"
    )
    parser.add_argument("--max-model-len", type=_positive, help="tokens of prompt and answer; default: the context")
    return parser.parse_args(options)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _bind(host: str, port: int) -> socket.socket:
    """A socket with an address, which does not listen yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((address[0], port, *address[2:]))  # getaddrinfo takes a port modulo 65536
    except (OSError, OverflowError) as error:
        raise SenteiError(f"{host}:{port} cannot be listened on ({error}).", "Give another --port.") from error
    return bound


def main() -> None:
    """Runs :func:`serve` with this process's arguments."""
    end_with_parent()
    try:
        serve(Path(sys.argv[1]), sys.argv[2:])
    except SenteiError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
