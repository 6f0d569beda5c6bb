"""The products: what users and JAX call, and which implementation serves it."""
