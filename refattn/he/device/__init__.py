"""SEAL's arithmetic on a GPU: a query's whole program as launches of kernels, every word equal to SEAL's."""
