"""Problems of scoring cells, and what the formula says of them in float64."""

import torch

D, PAIRS = 32, 8


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(n_kv=2, group=2, nlist=19, n_segments=4, batch=2, hidden=32, seed=0):
    heads = n_kv * group
    generator = torch.Generator().manual_seed(seed)
    return {
        "q": random(batch, heads, D, seed=seed),
        "keys": random(n_kv, nlist, D, seed=seed + 1) * 0.3,
        "inv_freq": 50.0 ** (-torch.arange(0, PAIRS) / PAIRS),
        "sizes": torch.randint(
            0, 4, (batch, n_kv, nlist * n_segments), generator=generator, dtype=torch.int32
        ),
        "n_middle": torch.tensor([900, 37][:batch]),
        "distance": torch.tensor([1000, 64][:batch]),
        "n_segments": n_segments,
        "network": (
            random(heads, D, seed=2) * 0.1,
            1 + random(heads, D, seed=3).abs(),
            random(heads, hidden, D, seed=4) * 0.2,
            random(heads, hidden, seed=5),
            random(heads, nlist + 1, hidden, seed=6) * 0.2,
            random(heads, nlist + 1, seed=7),
        ),
        "trained_share": 0.3,
        "interleaved": False,
        "share": "group",
        "by_size": False,
    }


def expected_weights(p) -> torch.Tensor:
    """One query head, one cell at a time."""
    q, keys, sizes = p["q"].double(), p["keys"].double(), p["sizes"].double()
    batch, heads, _ = q.shape
    n_kv, nlist, _ = keys.shape
    n_segments, group = p["n_segments"], heads // n_kv
    frequencies = p["inv_freq"].double()
    weights = torch.zeros(batch, heads, nlist * n_segments, dtype=torch.float64)
    for b in range(batch):
        n, distance = int(p["n_middle"][b]), int(p["distance"][b])
        for h in range(heads):
            own = sizes[b if len(sizes) > 1 else 0, h // group]
            scores = torch.empty(nlist, n_segments, dtype=torch.float64)
            for s in range(n_segments):
                age = distance - ((s + 0.5) * n / n_segments - 0.5)
                angle = age * frequencies
                width = max(1.0, n / n_segments)
                damping = (width * frequencies / 2).sin() / (width * (frequencies / 2).sin())
                turned = q[b, h].clone()
                at = torch.arange(PAIRS)
                x, y = (2 * at, 2 * at + 1) if p["interleaved"] else (at, at + PAIRS)
                turned[x] = damping * (q[b, h, x] * angle.cos() - q[b, h, y] * angle.sin())
                turned[y] = damping * (q[b, h, y] * angle.cos() + q[b, h, x] * angle.sin())
                scores[:, s] = keys[h // group] @ turned
            middle = 1.0
            if p["network"]:
                mean, scale, w1, b1, w2, b2 = (t[h].double() for t in p["network"])
                hidden = w1 @ ((q[b, h] - mean) * scale) + b1
                logits = w2 @ (hidden * torch.sigmoid(hidden)) + b2
                scores = p["trained_share"] * logits[:-1, None] + (1 - p["trained_share"]) * scores
                inside = (own.view(nlist, -1).sum(1) * logits[:-1].exp()).sum()
                middle = float(inside / (inside + logits[-1].exp()))
            if not own.any():
                continue
            scores = scores.flatten().masked_fill(own == 0, -torch.inf)
            unnormed = (scores - scores.max()).exp()
            weights[b, h] = middle * unnormed / (unnormed * own).sum()
    if p["share"] == "group":
        weights = weights.unflatten(1, (n_kv, group)).sum(2)
    if p["by_size"]:
        weights = weights * sizes.repeat_interleave(weights.shape[1] // n_kv, 1)
    return weights
