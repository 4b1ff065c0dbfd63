"""Vectors and buckets: k-means, assignment, inverted lists and routers. Knows no tokens or models."""
