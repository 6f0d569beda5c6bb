"""The products on GPUs: lane programs, and what decides which one runs and how.

Every kernel is a module with the four functions of `kernel.Kernel`: spmv, spmv_transposed, sddmm,
densify and chain. `row_walk` and `staging` are what their programs are made of; `device` has the
facts of the GPU, `tuning` every tuned number, `occupancy` and `gather` how a product is laid out on
the device, and `select` which kernel serves a product.
"""
