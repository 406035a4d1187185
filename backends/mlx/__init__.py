"""The MLX port: training and sampling on Apple silicon and CPUs; averages of any module."""
