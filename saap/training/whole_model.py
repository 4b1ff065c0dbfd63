"""`saap.train`: partitions and routers for every layer and head of a model, layer by layer.

Hidden states of all sequences are kept between two layers; each layer is run over them once, its
keys are clustered, its queries' true mass over buckets computed, its routers fitted. Memory is
bounded by one layer (`plan.memory_needed`).
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from saap import __version__, hf
from saap.budget import Budget
from saap.hf.layerwise import LayerStream
from saap.stateful import stateful
from saap.trained_index import TrainedIndex

from .hidden import HiddenInMemory
from .layer import FinishedLayer, pass_through, recall_nprobe, train_layer
from .meter import Meter, Progress
from .options import N_SEGMENTS, TrainingOptions
from .plan import MemoryNeeded, Plan, as_sequences, make_plan, memory_needed
from .processes import Processes
from .work import WorkFolder, remove_work, weights_digest


@dataclass(frozen=True)
class Training:
    """A checked training that has not begun: `plan`, `options` and the model's `description`."""

    plan: Plan
    options: TrainingOptions
    description: dict
    memory: MemoryNeeded

    @property
    def corpus(self) -> dict:
        tokens = torch.cat(self.plan.sequences)
        return {"tokens": self.plan.n_tokens, "sha256": hf.fingerprint(tokens)}

    def manifest(self, model) -> dict:
        """What has to be the same for a finished layer to be of use."""
        return {
            "software": {"saap": __version__, "torch": torch.__version__},
            "model": {
                **self.description,
                "weights": weights_digest(model),
                "dtype": str(model.dtype),
                "device": model.device.type,
            },
            "corpus": {
                **self.corpus,
                "sequences": len(self.plan.sequences),
                "cuts": hf.fingerprint(torch.tensor([len(t) for t in self.plan.sequences])),
                "context": self.plan.context,
            },
            "options": self.options.as_dict(),
        }


def prepare(model, token_ids: Tensor | Sequence[Tensor], options: TrainingOptions) -> Training:
    """Check model and corpus as `train` does, and say what memory it will take."""
    sequences = as_sequences(token_ids)
    longest = max(len(t) for t in sequences)
    if longest > hf.max_context(model):
        raise ValueError(
            f"a sequence must have at most the model's max_position_embeddings="
            f"{hf.max_context(model)} tokens; got {longest}"
        )
    size = model.get_input_embeddings().weight.shape[0]
    for tokens in sequences:
        if int(tokens.min()) < 0 or int(tokens.max()) >= size:
            wrong = tokens.min() if int(tokens.min()) < 0 else tokens.max()
            raise ValueError(f"token_ids must be in 0..{size - 1}; got {int(wrong)}")
    options = options.for_context(longest)
    plan = make_plan(sequences, options)
    description = hf.describe(model)
    hidden_size = model.config.get_text_config().hidden_size
    memory = memory_needed(plan, options, description, hidden_size, model.dtype.itemsize)
    return Training(plan, options, description, memory)


@torch.no_grad()
def train(
    model,
    token_ids: Tensor | Sequence[Tensor],
    *,
    nlist: int | None = None,
    router: str = "mlp",
    seed: int = 0,
    n_sink: int = Budget.n_sink,
    window: int = Budget.window,
    n_segments: int = N_SEGMENTS,
    hidden: int = 64,
    steps: int = 400,
    baselines: bool = False,
    progress: Progress | None = None,
    work: str | Path | None = None,
    processes: Processes | None = None,
) -> TrainedIndex:
    """Train partitions and routers for every layer of a Hugging Face model, layer by layer.

    `token_ids`: a LongTensor `[n, T]` or a list of 1-D ones; one in eight sequences is kept back
    to measure the recorded recall. `nlist`: buckets per KV head; if not given, `default_nlist` of
    the longest sequence. `router`: the default router of the result, "mlp" (Saap's classifier),
    "linear" or "centroid" (only k-means is trained). `n_segments`: time segments into which
    decoding cuts the buckets (`saap.routing`), 1 for whole buckets. `n_sink`, `window`: the
    first and the last tokens, which decoding always visits. `hidden`, `steps`: width and optimiser
    steps of the network. `baselines` also trains what serves for
    comparison only: the linear router, and centroids of keys with RoPE left on.
    `progress(what, done, total)` is called as work proceeds. The same seed gives the same index
    on the same machine with the same number of threads.

    `work`: a folder for finished layers and hidden states; without it they are held in memory. A
    training that was killed goes on from there, with the same result; `train_file` removes the
    folder when the index is saved. `processes`: this process among several that share `work`; each
    trains some layers, and all return the whole index.

    Layers with a sliding window are never searched and get no index. Raises ValueError for a model
    that is not supported, an empty, too short or repetitive corpus, bad options, or a `work`
    folder of another training; FloatingPointError if a layer's loss is not finite; ProcessLost if
    another process fails.

    Source: Saap, arXiv 2502.08246.
    """
    options = TrainingOptions(
        nlist, router, seed, n_sink, window, n_segments, hidden, steps, baselines
    )
    training = prepare(model, token_ids, options)
    return run(model, training, progress=progress, work=work, processes=processes)


