"""Real models and data, taken out of public packages, with the figure that tells whether each still works."""
