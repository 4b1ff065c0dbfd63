"""Tensors in, tensors out; knows no index. The code lies in the folders of `kernels/`.

`pyproject.toml` maps each of those folders to its name in this package. `kernels/` itself has no
`__init__.py`: from the root of the checkout it would be the module `kernels`, hide an installed
Hugging Face package of that name, and `import transformers` would fail on it.
"""
