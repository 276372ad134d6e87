"""The operators for CUDA, in Triton; it takes the extra `triton`, to build the library or to test it, not to run it."""
