"""Every method (way to choose which rows of the cache are read), by name."""

from saap.names import find_named

from .base import Method
from .dense import Dense
from .exact_tokens import Flat, OracleTokens
from .hnsw import HNSW
from .ivf import KMeans, KMeansRope
from .kmeans_online import KMeansOnline
from .learned import MLP, Blend, KMeansCells, Linear
from .lsh import LSH
from .mean_pages import MeanPages
from .moments import Moments, MomentsPages
from .oracle import Oracle
from .pq import PQ
from .quest import Quest
from .random import Random
from .saap import Saap
from .streaming import Streaming

__all__ = ["METHODS", "Method", "find_method"]

METHODS: dict[str, type[Method]] = {
    "dense": Dense,
    "oracle": Oracle,
    "random": Random,
    "streaming": Streaming,
    "kmeans-rope": KMeansRope,
    "kmeans": KMeans,
    "linear": Linear,
    "mlp": MLP,
    "kmeans-cells": KMeansCells,
    "blend": Blend,
    "saap": Saap,
    "moments": Moments,
    "kmeans-online": KMeansOnline,
    "quest": Quest,
    "mean-pages": MeanPages,
    "moments-pages": MomentsPages,
    "oracle-tokens": OracleTokens,
    "flat": Flat,
    "hnsw": HNSW,
    "pq": PQ,
    "lsh": LSH,
}


def find_method(name: str) -> type[Method]:
    """The class of that name. ValueError for an unknown name, with all names and the nearest."""
    return find_named("method", name, METHODS)
