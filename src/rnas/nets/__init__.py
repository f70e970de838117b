"""Networks: the supernet that is searched, the network derived from a genotype, and the zoo."""
