"""Golden files: input cases with exact answers and allowed errors, for kernels in other languages."""
