"""The streaming path on a GPU: the same text and bounds, with cuBLAS for products and kernels for a tile's steps."""
