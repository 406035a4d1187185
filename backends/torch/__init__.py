"""The PyTorch port: train, sample and average on CUDA, CPU and MPS."""
