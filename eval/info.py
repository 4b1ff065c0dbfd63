"""`saap info`: an index file in a few lines."""

from pathlib import Path

from rich.table import Table

from saap.trained_index import TrainedIndex

from .terminal import console


def print_index(path: Path, index: TrainedIndex) -> None:
    meta, model = index.metadata, index.metadata["model"]
    facts = {
        "file": f"{path} ({path.stat().st_size / 1e6:.1f} MB)",
        "model": f"{model['model_type']}, {model['num_layers']} layers, {model['num_heads']} "
        f"query and {model['num_kv_heads']} KV heads of {model['head_dim']}, RoPE {model['rope']}",
        "partition": f"nlist {index.nlist}, k-means on de-RoPEd keys, seed {meta['seed']}",
        "router": f"{index.default_router}, "
        f"{index.layers[0].router(index.default_router).nbytes / 1e3:,.0f} kB a layer",
        "trained on": f"{meta['corpus']['tokens']:,} tokens in contexts of {meta['context']:,}, "
        f"sinks {meta['n_sink']}, window {meta['window']}",
    }
    for name, value in facts.items():
        console.print(f"[dim]{name:>10}[/]  {value}", highlight=False)
    recall = meta["recall"]
    routers = [name for name in recall if name not in ("nprobe", "middle_mass")]
    table = Table(
        title=f"held-out middle recall at nprobe {recall['nprobe']} of {index.nlist}",
        title_justify="left",
        header_style="dim",
    )
    for column in ("layer", "head", "middle mass", *routers):
        table.add_column(column, justify="right")
    for layer, row in enumerate(recall["middle_mass"]):
        for head, mass in enumerate(row):
            table.add_row(
                str(layer),
                str(head),
                f"{mass:.1%}",
                *(f"{recall[name][layer][head]:.0%}" for name in routers),
                style="dim" if mass < 0.05 else None,
            )
    console.print(table)
