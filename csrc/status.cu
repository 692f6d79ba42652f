// Version and status texts of the C interface.

#include <cuda_runtime_api.h>

#include "perturbcore.h"

int perturbcore_abi_version(void) { return PERTURBCORE_ABI_VERSION; }

const char *perturbcore_error_string(int status) {
  switch (status) {
    case PERTURBCORE_INVALID_SIZE:
      return "a size is negative, or larger than int32 indices can address";
    case PERTURBCORE_NULL_POINTER:
      return "an array that must hold values is a null pointer";
    case PERTURBCORE_INVALID_STRIDE:
      return "a batch stride is neither 0 nor at least one batch element";
    case PERTURBCORE_WORKSPACE_TOO_SMALL:
      return "the workspace is smaller than perturbcore_spmm_workspace_size asks for";
    default:
      return status < 0 ? "unknown status" : cudaGetErrorString(static_cast<cudaError_t>(status));
  }
}
