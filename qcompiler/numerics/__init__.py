"""The numbers room: formats, grids, rounding, packing and metrics, in numpy alone."""
