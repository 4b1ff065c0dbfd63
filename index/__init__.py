"""Vectors and buckets: k-means, inverted lists, routers, the IVF index; no tokens, no models."""
