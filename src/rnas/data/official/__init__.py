"""The official data sets: where their archives are, and how they are read."""
