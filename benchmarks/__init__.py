"""Measurements of the compiler on real models: nothing here ships in the package."""
