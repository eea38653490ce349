"""Environments: each is one module, and its engine; envs.py says what a module offers."""
