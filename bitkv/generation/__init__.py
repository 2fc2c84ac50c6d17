"""Measured generation: a `request`, the run (`measured`), a `process` of its own for it."""
