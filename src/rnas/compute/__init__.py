"""Where and in what a network computes: device, number format, threads, memory, checkpoints."""
