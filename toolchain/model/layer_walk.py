"""A model run one decoder layer at a time: what the search, the statistics and models larger than memory need."""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from toolchain.architecture.families import Family
from toolchain.architecture.parts import Part, SubBlock
from toolchain.memory import available_bytes
from toolchain.model.loading import decoder_layers, remove_attention, remove_ffn
from toolchain.model.slicing import KeptNeurons, narrow_layer

# So many logits are made at a time, for at most so many tokens: a block of them stays in a CPU's cache, and is still
# large enough to feed the matrix product.
_HEAD_LOGITS = {"cpu": 2**21, "cuda": 2**26}
_HEAD_TOKENS = 2048
# Short sequences share a call. Which ones do does not depend on free memory, so neither do the sums.
_TOKENS_PER_CALL = {"cpu": 2048, "cuda": 16384}


class Layers(Protocol):
    """Where decoder layers come from: memory, or disk one at a time.

    Attributes:
        resident: Whether visiting a layer again is free.
    """

    resident: bool

    def __len__(self) -> int:
        """How many there are."""
        ...

    def layer(self, index: int, *, read_ahead: bool = True) -> AbstractContextManager[nn.Module]:
        """Lends a layer, ready to run; ``read_ahead`` has its neighbour read meanwhile, into memory for one more."""
        ...

    def narrow(self, kept_neurons: KeptNeurons) -> None:
        """Takes out all FFN neurons but ``kept_neurons``: int64 ``[intermediate_size]`` a layer, ascending.

        Where none is left the whole FFN goes, and with it the bias behind its neurons, as in a checkpoint.
        """
        ...

    def remove_attention(self, index: int) -> None:
        """Takes out a layer's attention."""
        ...

    def remove_ffn(self, index: int) -> None:
        """Takes out a layer's whole FFN."""
        ...

    def restore(self) -> None:
        """Gives back all that was taken out, but for what :meth:`cut` did."""
        ...

    def cut(self, index: int, kept: NDArray[np.int64], *, attention: bool) -> None:
        """Takes out of one layer, for good, all neurons but ``kept``, and its attention unless ``attention``.

        Where the layer is lent at that time, the lent one is cut.
        """
        ...


def without_neurons(kept_neurons: KeptNeurons) -> list[int]:
    """The layers that keep no neuron."""
    return [index for index, kept in enumerate(kept_neurons) if not len(kept)]


class ResidentLayers:
    """The layers of a model that is in memory; the model itself is changed."""

    resident = True

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        """Takes the layers as they are."""
        self._family = family
        self._layers = decoder_layers(model, family)
        # What was taken out waits in here: no weight is in memory twice, and none is read twice.
        self._undo: list[Callable[[], None]] = []

    def __len__(self) -> int:
        """How many there are."""
        return len(self._layers)

    def layer(self, index: int, *, read_ahead: bool = True) -> AbstractContextManager[nn.Module]:
        """See :class:`Layers`."""
        return nullcontext(self._layers[index])

    def narrow(self, kept_neurons: KeptNeurons) -> None:
        """See :class:`Layers`."""
        for layer, kept in zip(self._layers, kept_neurons, strict=True):
            self._undo += narrow_layer(layer, self._family, kept)
        for index in without_neurons(kept_neurons):
            self.remove_ffn(index)

    def remove_attention(self, index: int) -> None:
        """See :class:`Layers`."""
        self._undo.append(_remembered(self._layers[index], self._family.attention_parts))
        remove_attention(self._layers[index], self._family)

    def remove_ffn(self, index: int) -> None:
        """See :class:`Layers`."""
        self._undo.append(_remembered(self._layers[index], self._family.ffn_parts))
        remove_ffn(self._layers[index], self._family)

    def restore(self) -> None:
        """See :class:`Layers`."""
        while self._undo:
            self._undo.pop()()

    def cut(self, index: int, kept: NDArray[np.int64], *, attention: bool) -> None:
        """See :class:`Layers`."""
        cut_layer(self._layers[index], self._family, kept, attention=attention)


