/* perturbcore: CUDA kernels behind a plain C interface.
 *
 * Every pointer is a device pointer to memory that the caller owns; nothing is allocated, copied or synchronised here,
 * so each call can be captured into a CUDA graph. A kernel runs on `stream` (a cudaStream_t; NULL is the default one),
 * in the current device and context. Every call returns a status: 0 on success, a positive cudaError_t, or one of the
 * negative codes below. Results are the same bits on every call: no floating-point atomics are used.
 */
#ifndef PERTURBCORE_H
#define PERTURBCORE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define PERTURBCORE_API __attribute__((visibility("default")))
#else
#define PERTURBCORE_API
#endif

/* Raised whenever a signature below changes. */
#define PERTURBCORE_ABI_VERSION 1

enum {
  PERTURBCORE_SUCCESS = 0,
  PERTURBCORE_INVALID_SIZE = -1,        /* a size is negative, or larger than int32 indices can address */
  PERTURBCORE_NULL_POINTER = -2,        /* an array that must hold values is NULL */
  PERTURBCORE_INVALID_STRIDE = -3,      /* a batch stride is neither 0 nor at least one batch element */
  PERTURBCORE_WORKSPACE_TOO_SMALL = -4  /* ask perturbcore_spmm_workspace_size */
};

/* PERTURBCORE_ABI_VERSION of the library that was loaded. */
PERTURBCORE_API int perturbcore_abi_version(void);

/* One English sentence for a status; never NULL, never freed. */
PERTURBCORE_API const char *perturbcore_error_string(int status);

/* Bytes of workspace that perturbcore_spmm_f32 needs for these sizes; 0 if a size is invalid. */
PERTURBCORE_API size_t perturbcore_spmm_workspace_size(int64_t num_rows, int64_t num_edges, int64_t batch,
                                                       int64_t features);

/* Sparse times dense with one weight per edge, shared or per batch element:
 *
 *   out[b, i, :] = sum over e in [rowptr[i], rowptr[i + 1]) of weight[b, edge[e]] * x[b, col[e], :]
 *
 * A row without edges gets 0.
 *
 *   rowptr         int32 [num_rows + 1]   rises from 0 to num_edges
 *   col            int32 [num_edges]      in [0, num_cols); an entry outside is skipped, never followed
 *   edge           int32 [num_edges]      position of each edge's weight (for a transposed graph), or NULL: its own;
 *                                         an entry outside [0, num_edges) is skipped, never followed
 *   weight         float32 [num_edges] per batch element, or NULL: all ones
 *   weight_stride  elements between batch elements; 0 shares one weight vector
 *   x              float32 [num_cols, features] per batch element, row-major
 *   x_stride       elements between batch elements; 0 shares one matrix
 *   out            float32 [batch, num_rows, features], overwritten; must not overlap an input
 *   workspace      workspace_size bytes, 16-byte aligned, of no meaning before and after the call
 */
PERTURBCORE_API int perturbcore_spmm_f32(const int32_t *rowptr, const int32_t *col, const int32_t *edge,
                                         const float *weight, int64_t weight_stride, const float *x, int64_t x_stride,
                                         float *out, int64_t num_rows, int64_t num_cols, int64_t num_edges,
                                         int64_t batch, int64_t features, void *workspace, size_t workspace_size,
                                         void *stream);

/* Products of rows, sampled at the edges; what spmm's gradient with respect to its weights is:
 *
 *   out[b, e] = sum over d of a[b, row(e), d] * b[b, col[e], d]
 *
 * or, where sum_over_batch is not 0, out[e], the sum of these over b. Strides and indices as above; a is float32
 * [num_rows, features] and b float32 [num_cols, features] per batch element. No workspace is needed. An edge whose
 * column lies outside [0, num_cols) gets 0.
 */
PERTURBCORE_API int perturbcore_sddmm_f32(const int32_t *rowptr, const int32_t *col, const float *a, int64_t a_stride,
                                          const float *b, int64_t b_stride, float *out, int64_t num_rows,
                                          int64_t num_cols, int64_t num_edges, int64_t batch, int64_t features,
                                          int sum_over_batch, void *stream);

#ifdef __cplusplus
}
#endif

#endif
