"""Inference frameworks that bitkv plugs into, a module each; importing one imports its framework."""