def cut_layer(layer: nn.Module, family: Family, kept: NDArray[np.int64], *, attention: bool) -> None:
    """Takes out of a layer all neurons but ``kept``, int64 ascending, and its attention unless ``attention``."""
    narrow_layer(layer, family, kept)
    if not len(kept):
        remove_ffn(layer, family)
    if not attention:
        remove_attention(layer, family)


def _remembered(layer: nn.Module, parts: Collection[str]) -> Callable[[], None]:
    """What puts these parts of a layer back."""
    before = {name: getattr(layer, name) for name in parts}

    def put_back() -> None:
        for name, part in before.items():
            setattr(layer, name, part)

    return put_back


class LayerWalk:
    """Runs embedding, layers and head of a causal language model separately, with the model's own modules.

    Hidden states are ``[num_sequences, seq_len, hidden_size]`` in the model's dtype; all sequences of a walk have one
    length and no padding mask, which a causal model does not need for tokens before the padding.

    Attributes:
        model: Embedding, final norm and head; its own layers are only used if ``layers`` holds them.
        family: Names of the parts.
        layers: The decoder layers.
        final_norm: The norm between them and the head.
        num_sharing: How many processes share the memory of the model's device, this one included; each may take its
            part of what is free.
        num_layer_forwards: How many sequences went through how many layers so far.
    """

    def __init__(
        self, model: PreTrainedModel, family: Family, layers: Layers | None = None, *, num_sharing: int = 1
    ) -> None:
        """By default the model's own layers, in memory."""
        self.model = model
        self.family = family
        self.layers = layers or ResidentLayers(model, family)
        self.num_sharing = num_sharing
        self.num_layer_forwards = 0
        self._arguments: dict[int, list[dict[str, Any]]] = {}
        self.final_norm = model.get_submodule(family.final_norm)
        self._head = model.get_output_embeddings()
        self._scale_logits = _logits_scaling(model.config, family)

    @property
    def vocab_size(self) -> int:
        """How many logits a token has."""
        return int(self._head.out_features)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """What enters the first layer.

        Args:
            ids: int64 ``[num_sequences, seq_len]``.
        """
        rows = []
        for sequence in ids.to(self.model.device).split(1):
            hidden, arguments = self._enter(sequence)
            self._arguments.setdefault(ids.shape[1], arguments)
            rows.append(hidden)
        return torch.cat(rows)

    def run(self, module: nn.Module, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Runs one layer.

        Args:
            module: The layer, as :meth:`Layers.layer` lends it.
            index: Its number.
            hidden: What enters it.

        Returns:
            What leaves it, as a new tensor.
        """
        arguments = self._arguments[hidden.shape[1]][index]
        self.num_layer_forwards += len(hidden)
        rows = self._sequences_per_call(hidden.shape[1])
        if len(hidden) <= rows:
            return _first(module(hidden, **arguments))
        # Not joined at the end, when what entered, the parts and the whole would be there at once.
        first = _first(module(hidden[:rows], **arguments))
        left = first.new_empty(hidden.shape)  # on this layer's GPU, where a model is spread over several
        left[:rows] = first
        for start in range(rows, len(hidden), rows):
            left[start : start + rows] = _first(module(hidden[start : start + rows], **arguments))
        return left

    @contextmanager
    def only_neurons(self, kept_neurons: KeptNeurons) -> Iterator[None]:
        """Runs as if only these FFN neurons existed; nothing is cut, so widths can be tried in any order."""
        handles = []
        for layer, kept in zip(decoder_layers(self.model, self.family), kept_neurons, strict=True):
            projection = layer.get_submodule(self.family.ffn_output)
            assert isinstance(projection, nn.Linear)
            mask = torch.zeros(projection.in_features, dtype=self.model.dtype, device=self.device_of(layer))
            mask[torch.from_numpy(kept).to(mask.device)] = 1
            handles.append(projection.register_forward_pre_hook(lambda _, inputs, mask=mask: (inputs[0] * mask,)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def blocks(self, ids: torch.Tensor) -> Iterator[torch.Tensor]:
        """Splits sequences into those that go through the layers together.

        Resident layers cost nothing to visit again, so few sequences are in flight; others are visited once for as many
        sequences as half of the free memory holds, each twice: what enters a layer and what leaves it.
        """
        seq_len = ids.shape[1]
        size = together = self._sequences_per_call(seq_len)
        if not self.layers.resident:
            size = max(together, self.num_fitting(seq_len) // together * together)
        yield from ids.split(size)

    def calls(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """Splits sequences into those that share a call of each layer, whatever memory there is."""
        return list(ids.split(self._sequences_per_call(ids.shape[1])))

    def num_fitting(self, seq_len: int) -> int:
        """How many sequences fit into half of the free memory; each takes what enters a layer and what leaves it."""
        state_bytes = seq_len * self.model.config.hidden_size * self.model.dtype.itemsize
        return self.free_bytes() // (2 * 2 * state_bytes)

    def free_bytes(self) -> int:
        """What this process may still take of the device's memory, where all that share it ask at the same time.

        Of several GPUs the one with the least counts: states pass through all of them.
        """
        devices = {self.device_of(layer) for layer in decoder_layers(self.model, self.family)}
        return min(map(available_bytes, {self.model.device, *devices})) // self.num_sharing

    def device_of(self, layer: nn.Module) -> torch.device:
        """Where a layer computes: on its own GPU where the model is spread over several."""
        found = next((each.device for each in layer.parameters()), self.model.device)
        return self.model.device if found.type == "meta" else found  # on disk

    def _sequences_per_call(self, seq_len: int) -> int:
        return max(1, _TOKENS_PER_CALL["cuda" if self.model.device.type == "cuda" else "cpu"] // seq_len)

    def run_without(self, parts: Collection[Part], module: nn.Module, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Runs one layer as if its attention, its FFN or both had been removed."""
        with parts_removed(module, self.family, parts):
            return self.run(module, index, hidden)

    def remove(self, sub_blocks: Collection[SubBlock]) -> None:
        """Takes these out for good."""
        for layer, part in sub_blocks:
            {"attention": self.layers.remove_attention, "ffn": self.layers.remove_ffn}[part](layer)

    def forward(self, hidden: torch.Tensor, *, without_attention: Collection[int] = ()) -> torch.Tensor:
        """Runs all layers, some of them as if their attention had been removed."""
        for index in range(len(self.layers)):
            with self.layers.layer(index) as module:
                parts: tuple[Part, ...] = ("attention",) if index in without_attention else ()
                hidden = self.run_without(parts, module, index, hidden)
        return hidden

    def logits(self, states: torch.Tensor, *, normed: bool = False) -> Iterator[tuple[slice, torch.Tensor]]:
        """Logits of single tokens, a block of the vocabulary at a time: all of them never exist at once.

        Args:
            states: What left the last layer, ``[num_tokens, hidden_size]``.
            normed: They went through the final norm already.

        Yields:
            Which entries of the vocabulary, and float32 ``[num_tokens, block]`` (float64 where that is computed in).
        """
        # Where a model is spread over several GPUs, the head may be on another one than the last layer.
        states = (states if normed else self.final_norm(states)).to(self._head.weight.device)
        size = max(1, _HEAD_LOGITS["cuda" if states.is_cuda else "cpu"] // len(states))
        for start in range(0, self._head.out_features, size):
            entries = slice(start, min(start + size, self._head.out_features))
            bias = None if self._head.bias is None else self._head.bias[entries]
            logits = self._scale_logits(linear(states, self._head.weight[entries], bias))
            yield entries, logits.to(torch.promote_types(logits.dtype, torch.float32))

    def losses(self, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihoods in nats.

        Args:
            states: What left the last layer, ``[num_tokens, hidden_size]``.
            targets: The tokens that follow, int64 ``[num_tokens]``.

        Returns:
            float32 ``[num_tokens]``.
        """
        parts = []
        states, targets = (each.to(self._head.weight.device) for each in (states, targets))
        for some, wanted in zip(states.split(_HEAD_TOKENS), targets.split(_HEAD_TOKENS), strict=True):
            normalizers, found = [], torch.zeros(len(some), device=some.device)
            for entries, logits in self.logits(some):
                normalizers.append(logits.logsumexp(-1))
                rows = ((wanted >= entries.start) & (wanted < entries.stop)).nonzero().squeeze(1)
                found[rows] = logits[rows, wanted[rows] - entries.start]
            parts.append(torch.stack(normalizers).logsumexp(0) - found)
        return torch.cat(parts)

    def divergence(self, original: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """KL divergence, in nats, of the next token's distributions: from ``original``'s to that of ``states``.

        Args:
            original: What left the final norm of the original model, which compensation may have scaled since;
                ``[num_tokens, hidden_size]``.
            states: What left the last layer of the model as it is, the same.

        Returns:
            float32 ``[num_tokens]``.
        """
        parts = []
        for before, after in zip(original.split(_HEAD_TOKENS), states.split(_HEAD_TOKENS), strict=True):
            ours = torch.stack([logits.logsumexp(-1) for _, logits in self.logits(before, normed=True)]).logsumexp(0)
            theirs, total = [], torch.zeros_like(ours)
            for (_, p), (_, q) in zip(self.logits(before, normed=True), self.logits(after), strict=True):
                theirs.append(q.logsumexp(-1))
                total += ((p - ours[:, None]).exp() * (p - q)).sum(-1)
            parts.append(total - ours + torch.stack(theirs).logsumexp(0))
        return torch.cat(parts)

    def token_losses(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihoods of each sequence's next tokens in nats.

        Args:
            hidden: What left the last layer.
            ids: int64 ``[num_sequences, seq_len]``.

        Returns:
            float32 ``[num_sequences, seq_len - 1]`` on the CPU.
        """
        targets = ids[:, 1:].to(hidden.device)
        return torch.stack([self.losses(*row) for row in zip(hidden[:, :-1], targets, strict=True)]).cpu()

    def _enter(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """Asks the model itself what it hands its layers: masks and rotary embeddings stay out of our code."""
        entered: list[tuple[torch.Tensor, dict[str, Any]]] = []

        def listener(layer: nn.Module) -> nn.Module:
            return _Listener(layer, lambda hidden, arguments: entered.append((hidden, arguments)))

        parent, _, name = self.family.layers.rpartition(".")
        owner = self.model.get_submodule(parent)
        layers = getattr(owner, name)
        setattr(owner, name, nn.ModuleList([listener(layer) for layer in layers]))
        try:
            self.model.base_model(ids, use_cache=False)
        finally:
            setattr(owner, name, layers)
        return entered[0][0], [arguments for _, arguments in entered]


class _Listener(nn.Module):
    """Stands where a layer was: reports its arguments and passes the hidden state on."""

    def __init__(self, layer: nn.Module, report: Callable[[torch.Tensor, dict[str, Any]], None]) -> None:
        super().__init__()
        self._report = report
        # What models read off their layers, such as `attention_type`, while they choose a mask.
        self.__dict__.update({k: v for k, v in layer.__dict__.items() if isinstance(v, str | int)})

    def forward(self, hidden: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self._report(hidden, arguments)
        return hidden


def attention_removed(module: nn.Module, family: Family) -> AbstractContextManager[None]:
    """Runs a layer as if its attention, and the norms that go with it, were gone."""
    attention: Part = "attention"
    return parts_removed(module, family, [attention])


@contextmanager
def parts_removed(module: nn.Module, family: Family, parts: Collection[Part]) -> Iterator[None]:
    """Runs a layer as if some of its parts, and the norms that go with them, were gone."""
    modules = {"attention": (family.attention_parts, remove_attention), "ffn": (family.ffn_parts, remove_ffn)}
    put_back = _remembered(module, [name for part in parts for name in modules[part][0]])
    for part in parts:
        modules[part][1](module, family)
    try:
        yield
    finally:
        put_back()


def _logits_scaling(config: Any, family: Family) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the model does to its head's output, element by element; Transformers does it outside of any module."""
    divisor = getattr(config, family.logits_divisor) if family.logits_divisor else None
    softcap = getattr(config, family.logits_softcap) if family.logits_softcap else None

    def scale(logits: torch.Tensor) -> torch.Tensor:
        if divisor is not None:
            logits = logits / divisor
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        return logits

    return scale


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
