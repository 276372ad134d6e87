"""Custom operators: their contracts, their meaning in numpy, and the library that runs them fast.

Installed as `qcompiler.kernels`.
"""