@stateful
@torch.no_grad()
def run(
    model,
    training: Training,
    *,
    progress: Progress | None = None,
    work: str | Path | None = None,
    processes: Processes | None = None,
) -> TrainedIndex:
    """Do what `prepare` checked; see `train`."""
    if processes is not None and work is None:
        raise ValueError("several processes must share a work folder; got none: pass `work`")
    stream = LayerStream(model)
    # Layers with a sliding window are never searched: they are run for their outputs alone.
    searched = [n for n, layer in enumerate(stream.attention_layers) if layer.is_full]
    if not searched:
        raise ValueError("a model must have layers of full attention to be searched; got none")
    own = [n for n in searched if processes is None or processes.owns(n)]
    if work is None:
        return _trained(stream, training, own, searched, None, processes, progress)
    folder = WorkFolder(
        Path(work),
        training.manifest(model),
        processes,
        bytes_needed=2 * training.memory.hidden * (1 if processes is None else processes.world),
    )
    with contextlib.closing(folder):
        return _trained(stream, training, own, searched, folder, processes, progress)


def _trained(
    stream: LayerStream,
    training: Training,
    own: list[int],
    searched: list[int],
    folder: WorkFolder | None,
    processes: Processes | None,
    progress: Progress | None,
) -> TrainedIndex:
    """`own`: layers that this process trains, of those that are `searched`."""
    n_layers = training.description["num_layers"]
    finished: dict[int, FinishedLayer] = {}
    todo = [n for n in own if folder is None or not folder.has(n)]
    for n in own:
        if n not in todo:
            folder.check(n)
    if todo:
        hidden = HiddenInMemory() if folder is None else folder.hidden_states(todo[0])
        meter = Meter(n_layers, own, todo, hidden.layer, progress, processes)
        for layer in range(hidden.layer, todo[-1] + 1):
            report = meter.of_layer(layer)
            if layer in todo:
                finished[layer] = train_layer(
                    stream,
                    layer,
                    training.plan,
                    hidden,
                    training.options,
                    report,
                    output_needed=layer < todo[-1],
                )
                if folder is not None:
                    folder.save(layer, finished.pop(layer))
            else:
                pass_through(stream, layer, training.plan, hidden, report)
            if layer < todo[-1]:
                hidden.advance()
        meter.done()
    if processes is not None:
        processes.reach("trained")
    if folder is not None:
        finished = {n: folder.load(n) for n in searched}
    if processes is not None:
        processes.reach("loaded")
    return assembled(training, finished)


def train_file(
    model,
    training: Training,
    out: str | Path,
    *,
    progress: Progress | None = None,
    processes: Processes | None = None,
) -> TrainedIndex:
    """Train to a file. Until it is written, finished layers are in `OUT.partial`: after a kill at
    any point the same call goes on from there, to the same file, byte for byte."""
    out = Path(out)
    work = work_folder_of(out)
    index = run(model, training, progress=progress, work=work, processes=processes)
    if processes is None or processes.rank == 0:
        index.save(out)
        remove_work(work)
    if processes is not None:
        processes.reach("saved")
    return index


def work_folder_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def assembled(training: Training, finished: dict[int, FinishedLayer]) -> TrainedIndex:
    """The index of all layers, with what was recorded of each; none for those not searched."""
    options, about = training.options, training.description
    numbers = range(about["num_layers"])
    layers = tuple(finished[n].index if n in finished else None for n in numbers)
    found = list(finished.values())
    nothing = [0.0] * about["num_heads"]
    recall = {
        name: [finished[n].recall[name] if n in finished else nothing for n in numbers]
        for name in found[0].recall
    }
    metadata = {
        "model": about,
        "nlist": options.nlist,
        "router": options.router,
        "seed": options.seed,
        "context": training.plan.context,
        "n_sink": options.n_sink,
        "window": options.window,
        "n_segments": options.n_segments,
        "interleaved": any(own.index.interleaved for own in found),
        "sm_scale": [1.0 if own is None else own.sm_scale for own in layers],
        "corpus": training.corpus,
        "recall": {"nprobe": recall_nprobe(options.nlist), **recall},
    }
    return TrainedIndex(layers, metadata)
