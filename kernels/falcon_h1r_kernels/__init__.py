"""Triton kernels for the hot operators of Falcon-H1; imports torch and triton, never falcon_h1r."""
