"""What stands under the pictures of a report, by the beginning of their names."""

CAPTIONS = {
    "recall": "Share of the true attention mass of the middle (everything but sinks and window) "
    "that the visited rows hold, summed over queries, heads and layers. <b>oracle</b> knows the "
    "true mass of every list, <b>oracle-tokens</b> of every row; <b>random</b> lists are the "
    "floor. The pale band joins the best of all that could be built.",
    "recall_bytes": "The same against bytes read in one step of one layer: visited keys and "
    "values, and what choosing them reads (router weights, centroids, summaries, codes).",
    "error_bytes": "How far the output of attention is from dense attention's, relative to its "
    "length, mean over queries and layers: the band lies below.",
    "heads": "First: how much of each query head's attention lies in the middle; only heads that "
    "look there can lose anything. Then each method's recall at the budget of the table; pale "
    "numbers belong to heads with under 5 % there, cells are empty where there is nothing.",
    "accuracy": "The context is prefilled densely; question and answer go through the method, at "
    "several budgets. The dashed line is dense attention: what the model itself can do.",
    "answers": "Share of the answers that are right, methods sorted by their mean. The context is "
    "prefilled densely; question and answer go through the method. Where <b>dense</b> is low the "
    "model cannot do the task, and it tells methods apart no more.",
    "depths": "Where in the context the answer stood (down), and how long the context was "
    "(across): the mean of the prompts whose answer stood there.",
    "latency": "Medians of one decode step of one layer on the path that gives the answers above. "
    "<b>dense</b> is SDPA with the query heads of a group packed as rows, which took turns with "
    "each method.",
    "keys_queries": "Keys and queries of the heads that look farthest, RoPE removed, on their "
    "first two principal components together. Where the clouds lie apart, the bucket whose "
    "centroid is nearest to a query need not be the bucket with its keys.",
    "bucket_sizes": "Rows a bucket of the trained partition on this context; the red line is the "
    "mean. Imbalance is FAISS's factor: 1 when all are equally large.",
}
