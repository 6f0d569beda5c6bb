"""Double Sparse Factorization and pruning of Flax models (arXiv 2409.18850)."""
