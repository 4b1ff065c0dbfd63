"""What `select_pages` says, in plain PyTorch."""

import torch


def select_pages(q, keys, block_table, seq_lens, counts, sink_pages, window_pages, out) -> None:
    """`q [R, Hq, D]` is scaled already."""
    _, n_kv, dim, page = keys.shape
    grouped = q.unflatten(1, (n_kv, -1))
    for r, length in enumerate(seq_lens.tolist()):
        pages = -(-length // page)
        blocks = block_table[r, :pages].long()
        for h in range(n_kv):
            rows = keys[blocks, h].mT.reshape(-1, dim)[:length]
            scores = torch.full((grouped.shape[2], pages * page), -torch.inf)
            scores[:, :length] = grouped[r, h] @ rows.T
            weight = scores.unflatten(1, (pages, page)).amax(-1).softmax(-1).sum(0)
            weight = torch.nan_to_num(weight, nan=0.0)
            weight[:sink_pages] = torch.inf
            weight[max(0, pages - window_pages) :] = torch.inf
            # The newest page, which may be part full, is taken whatever else is.
            weight[-1] = torch.inf
            order = weight[:-1].argsort(descending=True, stable=True)[: int(counts[r]) - 1]
            taken = torch.cat([order.sort().values, torch.tensor([pages - 1])])
            out[r, h, : len(taken)] = (blocks[taken] * n_kv + h).int()
