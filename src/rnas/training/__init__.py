"""Training of target networks, and the steps that search and training share."""
