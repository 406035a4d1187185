"""The JAX port: averages of any pytree; on CPU, GPU and TPU."""
