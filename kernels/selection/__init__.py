"""Retrieval and differentiable choice.

cosine_topk    the k rows z of a bank with the largest <q, z> / (|q| |z|), ties to the lower row
"""
