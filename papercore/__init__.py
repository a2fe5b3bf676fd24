"""papercore: ten deep-learning papers that run, and the PyTorch kernels they run on."""

__version__ = "0.1.0"
