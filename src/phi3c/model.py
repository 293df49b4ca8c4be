"""`Model`: load a GGUF file, generate text, chat."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Literal, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from . import _kernels
from .answer import Answer, ChatAnswer
from .cache import kv_types
from .chat import ChatTemplate, Message, Tool, opens_reasoning
from .completion import Chunk, Completion, FinishReason
from .config import Config
from .divergence import Divergence, divergence
from .engine import Engine, Generation, short_context
from .errors import ContextLengthError, InvalidParameterError, OutOfMemoryError, TokenizerError
from .memory import total_memory
from .packed import ModelFile
from .perplexity import Chunk as TextChunk
from .perplexity import Perplexity, Score, logprobs, perplexity
from .perplexity import Progress as PerplexityProgress
from .phi3 import kv_bytes_per_token
from .profile import network, profile_of
from .sampling import SamplingOptions, SamplingParams, TokenLogprob
from .threads import default_threads
from .tokenizer import Tokenizer
from .weights import ReadAhead, packed_bytes

DEFAULT_CONTEXT = 4096
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What was loaded, and how it runs."""

    path: Path
    name: str
    architecture: str
    n_parameters: int
    n_ctx: int
    n_ctx_train: int
    vocab_size: int
    weight_bytes: int  # packed
    layout: str | None  # of a file that is packed already, such as "p16 version 1"
    kv_bytes_per_token: int
    isa: str
    n_threads: int
    load_ms: float


