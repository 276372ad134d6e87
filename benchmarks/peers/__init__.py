"""Other tools, each in a virtual environment of its own, on the same model, data and machine as ours."""
