"""MACKO: a sparse matrix format and its matrix-vector product, for JAX (arXiv 2511.13061)."""
