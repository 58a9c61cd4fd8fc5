"""OpenAI's endpoints over one ONNX export.

One thread owns the model and decodes all answers together (:mod:`serving.server.continuous_batch`). The event loop
passes texts on, and does nothing that takes long: bodies are parsed and prompts tokenised in other threads (the
tokenizer does not hold Python's lock meanwhile), chat templates are rendered in another process.
"""

import asyncio
import json
import logging
import queue
import threading
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from serving.engines.onnxruntime import OnnxEngine
from serving.engines.sampling import Sampler
from serving.server.answer_text import AnswerText, Piece
from serving.server.continuous_batch import BatchRequest, OnnxBatch
from serving.server.http_guards import FAILED, KeyGuard, error_handlers, read_request
from serving.server.openai_protocol import ChatCompletionRequest, CompletionRequest, Reply
from toolchain.errors import SenteiError, is_panic
from toolchain.model.loading import load_tokenizer
from toolchain.text.chat_template import ChatTemplate

_LOG = logging.getLogger("uvicorn.error")
_DEFAULT_MAX_TOKENS = 16  # OpenAI's, of completions
# A prompt that fills the context has about 4 bytes per token; escaped in JSON, Japanese has up to 12.
_BODY_BYTES, _BODY_BYTES_PER_TOKEN = 2**20, 32


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
        self._tokenizer("")  # sets what every call sets, so that threads may share the tokenizer
        self._max_chars = max(map(len, self._tokenizer.get_vocab())) * self._max_model_len
        has_template = bool(self._tokenizer.chat_template)
        self._template = ChatTemplate(self._tokenizer, max_chars=self._max_chars) if has_template else None
        self._template_turn = asyncio.Lock()  # chats that wait for the template take no thread from others

    def app(self, keys: Sequence[str] = ()) -> Starlette:
        """The application; its life is the thread's.

        Args:
            keys: A client must send one of them; none is needed where there are none.
        """

        @asynccontextmanager
        async def life(_: Starlette) -> AsyncIterator[None]:
            self._thread.start()
            yield
            self._thread.stop()
            if self._template:
                self._template.close()

        return Starlette(
            lifespan=life,
            routes=[
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/health", self.health),
                Route("/metrics", self.metrics),
            ],
            middleware=[Middleware(KeyGuard, keys=keys)],
            exception_handlers=error_handlers(),
        )

    async def completions(self, connection: Request) -> Response:
        """Continues a prompt."""
        body = await read_request(connection, CompletionRequest, self._max_body_bytes)
        self._check_model(body)
        prompt = body.single_prompt
        ids = prompt if isinstance(prompt, list) else await self._ids(prompt)
        return await self._answer(body, ids, body.max_tokens or _DEFAULT_MAX_TOKENS, connection)

    async def chat_completions(self, connection: Request) -> Response:
        """Answers the last message of a chat."""
        body = await read_request(connection, ChatCompletionRequest, self._max_body_bytes)
        self._check_model(body)
        if not self._template:
            raise SenteiError("This model has no chat template.", "Use /v1/completions.")
        async with self._template_turn:
            text = await asyncio.to_thread(self._template.render, body.text_messages)
        ids = await self._ids(text, add_special_tokens=False)
        rest = max(1, self._max_model_len - len(ids))
        return await self._answer(body, ids, body.max_completion_tokens or body.max_tokens or rest, connection)

    async def models(self, _: Request) -> Response:
        """The one model."""
        model = {"id": self._name, "object": "model", "created": 0, "owned_by": "sentei"}
        return JSONResponse({"object": "list", "data": [{**model, "max_model_len": self._max_model_len}]})

    async def health(self, _: Request) -> Response:
        """200 while answers can be given."""
        return Response(status_code=200 if self._thread.is_alive() else 503)

    async def metrics(self, _: Request) -> Response:
        """Tokens since the start, in and out, under vLLM's names."""
        counts = {"prompt": self._batch.prompt_tokens, "generation": self._batch.generation_tokens}
        return PlainTextResponse("".join(f"vllm:{name}_tokens_total {count}\n" for name, count in counts.items()))

    @property
    def _max_body_bytes(self) -> int:
        return _BODY_BYTES + _BODY_BYTES_PER_TOKEN * self._max_model_len

    def _check_model(self, body: CompletionRequest | ChatCompletionRequest) -> None:
        if body.model not in (None, self._name):
            raise HTTPException(404, f"The model {body.model!r} does not exist; this server has {self._name!r}.")

    async def _ids(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Tokens of a text, unless it is so long that it cannot fit, whatever its tokens are."""
        if len(text) > self._max_chars:
            raise SenteiError(
                f"The prompt has {len(text):,} characters; the context of this server holds {self._max_model_len} "
                f"tokens, at most {self._max_chars:,} characters.",
                "Shorten the prompt.",
            )
        # Not backend_tokenizer.encode: that keeps Python's lock.
        try:
            encoded = await asyncio.to_thread(self._tokenizer, text, add_special_tokens=add_special_tokens)
        except BaseException as error:
            if not is_panic(error):
                raise
            raise SenteiError("The model's tokenizer gave up on the prompt.") from error
        return encoded["input_ids"]

    async def _answer(
        self, body: CompletionRequest | ChatCompletionRequest, ids: list[int], max_tokens: int, connection: Request
    ) -> Response:
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
        if len(ids) + max_tokens > self._max_model_len:
            raise SenteiError(
                f"The prompt has {len(ids)} tokens and {max_tokens} more are asked for; the context of this server "
                f"holds {self._max_model_len}.",
                "Shorten the prompt, or lower max_tokens.",
            )
        if not all(0 <= token < self._settings.vocab_size for token in ids):
            raise SenteiError(f"The prompt has token ids outside of 0 to {self._settings.vocab_size - 1}.")


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
                raise RuntimeError("The model failed to give the next token.") from piece
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
    except Exception:  # too late for a status; behind this generator there is no handler any more
        _LOG.exception("A streamed answer failed.")
        yield _event(FAILED)
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
        return done.result()
    finally:
        request.cancelled = True
        gone.cancel()
        done.cancel()


async def _disconnection(connection: Request) -> None:
    while (await connection.receive())["type"] != "http.disconnect":
        pass
