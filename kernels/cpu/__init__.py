"""What the CPU kernels share: vector instructions, memory by address, threads."""
