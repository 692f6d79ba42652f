"""The glue between kernels and PyTorch: schemas, shapes, autograd, choice of backend."""
