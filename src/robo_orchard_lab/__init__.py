"""A hook-based training system for PyTorch and Accelerate."""
