"""What the GPU kernels take, compiled without a GPU: registers, spills and memory (``__main__``), instructions (``loops``)."""
