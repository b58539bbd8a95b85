"""Batched generation with one cache: packed prefill in pieces, packed decode, sequences that come and go."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from foldscan import ops
from foldscan.data.tokenizer import Tokenizer
from foldscan.generation.plan import DecodePlan
from foldscan.generation.sampling import Sampling, choose
from foldscan.models import HybridLM
from foldscan.nn import HybridCache


@dataclass
class Generation:
    """What came of one prompt.

    Attributes:
        prompt_ids: as fed.
        token_ids: generated, without the stop token.
        text: decoded, cut before a stop string; empty without a tokenizer.
        logprobs: natural log-probability of each generated token (and of the stop token, where one ended it) at
            temperature 1 under the whole vocabulary; empty unless asked for.
        finish: ``"stop"`` or ``"length"``.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    logprobs: list[float]
    finish: str


@dataclass
class _Request:
    index: int
    prompt: list[int]
    sampling: Sampling
    max_new_tokens: int
    pending: list[int]
    generated: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    slot: int = -1
    finish: str = ""


@dataclass(frozen=True)
class _Event:
    """A token was chosen for a request (None: only a stop token), and whether it is finished."""

    request: _Request
    token: int | None


class Engine:
    """Generates text from a `HybridLM`.

    Every token's values are the same bits whatever else is in the batch and however a prompt was cut into pieces, so a
    prompt with a seed gives the same text alone and in company.

    Args:
        model: put into evaluation mode.
        tokenizer: needed for prompts and stops that are text.
        max_batch: sequences at a time; more prompts wait for a free slot.
        step_tokens: prompt tokens of one forward, which bounds its memory.
        precision: None to compute in the dtype of the weights, ``"bf16"`` for autocast over fp32 weights.
    """

    def __init__(
        self,
        model: HybridLM,
        tokenizer: Tokenizer | None = None,
        *,
        max_batch: int = 64,
        step_tokens: int = 2048,
        precision: str | None = None,
    ) -> None:
        if max_batch < 1 or step_tokens < 1:
            raise ValueError(f"max_batch, step_tokens: got {max_batch}, {step_tokens}, want at least 1")
        if precision not in (None, "bf16"):
            raise ValueError(f"precision: got {precision!r}, want None or 'bf16'")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.max_batch, self.step_tokens, self.precision = max_batch, step_tokens, precision

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("prompts: got text, but the engine has no tokenizer")
            ids = self.tokenizer.encode(prompt) or [self.tokenizer.end_of_text]
        else:
            ids = [int(i) for i in prompt]
        vocab = self.model.config.vocab_size
        if not ids or min(ids) < 0 or max(ids) >= vocab:
            raise ValueError(f"prompts: got ids {ids[:8]}, want at least one, all in [0, {vocab})")
        return ids

    def _stops(self, stop: Sequence[int | str]) -> tuple[frozenset[int], tuple[str, ...]]:
        texts = tuple(s for s in stop if isinstance(s, str))
        if texts and self.tokenizer is None:
            raise ValueError("stop: got text, but the engine has no tokenizer")
        if "" in texts:
            raise ValueError("stop: got an empty text")
        return self.model.config.stop_ids | {s for s in stop if isinstance(s, int)}, texts

    def _cut(self, request: _Request, texts: tuple[str, ...]) -> str:
        if self.tokenizer is None:
            return ""
        text = self.tokenizer.decode(request.generated)
        ends = [at for at in (text.find(s) for s in texts) if at >= 0]
        return text[: min(ends)] if ends else text

    def _forward(
        self, batch: list[tuple[_Request, list[int]]], cache: HybridCache, plan: DecodePlan | None
    ) -> torch.Tensor:
        """Feed each request's tokens; (n, d) hidden states after the last token of each."""
        step = cache.step([r.slot for r, _ in batch], [len(ids) for _, ids in batch])
        if plan is not None and all(len(ids) == 1 for _, ids in batch):
            return plan.hidden([ids[0] for _, ids in batch], step)
        flat = torch.tensor([i for _, ids in batch for i in ids], dtype=torch.int64)
        hidden = self.model(flat, cu_seqlens=step.cu_seqlens, cache=step)
        return hidden[step.cu_seqlens[1:].long() - 1]

    def _run(
        self, requests: list[_Request], stop_ids: frozenset[int], stop_texts: tuple[str, ...], want_logprobs: bool
    ) -> Iterator[_Event]:
        longest = max(len(r.prompt) + r.max_new_tokens for r in requests)
        slots = min(self.max_batch, len(requests))
        autocast = self.precision == "bf16"
        dtype = torch.bfloat16 if autocast else None
        cache = self.model.new_cache(slots, longest, dtype=dtype)
        with torch.inference_mode():
            plan = DecodePlan(self.model) if not autocast and DecodePlan.covers(self.model) else None
        waiting, active = deque(requests), list[_Request]()
        while waiting or active:
            while waiting and cache.free_slots:
                request = waiting.popleft()
                request.slot = cache.allocate()
                active.append(request)
            # Sequences in decode first: they need one token each; prompts share what is left of the step.
            batch, room = [], self.step_tokens
            for request in sorted(active, key=lambda r: len(r.pending) > 1):
                take = min(len(request.pending), max(room, 0)) if len(request.pending) > 1 else 1
                if take:
                    batch.append((request, request.pending[:take]))
                    request.pending = request.pending[take:]
                    room -= take
            # Inference mode, not only no_grad: autograd's part of dispatching costs as much as a small op.
            # autocast remembers casts of weights that need gradients; here nothing does
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.inference_mode():
                hidden = self._forward(batch, cache, plan)
                ready = [row for row, (request, _) in enumerate(batch) if not request.pending]
                if not ready:
                    continue
                last = hidden if len(ready) == len(batch) else hidden[ready]
                logits = (self.model.logits(last) if plan is None else plan.logits(last)).float().numpy()
            chosen = []
            for row, number in zip(logits, ready):
                request = batch[number][0]
                position = len(request.prompt) + len(request.generated)
                chosen.append(choose(row, position, request.sampling))
            if want_logprobs:
                logprobs = self._logprobs(last, chosen, autocast)
                for number, value in zip(ready, logprobs):
                    batch[number][0].logprobs.append(value)
            for number, token in zip(ready, chosen):
                request = batch[number][0]
                if token in stop_ids:
                    request.finish = "stop"
                else:
                    request.generated.append(token)
                    request.pending = [token]
                    if stop_texts and len(self._cut(request, stop_texts)) < len(self._cut(request, ())):
                        request.finish = "stop"
                    elif len(request.generated) == request.max_new_tokens:
                        request.finish = "length"
                if request.finish:
                    active.remove(request)
                    cache.release(request.slot)
                yield _Event(request, None if token in stop_ids else token)

    def _logprobs(self, hidden: torch.Tensor, tokens: list[int], autocast: bool) -> list[float]:
        """The same op, and so the same bits, as a trainer's `foldscan.ops.linear_logprob`."""
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
            stats = ops.linear_logprob(hidden, self.model.head_weight, torch.tensor(tokens, dtype=torch.int64))
        return stats.logp.tolist()

    def _requests(
        self, prompts: Sequence[str | Sequence[int]], max_new_tokens: int, sampling: Sampling, seed: int | Sequence[int]
    ) -> list[_Request]:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: got {max_new_tokens}, want at least 1")
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise ValueError(f"seed: got {len(seeds)} seeds, want one or {len(prompts)}")
        requests = []
        for index, (prompt, own_seed) in enumerate(zip(prompts, seeds)):
            ids = self._prompt_ids(prompt)
            own = dataclasses.replace(sampling, seed=own_seed)
            requests.append(_Request(index, ids, own, max_new_tokens, pending=list(ids)))
        return requests

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        *,
        stop: Sequence[int | str] = (),
        return_logprobs: bool = False,
    ) -> list[Generation]:
        """Continue every prompt.

        Args:
            prompts: texts, or lists of token ids; of any, unequal lengths.
            max_new_tokens: the most tokens for each.
            temperature, top_k, top_p: see `Sampling`.
            seed: one for all prompts, or one for each (to draw different texts from one prompt).
            stop: token ids and texts that end a sequence, beside the config's ``eos_token_id``.
            return_logprobs: fill `Generation.logprobs`.

        Raises:
            ValueError: names the argument.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts: got one text, want a list of them")
        if not prompts:
            return []
        sampling = Sampling(temperature, top_k, top_p)
        requests = self._requests(prompts, max_new_tokens, sampling, seed)
        stop_ids, stop_texts = self._stops(stop)
        for _ in self._run(requests, stop_ids, stop_texts, return_logprobs):
            pass
        return [Generation(r.prompt, r.generated, self._cut(r, stop_texts), r.logprobs, r.finish) for r in requests]

    def stream(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        *,
        stop: Sequence[int] = (),
    ) -> Iterator[int]:
        """The token ids that continue one prompt, each as soon as it is chosen, the same as `generate`'s."""
        requests = self._requests([prompt], max_new_tokens, Sampling(temperature, top_k, top_p), seed)
        stop_ids, _ = self._stops(stop)
        for event in self._run(requests, stop_ids, (), False):
            if event.token is not None:
                yield event.token

    def stream_text(
        self, prompt: str, max_new_tokens: int = 128, **options: float | int | Sequence[int]
    ) -> Iterator[str]:
        """`stream`, decoded: pieces of text, never half a character."""
        if self.tokenizer is None:
            raise ValueError("stream_text: the engine has no tokenizer")
        return self.tokenizer.stream(self.stream(prompt, max_new_tokens, **options))  # type: ignore[arg-type]
