"""Run one decoder layer of a model at a time, over stored hidden states.

The model itself is called, so embeddings, position tables and options are its own. Layers
before the wanted one only pass their input on. The wanted one takes the stored hidden state
instead, and when it is done, an exception leaves the model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .attention import Handler, routed
from .families import model_layers
from .models import attention_modules


class StopLayer(Exception):
    """Raised by a handler that has seen enough; the rest of the layer is then not computed."""


class _LayerOutput(Exception):
    """Carries a layer's output out of the model."""


class LayerStream:
    """The decoder layers of `model`, run one at a time; a handler computes their attention.

    Running layers 0, 1, ... in turn, each over the output of the one before, is the model's own
    computation, bit for bit if the chunks are the same. Raises ValueError for a model whose layers
    are in no `ModuleList`.
    """

    def __init__(self, model: nn.Module, *, chunk: int = 8192):
        self.model, self.chunk = model, chunk
        self.layers = decoder_layers(model)
        self.attention_layers = model_layers(model)
        stateful = [n for n, own in enumerate(self.attention_layers) if own.has_state]
        if stateful:
            raise ValueError(
                "the layers of a model must have attention and no state to be run one by one, as "
                f"training does; got one that keeps a state, layer {stateful[0]}"
            )
        chunked = [n for n, own in enumerate(self.attention_layers) if own.is_chunked]
        if chunked:
            raise ValueError(
                "the layers of a model must see all tokens or a sliding window to be run one by "
                f"one, as training does; got one with a window in chunks, layer {chunked[0]}"
            )
        shared = [n for n, own in enumerate(self.attention_layers) if own.shares is not None]
        if shared:
            raise ValueError(
                "the layers of a model must all have keys and values of their own to be run one "
                f"by one, as training does; got one that has those of another, layer {shared[0]}"
            )
        alone = {id(own) for own in attention_modules(model).values()}
        if any(id(layer) in alone for layer in self.layers):  # longcat_flash has two in a layer
            raise ValueError(
                "each layer of a model must have one attention to be run by itself, as training "
                f"does; got several in a layer, {type(self.layers[0]).__name__}"
            )
        self._returns_tuple = [False] * len(self.layers)

    @torch.no_grad()
    def run(
        self,
        layer: int,
        token_ids: Int[Tensor, " T"],
        hidden: Float[Tensor, "*parts T hidden"] | None,
        handler: Handler,
    ) -> Float[Tensor, "*parts T hidden"] | None:
        """Output of `layer` for `hidden`, its input (None for layer 0: the embeddings).

        `handler` gets one `LayerCall` for each chunk of tokens. None where it raises `StopLayer`.
        """
        outputs = []
        device = self.model.device
        with routed(self.model, handler, self.attention_layers):
            for start in range(0, len(token_ids), self.chunk):
                part = slice(start, min(start + self.chunk, len(token_ids)))
                own = None if hidden is None else hidden[..., part, :].to(device)
                positions = torch.arange(part.start, part.stop, device=device)
                with self._only(layer, own):
                    try:
                        self.model(
                            token_ids[None, part].to(device),
                            position_ids=positions[None],
                            use_cache=False,
                            logits_to_keep=1,
                        )
                    except _LayerOutput as output:
                        outputs.append(output.args[0])
                    except StopLayer:
                        continue
        return torch.cat(outputs, -2) if outputs else None

    @contextmanager
    def _only(self, layer: int, hidden: Tensor | None) -> Iterator[None]:
        skipped = [
            _replaced_forward(block, self._pass_on(number))
            for number, block in enumerate(self.layers[:layer])
        ]
        own = _replaced_forward(self.layers[layer], self._leave(layer, hidden))
        try:
            yield
        finally:
            for restore in (*skipped, own):
                restore()

    def _pass_on(self, number: int) -> Callable:
        def forward(hidden_states, *_, **__):
            return (hidden_states, None) if self._returns_tuple[number] else hidden_states

        return forward

    def _leave(self, layer: int, stored: Tensor | None) -> Callable:
        original = self.layers[layer].forward

        def forward(hidden_states, *arguments, **options):
            own = hidden_states if stored is None else stored
            output = original(own, *arguments, **options)
            self._returns_tuple[layer] = isinstance(output, tuple)
            raise _LayerOutput(output[0] if isinstance(output, tuple) else output)

        return forward


def _replaced_forward(block: nn.Module, forward: Callable) -> Callable[[], None]:
    """Put `forward` in place of the block's; returns what puts the old one back."""
    before = vars(block).get("forward")  # accelerate puts one of its own there
    block.forward = forward

    def restore():
        if before is None:
            del block.forward
        else:
            block.forward = before

    return restore


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that hold the self-attention of each layer, in order."""
    names = {module: name for name, module in model.named_modules()}
    found = []
    for attention in attention_modules(model).values():
        parts = names[attention].split(".")
        ends = [
            end
            for end in range(len(parts), 0, -1)
            if isinstance(model.get_submodule(".".join(parts[: end - 1])), nn.ModuleList)
        ]
        if not ends:
            raise ValueError(
                "the model must have its decoder layers in a ModuleList; got "
                f"model_type={model.config.model_type!r}"
            )
        found.append(model.get_submodule(".".join(parts[: ends[0]])))
    return found
