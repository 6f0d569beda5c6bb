"""How XLA compiles the solvers and the calibration passes."""

# On a GPU, XLA would compile and time dozens of Triton kernels for each distinct matrix product,
# which made `published` take 71 s to compile on an H200, and the error of layers of four shapes 39;
# cuBLAS is as fast at these sizes.
COMPILER_OPTIONS: dict[str, str | bool] = {"xla_gpu_enable_triton_gemm": False}
