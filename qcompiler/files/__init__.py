"""Models as files: loading with checks, and saving all or nothing."""
