"""The CUDA architectures that kernels are built for."""

# Bytes of shared memory that one block may use (CUDA programming guide, technical specifications per compute
# capability).
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024, "sm_100a": 227 * 1024, "sm_120a": 99 * 1024}
