"""rnas searches, trains, attacks and explains robust convolutional networks."""

__version__ = "0.1.0"
