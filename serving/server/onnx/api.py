"""OpenAI's endpoints over one ONNX export.

One thread owns the model and decodes all answers together (:mod:`serving.server.onnx.batch_thread`). The event loop
passes texts on, and does nothing that takes long: bodies are parsed and prompts tokenised in other threads (the
tokenizer does not hold Python's lock meanwhile), chat templates are rendered in another process.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from serving.engines.onnxruntime import OnnxEngine
from serving.engines.sampling import Sampler
from serving.server.onnx.answer_pieces import Pieces, stream, unless_gone, whole
from serving.server.onnx.answer_text import AnswerText, Piece
from serving.server.onnx.batch_thread import BatchThread
from serving.server.onnx.continuous_batch import BatchRequest, OnnxBatch
from serving.server.onnx.http_guards import KeyGuard, error_handlers, error_response, read_request
from serving.server.onnx.metrics import CountAnswers, RequestTimes, ServerMetrics
from serving.server.onnx.openai_protocol import ChatCompletionRequest, CompletionRequest, Reply
from serving.server.onnx.places import Place, Places
from toolchain.errors import SenteiError, is_panic
from toolchain.memory import available_bytes
from toolchain.model.loading import load_tokenizer
from toolchain.text.chat_template import ChatTemplate

_DEFAULT_MAX_TOKENS = 16  # OpenAI's, of completions
# A prompt that fills the context has about 4 bytes per token; escaped in JSON, Japanese has up to 12.
_BODY_BYTES, _BODY_BYTES_PER_TOKEN = 2**20, 32
# The rest is for logits, activations, and whatever else the machine does.
_KV_SHARE = 0.8
_READY_TIMEOUT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """How much one server does.

    Attributes:
        max_num_seqs: Answers at once.
        max_model_len: Tokens of prompt and answer; ``None`` is the model's context.
        max_num_queued_reqs: Requests that wait; further ones are refused.
        request_timeout_s: From the end of a request's body to its last token.
    """

    max_num_seqs: int = 8
    max_model_len: int | None = None
    max_num_queued_reqs: int = 128
    request_timeout_s: float = 600.0


class OnnxApi:
    """The endpoints, and the thread behind them."""

    def __init__(self, directory: Path, limits: ServerLimits, *, names: Sequence[str] = ()) -> None:
        """Loads the model.

        Args:
            directory: The export.
            limits: How much it does.
            names: What clients may call the model, the first one in answers; by default the directory's name. Its path
                is nobody's business.

        Raises:
            SenteiError: The export is damaged, or memory or context are too small.
        """
        self._engine = OnnxEngine(directory)
        self._settings = self._engine.settings
        self._tokenizer = load_tokenizer(directory)
        self._names = tuple(names) or (directory.resolve().name,)
        self._timeout_s = limits.request_timeout_s
        self._max_model_len = limits.max_model_len or self._engine.batch_context_length
        self._batch = _new_batch(self._engine, limits.max_num_seqs, self._max_model_len)
        self._thread = BatchThread(self._batch)
        self._metrics = ServerMetrics(self._names[0], self._max_model_len)
        self._metrics.watch(self._batch, self._thread)
        self._places = Places(limits.max_num_seqs + limits.max_num_queued_reqs, refused=self._metrics.refused.inc)
        self._under_way: set[Callable[[HTTPException], None]] = set()
        self._is_giving_up = False
        self._tokenizer("")  # sets what every call sets, so that threads may share the tokenizer
        self._max_chars = max(map(len, self._tokenizer.get_vocab())) * self._max_model_len
        has_template = bool(self._tokenizer.chat_template)
        self._template = ChatTemplate(self._tokenizer, max_chars=self._max_chars) if has_template else None
        self._template_turn = asyncio.Lock()  # chats that wait for the template take no thread from others

    def app(self, keys: Sequence[str] = ()) -> ASGIApp:
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

        app = Starlette(
            lifespan=life,
            routes=[
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/health", self.health),
                Route("/ready", self.ready),
                Route("/metrics", self.metrics),
            ],
            middleware=[Middleware(KeyGuard, keys=keys)],
            exception_handlers=error_handlers(),
        )
        return CountAnswers(app, self._metrics)  # around Starlette's own answers to what nobody expected, too

    def give_up(self) -> None:
        """Ends all answers under way and all requests that wait, each with an error, whatever the engine does.

        For the event loop, when the server is about to end.
        """
        self._is_giving_up = True
        for end in tuple(self._under_way):
            end(_shutting_down())

    async def completions(self, connection: Request) -> Response:
        """Continues a prompt."""
        body = await read_request(connection, CompletionRequest, self._max_body_bytes)
        self._check_model(body)
        return await self._placed(body, connection)

    async def chat_completions(self, connection: Request) -> Response:
        """Answers the last message of a chat."""
        body = await read_request(connection, ChatCompletionRequest, self._max_body_bytes)
        self._check_model(body)
        if not self._template:
            raise SenteiError("This model has no chat template.", "Use /v1/completions.")
        return await self._placed(body, connection)

    async def models(self, _: Request) -> Response:
        """The one model, under each of its names."""
        model = {"object": "model", "created": 0, "owned_by": "sentei", "max_model_len": self._max_model_len}
        return JSONResponse({"object": "list", "data": [{"id": name, **model} for name in self._names]})

    async def health(self, _: Request) -> Response:
        """200 while the process is good for anything; else it should be started again."""
        problem = self._thread.problem()
        return error_response(503, problem) if problem else Response()

    async def ready(self, _: Request) -> Response:
        """200 if the engine gives a token."""
        if problem := self._thread.standstill():
            return error_response(503, problem)
        try:
            async with asyncio.timeout(_READY_TIMEOUT_S):
                # Who asks too may wait longer.
                await asyncio.shield(asyncio.wrap_future(self._thread.ask_for_token()))
        except TimeoutError:
            return error_response(503, f"The engine gave no token within {_READY_TIMEOUT_S:.0f} s.")
        except Exception:  # the thread has logged it
            return error_response(503, "The engine failed to give a token; the log says why.")
        return Response()

    async def metrics(self, _: Request) -> Response:
        """Numbers for Prometheus; see :mod:`serving.server.onnx.metrics`."""
        content = await asyncio.to_thread(generate_latest, self._metrics.registry)
        return Response(content, media_type=CONTENT_TYPE_LATEST)

    @property
    def _max_body_bytes(self) -> int:
        return _BODY_BYTES + _BODY_BYTES_PER_TOKEN * self._max_model_len

    def _check_model(self, body: CompletionRequest | ChatCompletionRequest) -> None:
        if body.model is not None and body.model not in self._names:
            raise HTTPException(404, f"The model {body.model!r} does not exist; this server has {self._names[0]!r}.")

    async def _placed(self, body: CompletionRequest | ChatCompletionRequest, connection: Request) -> Response:
        """Answers a request as soon as its turn comes, if it comes in time."""
        place = self._places.take()
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        turn = _Turn(place=place, deadline=deadline, connection=connection)
        try:
            async with asyncio.timeout_at(deadline) as in_time:
                ids, max_tokens = await self._prompt(body)
            self._check_length(ids, max_tokens)
            return await self._answer(body, ids, max_tokens, turn)
        except BaseException as error:
            place.leave()
            if isinstance(error, TimeoutError) and in_time.expired():
                raise self._too_late() from error
            raise

    async def _prompt(self, body: CompletionRequest | ChatCompletionRequest) -> tuple[list[int], int]:
        """The prompt's tokens, and how many may follow."""
        if isinstance(body, CompletionRequest):
            prompt = body.single_prompt
            ids = prompt if isinstance(prompt, list) else await self._ids(prompt)
            return ids, body.max_tokens or _DEFAULT_MAX_TOKENS
        assert self._template
        async with self._template_turn:
            text = await asyncio.to_thread(self._template.render, body.text_messages)
        ids = await self._ids(text, add_special_tokens=False)
        return ids, body.max_completion_tokens or body.max_tokens or max(1, self._max_model_len - len(ids))

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
            raise SenteiError("The model's tokenizer failed on the prompt.") from error
        return encoded["input_ids"]

    async def _answer(
        self, body: CompletionRequest | ChatCompletionRequest, ids: list[int], max_tokens: int, turn: "_Turn"
    ) -> Response:
        reply = Reply(chat=isinstance(body, ChatCompletionRequest), model=self._names[0], prompt_tokens=len(ids))
        times = RequestTimes(self._metrics, prompt_tokens=len(ids), max_tokens=max_tokens)
        loop = asyncio.get_running_loop()
        if self._is_giving_up:
            raise _shutting_down()

        def done() -> None:
            timer.cancel()
            self._under_way.discard(end)
            turn.place.leave()

        pieces = Pieces(done)
        request = self._request(body, ids, max_tokens, pieces, times)

        def end(error: HTTPException) -> None:
            request.cancelled = True
            times.ended("error")
            pieces.put(error)

        def ended() -> None:  # also where the client has gone
            request.cancelled = True
            times.ended("abort")
            done()

        timer = loop.call_at(turn.deadline, end, self._too_late())
        self._under_way.add(end)
        self._thread.submit(request)
        answer = (
            stream(reply, pieces, include_usage=body.stream_options.include_usage, ended=ended)
            if body.stream
            else whole(reply, pieces)
        )
        return await unless_gone(turn.connection, answer, ended=ended)

    def _request(
        self,
        body: CompletionRequest | ChatCompletionRequest,
        ids: list[int],
        max_tokens: int,
        pieces: Pieces,
        times: RequestTimes,
    ) -> BatchRequest:
        def emit(piece: Piece) -> None:
            if piece.finish_reason:
                times.ended(piece.finish_reason)
            pieces.put(piece)

        def fail(error: Exception) -> None:
            times.ended("error")
            pieces.put(error)

        text = AnswerText(
            self._tokenizer.backend_tokenizer,
            ids,
            max_tokens=max_tokens,
            stop_ids=() if body.ignore_eos else self._settings.eos_token_ids,
            stop_strings=body.stop_strings,
            emit=emit,
        )

        def take(token: int) -> bool:
            times.token()
            return text.take(token)

        sampler = Sampler(body.sampling)
        return BatchRequest(
            prompt=ids, take=take, fail=fail, joined=times.joined, sampler=sampler, max_tokens=max_tokens
        )

    def _too_late(self) -> HTTPException:
        return HTTPException(408, f"The answer was not finished within {self._timeout_s:g} s.")

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


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """One request's place, until when it must be answered (the loop's time), and who waits for it."""

    place: Place
    deadline: float
    connection: Request


