"""What surrounds attention in the papers: encodings, losses, learners, samplers, cost models; functions of arrays.

A module a subject. Each function takes arrays of NumPy, PyTorch, JAX or CuPy and returns the same kind; what is trained
is PyTorch's and imports it when it is called.
"""