class Model:
    """A Phi-3-family model, loaded from a GGUF file and ready to generate.

    Safe to use from several threads. A context manager; `close()` frees the weights at once.

    Args:
        path: the GGUF file, or one that `pack` made of it.
        n_ctx: longest sequence, prompt and answer together; None for the smaller of 4096 and what the model
            was trained for.
        n_threads: threads that compute; None derives it from the machine (README, "Threads").
        n_batch: most prompt tokens computed at once; changes speed and memory, never the result.
        kv_type: how keys and values are kept: "f16", or "q8_0", which takes about half the memory and is a
            little less exact (docs/accuracy.md).
        speculate: most tokens per step that are drafted from repetitions in prompt and answer, and verified
            together; 0 drafts none. Faster where an answer copies from its prompt; never another result.
        rope_factors: which of a LongRoPE model's two sets of rotary factors is used. "auto" is what the model
            was trained with: "short" for texts that fit its original context, "long" for longer ones, and one
            that outgrows it is read again (`timings.reprefill_tokens`). "long" spares that where it is known
            to happen; "short" serves comparisons.
        chat_template: a chat template (Jinja) to use instead of the file's.
        progress: called as progress("pack", bytes done, bytes in all) while weights are packed.

    Raises:
        ModelLoadError: the file cannot be found, is no GGUF file, is damaged, or holds something phi3c does
            not run; the subclass says which.
        OutOfMemoryError: the weights, or keys and values of n_ctx tokens beside them, do not fit into memory.
        InvalidParameterError: an argument is out of range.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        n_batch: int = 512,
        kv_type: str = "f16",
        speculate: int = 0,
        rope_factors: str = "auto",
        chat_template: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        started = perf_counter()
        if n_batch < 1:
            raise InvalidParameterError(f"n_batch is {n_batch}; it must be at least 1")
        if speculate < 0:
            raise InvalidParameterError(f"speculate is {speculate}; it must be at least 0 (no drafts)")
        self._chat_template = chat_template
        self._file = ModelFile(path)
        self._ahead = ReadAhead(self._file)
        try:
            self.config = Config.from_gguf(self._file)
            self.tokenizer = Tokenizer.from_gguf(self._file.metadata)
            if self.tokenizer.vocab_size > self.config.vocab_size:
                raise TokenizerError(
                    f"{self._file.path}: the vocabulary lists {self.tokenizer.vocab_size} tokens, but the "
                    f"embedding has {self.config.vocab_size} rows; the file is damaged or was put together "
                    "from two models"
                )
            n_ctx = _context(n_ctx, self.config)
            short_context(self.config, rope_factors)  # refuses nonsense before weights are packed
            _check_memory(self._file, self.config, n_ctx, kv_type)
            pool = _kernels.Pool(default_threads(n_threads).count)
            phi3 = network()(
                self._file, self.config, pool, n_batch=n_batch, kv_type=kv_type, progress=progress
            )
        except BaseException:
            self._ahead.close()
            self._file.close()
            raise
        self._engine = Engine(phi3, n_ctx, speculate, rope_factors)
        self.profile = profile_of(phi3)  # None unless PHI3C_PROFILE is 1
        self.info = ModelInfo(
            path=self._file.path,
            name=self.config.name,
            architecture=self.config.architecture,
            n_parameters=sum(tensor.rows * tensor.columns for tensor in self._file.tensors.values()),
            n_ctx=n_ctx,
            n_ctx_train=self.config.context_length,
            vocab_size=self.config.vocab_size,
            weight_bytes=phi3.weight_bytes,
            layout=self._file.layout,
            kv_bytes_per_token=phi3.heads.page_bytes(self.config.block_count) // _kernels.TILE,
            isa=_kernels.isa(),
            n_threads=pool.size,
            load_ms=1000 * (perf_counter() - started),
        )

    @classmethod
    def from_pretrained(
        cls,
        repo: str,
        file: str | None = None,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        n_batch: int = 512,
        kv_type: str = "f16",
        speculate: int = 0,
        rope_factors: str = "auto",
        chat_template: str | None = None,
        progress: Progress | None = None,
    ) -> Model:
        """Load a model by name, downloading it first where it is not in the cache.

        Args:
            repo: "owner/name" or "owner/name:QUANT" on the Hugging Face Hub, an alias, or "demo".
            file: a file of the repository, or a glob such as "*q4.gguf".
            revision: branch, tag or commit.
            token: for gated repositories; None uses the one `hf auth login` or HF_TOKEN left.
            cache_dir: where downloads are kept; None for the Hub's own cache.
            local_files_only: never touch the network.
            n_ctx, n_threads, n_batch, kv_type, speculate, rope_factors, chat_template, progress: as for
                Model.

        Raises:
            ModelNotFoundError: no such repository or file; the message lists those that exist.
            DownloadError: gated, offline, no room on the disk, or damaged on the way.
            ModelLoadError, OutOfMemoryError, InvalidParameterError: as for Model.
        """
        from . import hub

        name = repo if file is None else f"{repo}/{file}"
        path = hub.resolve(
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            progress=progress,
        )
        return cls(
            path,
            n_ctx=n_ctx,
            n_threads=n_threads,
            n_batch=n_batch,
            kv_type=kv_type,
            speculate=speculate,
            rope_factors=rope_factors,
            chat_template=chat_template,
            progress=progress,
        )

    @overload
    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        stream: Literal[False] = False,
        params: SamplingParams | None = None,
        progress: Progress | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        stream: Literal[True],
        params: SamplingParams | None = None,
        progress: Progress | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Stream: ...
    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        stream: bool = False,
        params: SamplingParams | None = None,
        progress: Progress | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Completion | Stream:
        """Continue a text.

        Args:
            prompt: text, begun with BOS where the model asks for it and with special tokens read as plain
                text; or token ids, taken as they are.
            stream: return a Stream of chunks instead of the finished Completion.
            params: sampling parameters; the keywords change single ones.
            progress: called as progress("prompt", tokens done, tokens in all) while the prompt is read, and
                as progress("again", ...) where prompt and answer have outgrown the original context.
            **sampling: fields of SamplingParams: max_tokens, temperature, top_k, top_p, min_p,
                repeat_penalty, repeat_last_n, seed, stop, logprobs.

        Raises:
            ContextLengthError: prompt and max_tokens do not fit n_ctx.
            InvalidParameterError: an argument is out of range, or a token id is not in the vocabulary.
            TypeError: an argument is unknown.
            NumericalError: the model produced NaN.
            ModelClosedError: after close().
        """
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else self._checked(prompt)
        parameters = _params(params, sampling)
        answer = Answer(self.tokenizer, parameters.stop, strip_space=False)
        return self._answer(ids, answer, stream, parameters, progress)

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        *,
        system: str | None = None,
        tools: Sequence[Tool] | None = None,
        parse_special: bool = False,
        stream: Literal[False] = False,
        params: SamplingParams | None = None,
        progress: Progress | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Completion: ...
    @overload
    def chat(
        self,
        messages: Sequence[Message],
        *,
        system: str | None = None,
        tools: Sequence[Tool] | None = None,
        parse_special: bool = False,
        stream: Literal[True],
        params: SamplingParams | None = None,
        progress: Progress | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Stream: ...
    def chat(
        self,
        messages: Sequence[Message],
        *,
        system: str | None = None,
        tools: Sequence[Tool] | None = None,
        parse_special: bool = False,
        stream: bool = False,
        params: SamplingParams | None = None,
        progress: Progress | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Completion | Stream:
        """Answer a conversation, laid out by the chat template in the file.

        Args:
            messages: in OpenAI's form: dicts of "role" (system, user, assistant, tool) and "content"; what
                an answer was is its `Completion.message`. Where the template has no place for a system
                message, it is put before the next user message.
            system: a system message to put first.
            tools: functions that the model may ask to have called, in OpenAI's form: dicts {"type":
                "function", "function": {"name", "description", "parameters"}}. Phi-4-mini was made for it.
            parse_special: read texts such as `<|end|>` in the messages as the special token of that name;
                otherwise they are spelled out like any other text, and nobody can end their turn with them.
            stream, params, progress, **sampling: as for generate; stop strings are looked for in the answer's
                text only, not in its reasoning or its tool calls.

        Raises:
            ChatTemplateError: there is no template, or it refuses the messages.
            ToolsUnsupportedError: tools, their calls or results, which the model or its template know not.
            ContextLengthError, InvalidParameterError, NumericalError, ModelClosedError: as for generate.
        """
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
        segments = self._template.segments(messages, tools=tools, parse_special=parse_special)
        ids = self.tokenizer.encode_segments(segments)
        parameters = _params(params, sampling)
        answer = ChatAnswer(
            self.tokenizer,
            parameters.stop,
            prompt=ids,
            thinking=opens_reasoning(segments),
            tools=bool(tools),
        )
        return self._answer(ids, answer, stream, parameters, progress)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """The network's output behind every token.

        Args:
            ids: token ids, as they are: no BOS is added.

        Returns:
            float32 (len(ids), vocab_size): row i scores the token that follows ids[: i + 1]. With
            rope_factors "auto", the length of `ids` decides on the factors for all rows.

        Raises:
            ContextLengthError: more ids than n_ctx.
            InvalidParameterError: no ids, or one that is not in the vocabulary.
        """
        ids = self._checked(ids)
        self._fits(len(ids), None)
        return self._engine.logits(ids)

    def score(self, text: str | Sequence[int], *, context: str | Sequence[int] | None = None) -> Score:
        """How likely the model finds a text, token by token.

        Args:
            text: text, begun with BOS where the model asks for it; or token ids, taken as they are.
            context: what comes before it, of the same kind: the text's tokens depend on it, and it is not
                scored. BOS, where the model asks for it, is the beginning of the context. Text is tokenised
                together with its context; a token that reaches across the border belongs to the text.

        Returns:
            The ids, and their log-probabilities: as `generate` reports them, before sampling. The first token
            has one if something comes before it, be it BOS alone.

        Raises:
            ContextLengthError: more tokens than n_ctx; `perplexity` takes longer texts.
            InvalidParameterError: a token id is not in the vocabulary; text and context are not of one kind;
                there is nothing to score.
            NumericalError: the model produced NaN.
        """
        ids, n_context = self._behind(text, context)
        self._fits(len(ids), None)
        if len(ids) <= max(n_context, 1):
            raise InvalidParameterError("there is nothing to score: no token that has another before it")
        scored = logprobs(self._engine, TextChunk(ids, max(n_context, 1))).tolist()
        return Score(tuple(ids[n_context:]), (*([None] if n_context == 0 else []), *scored))

    def perplexity(
        self,
        text: str | Sequence[int],
        *,
        n_ctx: int = 512,
        stride: int = 0,
        n_chunks: int | None = None,
        save_logits: str | os.PathLike[str] | None = None,
        progress: PerplexityProgress | None = None,
    ) -> Perplexity:
        """Perplexity of a text of any length: exp of the mean negative log-probability of its tokens.

        As llama-perplexity defines it, the text is cut into chunks of n_ctx tokens side by side, BOS takes
        the place of each chunk's first token where the model asks for one, and the tokens behind a chunk's
        first half and one more are scored. A stride lets chunks overlap, as the Hugging Face guide to
        perplexity does: every token but the first is scored once.

        Args:
            text: text, begun with BOS where the model asks for it; or token ids.
            n_ctx: tokens of a chunk, at most the model's n_ctx.
            stride: tokens from one chunk to the next, less than n_ctx; 0 for chunks side by side.
            n_chunks: look at no more than so many.
            save_logits: write all log-probabilities of the scored tokens to this file, for `divergence` of
                another model from this one: 2 bytes for each token scored and of the vocabulary.
            progress: called as progress(tokens read, tokens in all, perplexity so far or None).

        Raises:
            InvalidParameterError: an argument is out of range, or the text is shorter than a chunk.
            ModelWriteError: save_logits cannot be written.
            NumericalError: the model produced NaN.
        """
        return perplexity(
            self._engine,
            self.tokenizer.encode(text) if isinstance(text, str) else self._checked(text),
            n_ctx=n_ctx,
            stride=stride,
            bos_id=self._bos_id,
            n_chunks=n_chunks,
            save_logits=None if save_logits is None else Path(save_logits),
            progress=progress,
        )

    def divergence(
        self,
        base: str | os.PathLike[str],
        *,
        n_chunks: int | None = None,
        progress: PerplexityProgress | None = None,
    ) -> Divergence:
        """KL divergence of this model from another one, and how perplexity and probabilities differ.

        Args:
            base: the other's log-probabilities of a text: a file that its `perplexity` saved, or
                llama-perplexity. The text's tokens are in it.
            n_chunks: look at no more than so many.
            progress: called as progress(tokens read, tokens in all, perplexity so far or None).

        Raises:
            LogitsFileError: the file is none, is damaged, or the vocabularies differ.
            ContextLengthError: its chunks are longer than n_ctx.
            NumericalError: the model produced NaN.
        """
        return divergence(self._engine, base, bos_id=self._bos_id, n_chunks=n_chunks, progress=progress)

    def tokenize(self, text: str, *, add_bos: bool | None = None, parse_special: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text; a lone surrogate is refused.
            add_bos: put the begin token first unless the ids start with it anyway; None: as the file says.
            parse_special: read texts such as `<|end|>` as the special token of that name; otherwise they are
                spelled out like any other text.

        Raises:
            InvalidParameterError: the text is not valid Unicode.
        """
        return self.tokenizer.encode(text, add_bos=add_bos, parse_special=parse_special)

    def detokenize(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of token ids: `detokenize(tokenize(text))` is `text`. Bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: token ids.
            skip_special: leave special tokens out; otherwise their names are written, and
                `tokenize(..., parse_special=True)` gives the ids again.

        Raises:
            InvalidParameterError: an id is not in the vocabulary.
        """
        return self.tokenizer.decode(self._checked(ids), skip_special=skip_special)

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = True,
        tokenize: Literal[False] = False,
    ) -> str: ...
    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = True,
        tokenize: Literal[True],
    ) -> list[int]: ...
    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = True,
        tokenize: bool = False,
    ) -> str | list[int]:
        """The prompt that `chat` would give the model.

        Args:
            messages, tools: as for chat.
            add_generation_prompt: end with the header of the answer, where the template can.
            tokenize: return its token ids, in which special tokens in the messages are plain text, instead of
                the text, in which they look the same as the template's own.

        Raises:
            ChatTemplateError, ToolsUnsupportedError, InvalidParameterError: as for chat.
        """
        segments = self._template.segments(messages, tools=tools, add_generation_prompt=add_generation_prompt)
        if tokenize:
            return self.tokenizer.encode_segments(segments)
        return "".join(text for text, _ in segments)

    def close(self) -> None:
        """Free the weights and the file; the model cannot be used afterwards. A second call does nothing."""
        self._engine.close()
        self._ahead.close()
        self._file.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, type: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<phi3c.Model {self.info.path.name}: {self.info.isa}, {self.info.n_threads} threads>"

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate.from_gguf(self._file.metadata, self.tokenizer, self._chat_template)

    @property
    def _bos_id(self) -> int | None:
        """What texts begin with, if with anything."""
        return self.tokenizer.bos_id if self.tokenizer.add_bos else None

    def _behind(
        self, text: str | Sequence[int], context: str | Sequence[int] | None
    ) -> tuple[list[int], int]:
        """Ids of context and text, and how many of them are context."""
        if isinstance(text, str) and (context is None or isinstance(context, str)):
            before, ids = self.tokenizer.encode(context or ""), self.tokenizer.encode((context or "") + text)
            shared = takewhile(lambda pair: pair[0] == pair[1], zip(before, ids, strict=False))
            return ids, len(list(shared))
        if isinstance(text, str) or isinstance(context, str):
            raise InvalidParameterError("text and context must both be text, or both token ids")
        before = self._checked(context or ())
        return before + self._checked(text), len(before)

    def _checked(self, ids: Sequence[int]) -> list[int]:
        ids = [int(token) for token in ids]
        for i, token in enumerate(ids):
            if not 0 <= token < self.config.vocab_size:
                raise InvalidParameterError(
                    f"ids[{i}] is {token}: the vocabulary has tokens 0 to {self.config.vocab_size - 1}"
                )
        return ids

    def _fits(self, n_prompt: int, max_tokens: int | None) -> None:
        if n_prompt == 0:
            raise InvalidParameterError("the prompt is empty: there is no token to continue from")
        n_ctx = self.info.n_ctx
        if n_prompt + (max_tokens or 0) > n_ctx:
            wanted = f" and max_tokens {max_tokens}" if max_tokens else ""
            raise ContextLengthError(
                f"a prompt of {n_prompt} tokens{wanted} does not fit the context of {n_ctx}: shorten the "
                f"prompt, ask for fewer tokens, or load the model with a larger n_ctx (trained for "
                f"{self.info.n_ctx_train})",
                n_prompt,
                max_tokens,
                n_ctx,
            )

    def _answer(
        self,
        ids: list[int],
        answer: Answer,
        stream: bool,
        params: SamplingParams,
        progress: Progress | None,
    ) -> Completion | Stream:
        self._fits(len(ids), params.max_tokens or 1)
        generation = Generation(self._engine, ids, params, self.tokenizer.stop_ids, progress)
        result = Stream(generation, answer, self.tokenizer, params, self.info.load_ms)
        return result if stream else result.result()


class Stream(Iterator[Chunk]):
    """Chunks of an answer as they are computed; breaking out of the loop is safe.

    Made by `Model.generate(..., stream=True)` and `Model.chat(..., stream=True)`.
    """

    def __init__(
        self,
        generation: Generation,
        answer: Answer,
        tokenizer: Tokenizer,
        params: SamplingParams,
        load_ms: float,
    ) -> None:
        self._generation, self._answer, self._tokenizer = generation, answer, tokenizer
        self._params, self._load_ms = params, load_ms
        self._reasoning: list[str] = []
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._finish: tuple[FinishReason, str] | None = None
        self._cancelled = False

    def __next__(self) -> Chunk:
        if self._finish:
            raise StopIteration
        if self._cancelled or self._generation.finished:
            self._end("cancelled", "cancelled")
            raise StopIteration
        token, answer = self._generation.next(), self._answer
        reasoning = text = ""
        if token.finish_reason != "stop":
            if token.logprob:
                self._logprobs.append(token.logprob)
            reasoning, text = answer.push(token.id)
        finish_reason, detail = token.finish_reason, ""
        if finish_reason or answer.stop:
            more_reasoning, more_text = answer.finish()
            reasoning, text = reasoning + more_reasoning, text + more_text
        if answer.stop:
            finish_reason, detail = "stop", f"stop:{answer.stop}"
        elif finish_reason == "stop":
            detail = f"eog:{self._tokenizer.token_text(token.id)}"
            if answer.malformed_call:
                detail = "malformed_tool_call"
            if answer.tool_calls:
                finish_reason = "tool_calls"
        elif finish_reason == "length":
            detail = "max_tokens" if self._generation.limit == self._params.max_tokens else "context"
        self._reasoning.append(reasoning)
        self._texts.append(text)
        if finish_reason:
            self._end(finish_reason, detail)
        calls = answer.tool_calls if finish_reason else ()
        return Chunk(text, token.id, finish_reason, token.logprob, reasoning, calls)

    def cancel(self) -> None:
        """Stop before the next token; safe from any thread."""
        self._cancelled = True

    def result(self) -> Completion:
        """The whole answer: computes what is still to come, then returns it with what was streamed."""
        for _ in self:
            pass
        assert self._finish is not None
        reason, detail = self._finish
        return Completion(
            text="".join(self._texts),
            token_ids=tuple(self._answer.token_ids),
            finish_reason=reason,
            stop_detail=detail,
            usage=self._generation.usage(),
            timings=self._generation.timings(self._load_ms),
            seed=self._generation.sampler.seed,
            logprobs=None if self._params.logprobs is None else tuple(self._logprobs),
            reasoning="".join(self._reasoning),
            tool_calls=self._answer.tool_calls,
        )

    def _end(self, reason: FinishReason, detail: str) -> None:
        self._finish = reason, detail
        self._generation.close()

    def __del__(self) -> None:
        if hasattr(self, "_generation"):
            self._generation.close()


def _params(params: SamplingParams | None, sampling: SamplingOptions) -> SamplingParams:
    if params is None:
        return SamplingParams.from_kwargs(**sampling)
    fields: dict[str, Any] = {name: getattr(params, name) for name in SamplingOptions.__annotations__}
    return SamplingParams.from_kwargs(**{**fields, **sampling})


def _context(n_ctx: int | None, config: Config) -> int:
    if n_ctx is None:
        return min(config.context_length, DEFAULT_CONTEXT)
    if not 1 <= n_ctx <= config.context_length:
        raise InvalidParameterError(
            f"n_ctx is {n_ctx}; this model was trained for sequences of 1 to {config.context_length} tokens"
        )
    return n_ctx


def _check_memory(file: ModelFile, config: Config, n_ctx: int, kv_type: str) -> None:
    """Refuse a context that could not be filled: its pages are taken one by one, much later."""
    memory, weights = total_memory(), packed_bytes(file, config)
    per_token = kv_bytes_per_token(config, kv_type)
    if memory is None or weights > memory or weights + n_ctx * per_token <= memory:
        return
    fits = f"n_ctx up to {(memory - weights) // per_token} fits"
    if kv_type == "f16" and "q8_0" in kv_types(config.head_dim):
        fits += f", with kv_type q8_0 up to {(memory - weights) // kv_bytes_per_token(config, 'q8_0')}"
    raise OutOfMemoryError(
        f"{file.path}: a context of {n_ctx} tokens takes {n_ctx * per_token / 1e9:.1f} GB ({per_token} bytes "
        f"a token as {kv_type}) beside {weights / 1e9:.1f} GB of weights, and this machine has "
        f"{memory / 1e9:.1f} GB; {fits}"
    )
