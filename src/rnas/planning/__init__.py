"""How much work a run does, what it costs, and what fits a given time."""
