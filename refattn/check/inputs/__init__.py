"""What a kernel is tried on: families of calls, each named by the bug that it exposes."""
