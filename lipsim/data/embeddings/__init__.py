"""Embeddings of a teacher, computed once: the cache, and images with theirs."""
