"""What measures and costs the kernels: benches, compilers, models of chips."""
