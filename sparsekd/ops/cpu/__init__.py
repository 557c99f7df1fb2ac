"""What runs on the CPU: the compiled kernels, and torch on a densified weight."""
