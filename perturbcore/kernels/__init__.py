"""Parent of the kernel families, which live in ``kernels/`` at the top of the repository."""
