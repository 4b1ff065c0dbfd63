"""Every method on a pretrained model, at equal rows and at equal bytes: `docs/selectors.md`.

    make models
    saap train smollm2 --corpus prose --context 4096 --texts 8 --window 32 --baselines \\
        --out runs/prose.safetensors
    run() { saap eval smollm2 --contexts 4096 --corpus prose2 "$@"; }
    free="--methods dense,oracle-tokens,flat,saap,pq,hnsw,kmeans-online,lsh,quest,mean-pages"
    free="$free,moments-pages,streaming --build pq.dims=4,8"
    bound="--index runs/prose.safetensors --methods dense,oracle,random,kmeans,kmeans-rope,linear"
    bound="$bound,mlp,kmeans-cells,blend,moments"
    for name in free bound; do
        shares="--budgets 0.01,0.02,0.03,0.05,0.07,0.1,0.15,0.2"
        run ${!name} --tasks attention $shares --texts 2 --out runs/$name
        run ${!name} --tasks perplexity --answer-budgets 0.05 --texts 3 --out runs/$name-text
        run ${!name} --tasks passkey --answer-budgets 0.05 --prompts 6 --questions 4 \\
            --out runs/$name-keys
    done
    python -m benchmarks.selectors [--add] runs/*

Methods with buckets get an index of another text; all others know the text that they read. Scores
go to `benchmarks/results/selectors.json`, with `--add` beside those that are there, and
then into `docs/selectors.md`.
"""

import itertools
import math
import sys

from saap.eval.units import share_of

from . import reports
from .real_models import counted, needles, runs_of
from .reports import cell, markdown

PAGE, COMMAND = reports.ROOT / "docs" / "selectors.md", "python -m benchmarks.selectors"
SHOWN, ASKED_AT = (0.02, 0.05), 0.05
KILOBYTES = (300, 400, 600, 900)
UNCHARGED = ("dense", "oracle", "oracle-tokens")
"""What these read to choose is not counted: nothing, or the truth itself."""

Found = dict[tuple[str, float], dict]


def by_share(scores: list[dict], task: str) -> Found:
    """Scores of one task by method and share of the rows; of dense attention by 1."""
    found = {}
    for s in scores:
        share = 1.0 if s["method"] == "dense" else share_of(s["budget"])
        if s["task"] == task and share is not None:
            found[s["method"], share] = s
    return found


def methods_of(found: Found) -> list[str]:
    """The method that finds most at the asked share first; dense attention before all."""
    names = dict.fromkeys(method for method, _ in found)
    at = {m: found.get((m, ASKED_AT), {"recall_middle": 2.0})["recall_middle"] for m in names}
    return sorted(names, key=lambda name: -at[name])


def of_rows(scores: list[dict]) -> str:
    """At equal rows: recall, error and bytes, and what is asked at one share."""
    found, text, keys = (by_share(scores, t) for t in ("attention", "perplexity", "passkey"))
    head = ["method", f"pass keys at {ASKED_AT:.0%}", "nats from dense", "to choose"]
    for share in SHOWN:
        head += [f"{share:.0%}: recall", "needles lost", "error", "kB"]
    rows = []
    for method in methods_of(found):
        dense = method == "dense"
        own = [found.get((method, 1.0 if dense else share), {}) for share in SHOWN]
        choosing = None if method in UNCHARGED else own[0].get("router_bytes")
        asked = (method, 1.0 if dense else ASKED_AT)
        row = [
            f"`{method}`",
            cell(keys.get(asked, {}).get("accuracy"), "{:.0%}"),
            "–" if dense else cell(text.get(asked, {}).get("divergence"), "{:.4f}"),
            cell(choosing, "{:,.0f}", 1e-3),
        ]
        for s in own:
            row += [
                cell(s.get("recall_middle"), "{:.1%}"),
                needles(s),
                cell(s.get("output_error"), "{:.3f}"),
                cell(s.get("bytes_read"), "{:,.0f}", 1e-3),
            ]
        rows.append(row)
    return markdown(head, rows)


def at_bytes(found: Found, method: str, what: str, kilobytes: float) -> float | None:
    """A method's score for so many bytes, between the two shares that read fewer and more; None
    where it was not measured with so few, or so many."""
    points = sorted((s["bytes_read"] / 1e3, s[what]) for (m, _), s in found.items() if m == method)
    for (less, low), (more, high) in itertools.pairwise(points):
        if less <= kilobytes <= more and less < more:
            part = math.log(kilobytes / less) / math.log(more / less)
            return low + part * (high - low)
    return None


def of_bytes(scores: list[dict]) -> str:
    """At equal bytes: recall and error, the least error at the most bytes first."""
    found = by_share(scores, "attention")
    rows = []
    for method in methods_of(found):
        if method in UNCHARGED:
            continue
        row, errors = [f"`{method}`"], []
        for kilobytes in KILOBYTES:
            recall, error = (
                at_bytes(found, method, what, kilobytes)
                for what in ("recall_middle", "output_error")
            )
            row += [cell(recall, "{:.1%}"), cell(error, "{:.3f}")]
            errors.append(math.inf if error is None else error)
        if min(errors) < math.inf:
            rows.append((errors[::-1], row))
    head = [name for n in KILOBYTES for name in (f"{n} kB: recall", "error")]
    return markdown(["method", *head], [row for _, row in sorted(rows)])


def tables(runs: list[dict]) -> str:
    scores = [s for run in runs for s in run["scores"]]
    return (
        f"At equal rows ({counted(scores)}):\n\n{of_rows(scores)}\n\n"
        f"At equal bytes:\n\n{of_bytes(scores)}"
    )


def main(folders: list[str]) -> None:
    if not folders:
        raise SystemExit(__doc__)
    path = reports.scores_path("selectors.json")
    runs = runs_of(path, folders)
    reports.put_table(PAGE, COMMAND, tables(runs))
    print(f"wrote {path} and {PAGE}")


if __name__ == "__main__":
    main(sys.argv[1:])
