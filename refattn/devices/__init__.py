"""Attention whose queries and keys are spread over several devices.

`shards` cuts a call and merges parts, `context_parallel` checks real runs on the processes of `ranks`, `ring` and
`tree` are right implementations. Nothing is imported here: a rank needs little of it.
"""
