"""Post-training as a choice of target distribution, in PyTorch Lightning."""

__version__ = "0.1.0"
