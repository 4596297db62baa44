"""Models: the Llama definition, its weights on disk, and the cache. No file here knows a protocol."""
