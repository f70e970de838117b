"""Search methods: what each does with the architecture parameters."""
