"""Architecture search: the run, the engine, the methods."""
