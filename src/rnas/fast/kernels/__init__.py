"""GPU kernels in Triton, each with its launcher."""