def _shutting_down() -> HTTPException:
    return HTTPException(503, "The server is shutting down.")


def _new_batch(engine: OnnxEngine, max_num_seqs: int, max_model_len: int) -> OnnxBatch:
    """A batch whose cache has memory for all that it promises.

    Raises:
        SenteiError: There is no memory for one request, or the model's context is shorter.
    """
    per_token, tokens = engine.kv_bytes_per_token, None
    if per_token and engine.device == "cpu":  # a GPU gives all of the memory at once, or refuses
        tokens = int(_KV_SHARE * available_bytes(torch.device("cpu"))) // per_token
        if tokens < max_model_len <= engine.batch_context_length:
            raise SenteiError(
                f"A request of {max_model_len} tokens takes {max_model_len * per_token / 1e9:.2f} GB of KV cache; "
                f"there is memory for {tokens} tokens.",
                f"Give at most --max-model-len {tokens}." if tokens else "Free some memory.",
            )
    try:
        return OnnxBatch(engine, max_num_seqs=max_num_seqs, max_model_len=max_model_len, kv_tokens=tokens)
    except (MemoryError, RuntimeError) as error:  # the latter of CUDA
        raise SenteiError(
            f"There is no memory for {max_num_seqs} answers of {max_model_len} tokens.",
            "Lower --max-model-len or --max-num-seqs.",
        ) from error
