"""The MLX port: averages of any module; on Apple silicon and CPU."""
