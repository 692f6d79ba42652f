// Sparse message passing: load-balanced segment reduction (spmm), and the products sampled at the edges (sddmm).
//
// For spmm rows and edges are merged into one list of num_rows + num_edges items (an item is "add an edge" or "finish a row")
// that is cut into segments of equal length (merge path: Merrill & Garland, SC 2016), so a hub of a million edges and a
// million isolated nodes cost alike. A segment adds up its edges in order and writes every row it finishes; what it holds
// of a row that goes on is its carry. A second pass adds the carries of each split row in the order of the segments.
// The order of all additions depends on the graph alone: no atomics, the same bits every time.

#include <cuda_runtime.h>

#include <climits>
#include <cstring>
#include <initializer_list>

#include "perturbcore.h"

namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 128;
constexpr int kSegment = 256;  // items; the workspace is 1/256 of what one message per edge would take
constexpr int kInFlight = 4;   // feature rows a warp waits for at a time; divides kWarp
constexpr unsigned kFullWarp = 0xffffffffu;

struct Graph {
  const int32_t *rowptr, *col, *edge;
  int64_t num_rows, num_cols, num_edges;

  __host__ __device__ int64_t items() const { return num_rows + num_edges; }
  __host__ __device__ int64_t segments() const { return (items() + kSegment - 1) / kSegment; }
};

struct Operands {
  const float *weight, *x;
  float *out;
  int64_t weight_stride, x_stride, batch, features;
};

struct Factors {
  const float *a, *b;
  float *out;
  int64_t a_stride, b_stride, batch, results, features;  // results: batch, or 1 for the sum over the batch
};

struct Workspace {
  float *carry;        // [batch, segments, features]
  int32_t *first_row;  // [segments + 1]: the row a segment starts in
};

// A lane's share of a feature row: N neighbouring floats, moved by one instruction.
template <int N>
struct Lane {
  float value[N];
};

template <int N>
struct Word;
template <>
struct Word<1> {
  using type = float;
};
template <>
struct Word<2> {
  using type = float2;
};
template <>
struct Word<4> {
  using type = float4;
};

template <int N>
__device__ Lane<N> load(const float *from) {
  const auto word = *reinterpret_cast<const typename Word<N>::type *>(from);
  Lane<N> lane;
  memcpy(&lane, &word, sizeof lane);
  return lane;
}

template <int N>
__device__ void store(float *to, const Lane<N> &lane) {
  typename Word<N>::type word;
  memcpy(&word, &lane, sizeof word);
  *reinterpret_cast<typename Word<N>::type *>(to) = word;
}

template <int N>
__device__ void add(Lane<N> &sum, const Lane<N> &term, float factor = 1.f) {
#pragma unroll
  for (int n = 0; n < N; ++n) sum.value[n] = fmaf(factor, term.value[n], sum.value[n]);
}

// Where one warp works: a segment (or its carry), a batch element, a tile of N * 32 features.
template <int N>
struct Place {
  int64_t segment, batch, feature;

  __device__ Place(const Graph &graph, const Operands &ops) {
    const int64_t task = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarp;
    const int64_t tiles = (ops.features + N * kWarp - 1) / (N * kWarp);
    segment = task % graph.segments();
    feature = (task / graph.segments() % tiles * kWarp + threadIdx.x % kWarp) * N;
    batch = task / graph.segments() / tiles;
  }
};

__global__ void find_first_rows(Graph graph, Workspace workspace) {
  const int64_t segment = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (segment > graph.segments()) return;
  const int64_t item = min(segment * kSegment, graph.items());
  int64_t low = max(item - graph.num_edges, int64_t{0}), high = min(item, graph.num_rows);
  while (low < high) {  // the first row that is not finished after `item` items
    const int64_t row = (low + high) / 2;
    if (row + graph.rowptr[row + 1] < item) {
      low = row + 1;
    } else {
      high = row;
    }
  }
  workspace.first_row[segment] = int32_t(low);
}

// Adds the edges [first, last) to `sum`. The warp reads 32 columns and weights at once and hands them round.
template <int N>
__device__ void add_edges(Lane<N> &sum, const Graph &graph, const Operands &ops, const Place<N> &place, int64_t first,
                          int64_t last) {
  const float *weight = ops.weight ? ops.weight + place.batch * ops.weight_stride : nullptr;
  const float *x = ops.x + place.batch * ops.x_stride + place.feature;
  const bool inside = place.feature < ops.features;
  for (int64_t begin = first; begin < last; begin += kWarp) {
    const int64_t e = begin + threadIdx.x % kWarp;
    int32_t own_col = -1;
    float own_weight = 1.f;
    if (e < last) {
      const int64_t position = graph.edge ? graph.edge[e] : e;
      own_col = graph.col[e];
      if (position < 0 || position >= graph.num_edges || own_col >= graph.num_cols) {
        own_col = -1;
      } else if (weight) {
        own_weight = weight[position];
      }
    }
    const int count = int(min(last - begin, int64_t{kWarp}));
#pragma unroll 1
    for (int k = 0; k < count; k += kInFlight) {  // lanes past `last` hold no column
      Lane<N> term[kInFlight];
      float factor[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int32_t col = __shfl_sync(kFullWarp, own_col, k + i);
        factor[i] = __shfl_sync(kFullWarp, own_weight, k + i);
        term[i] = inside && col >= 0 ? load<N>(x + col * ops.features) : Lane<N>{};
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) add(sum, term[i], factor[i]);
    }
  }
}

template <int N>
__global__ void __launch_bounds__(kThreads, 8) reduce_segments(Graph graph, Operands ops, Workspace workspace) {
  const Place<N> place(graph, ops);
  if (place.batch >= ops.batch) return;  // the same for a whole warp
  const bool inside = place.feature < ops.features;
  const int64_t first_row = workspace.first_row[place.segment], last_row = workspace.first_row[place.segment + 1];
  int64_t e = place.segment * kSegment - first_row;
  const int64_t last_edge = min((place.segment + 1) * kSegment, graph.items()) - last_row;
  float *out = ops.out + place.batch * graph.num_rows * ops.features + place.feature;
  float *carry = workspace.carry + (place.batch * graph.segments() + place.segment) * ops.features + place.feature;
  for (int64_t row = first_row; row <= last_row; ++row) {
    const bool finished = row < last_row;
    const int64_t end = finished ? min(max(int64_t{graph.rowptr[row + 1]}, e), last_edge) : last_edge;
    Lane<N> sum{};
    add_edges(sum, graph, ops, place, e, end);
    if (inside) store(finished ? out + row * ops.features : carry, sum);
    e = end;
  }
}

template <int N>
__global__ void __launch_bounds__(kThreads) add_carries(Graph graph, Operands ops, Workspace workspace) {
  const Place<N> place(graph, ops);
  if (place.batch >= ops.batch || place.feature >= ops.features) return;
  const int32_t *carried_row = workspace.first_row + 1;  // a segment's carry belongs to the row that the next starts in
  const int32_t row = carried_row[place.segment];
  if (row >= graph.num_rows || (place.segment > 0 && carried_row[place.segment - 1] == row)) return;
  Lane<N> sum{};
  const float *carry = workspace.carry + place.batch * graph.segments() * ops.features + place.feature;
  for (int64_t s = place.segment; s < graph.segments() && carried_row[s] == row; ++s) {
    add(sum, load<N>(carry + s * ops.features));
  }
  float *out = ops.out + (place.batch * graph.num_rows + row) * ops.features + place.feature;
  Lane<N> total = load<N>(out);
  add(total, sum);
  store(out, total);
}

// The row of edge `e`: the last one that starts at or before it and is not empty.
__device__ int32_t row_of(const Graph &graph, int64_t e) {
  int64_t low = 0, high = graph.num_rows - 1;
  while (low < high) {
    const int64_t row = (low + high) / 2;
    if (graph.rowptr[row + 1] <= e) {
      low = row + 1;
    } else {
      high = row;
    }
  }
  return int32_t(low);
}

// A warp takes 32 edges: each lane finds its own edge's row and keeps its result, all lanes share each scalar product.
__global__ void __launch_bounds__(kThreads) sample_products(Graph graph, Factors ops) {
  const int64_t task = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarp;
  const int64_t groups = (graph.num_edges + kWarp - 1) / kWarp;
  const int64_t result = task / groups, first = task % groups * kWarp, lane = threadIdx.x % kWarp;
  if (result >= ops.results) return;
  const int64_t e = first + lane;
  int32_t own_row = -1, own_col = -1;
  if (e < graph.num_edges) {
    own_row = row_of(graph, e);
    own_col = graph.col[e] < graph.num_cols ? graph.col[e] : -1;
  }
  const int64_t terms = ops.results == ops.batch ? 1 : ops.batch;
  const int count = int(min(graph.num_edges - first, int64_t{kWarp}));
  float own = 0.f;
  for (int k = 0; k < count; ++k) {
    const int32_t row = __shfl_sync(kFullWarp, own_row, k), col = __shfl_sync(kFullWarp, own_col, k);
    float product = 0.f;
    for (int64_t t = 0; t < terms && col >= 0; ++t) {
      const float *a = ops.a + (result + t) * ops.a_stride + row * ops.features;
      const float *b = ops.b + (result + t) * ops.b_stride + col * ops.features;
      for (int64_t d = lane; d < ops.features; d += kWarp) product = fmaf(a[d], b[d], product);
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) product += __shfl_xor_sync(kFullWarp, product, offset);
    if (lane == k) own = product;
  }
  if (e < graph.num_edges) ops.out[result * graph.num_edges + e] = own;
}

int64_t blocks_for(int64_t warps) { return (warps * kWarp + kThreads - 1) / kThreads; }

template <int N>
cudaError_t launch(const Graph &graph, const Operands &ops, const Workspace &workspace, cudaStream_t stream) {
  const int64_t tiles = (ops.features + N * kWarp - 1) / (N * kWarp);
  const int64_t blocks = blocks_for(graph.segments() * tiles * ops.batch);
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  find_first_rows<<<unsigned(graph.segments() / kThreads + 1), kThreads, 0, stream>>>(graph, workspace);
  reduce_segments<N><<<unsigned(blocks), kThreads, 0, stream>>>(graph, ops, workspace);
  add_carries<N><<<unsigned(blocks), kThreads, 0, stream>>>(graph, ops, workspace);
  return cudaGetLastError();
}

// The widest load that divides and aligns every row and still gives each lane of a warp work.
int lane_width(const Operands &ops, const Workspace &workspace) {
  const uintptr_t alignment = reinterpret_cast<uintptr_t>(ops.x) | reinterpret_cast<uintptr_t>(ops.out) |
                              reinterpret_cast<uintptr_t>(workspace.carry) |
                              sizeof(float) * uintptr_t(ops.features | ops.x_stride);
  if (alignment % 16 == 0 && ops.features > 2 * kWarp) return 4;
  if (alignment % 8 == 0 && ops.features > kWarp) return 2;
  return 1;
}

bool valid_sizes(int64_t num_rows, int64_t num_edges, int64_t batch, int64_t features) {
  for (const int64_t size : {num_rows, num_edges, batch, features}) {
    if (size < 0 || size >= INT_MAX) return false;
  }
  return batch * features <= INT64_MAX / int64_t(sizeof(float)) / (num_rows + num_edges + 1);
}

size_t carry_bytes(const Graph &graph, int64_t batch, int64_t features) {
  return (sizeof(float) * graph.segments() * batch * features + 15) / 16 * 16;
}

}  // namespace

size_t perturbcore_spmm_workspace_size(int64_t num_rows, int64_t num_edges, int64_t batch, int64_t features) {
  if (!valid_sizes(num_rows, num_edges, batch, features)) return 0;
  const Graph graph{nullptr, nullptr, nullptr, num_rows, 0, num_edges};
  return carry_bytes(graph, batch, features) + sizeof(int32_t) * (graph.segments() + 1);
}

int perturbcore_spmm_f32(const int32_t *rowptr, const int32_t *col, const int32_t *edge, const float *weight,
                         int64_t weight_stride, const float *x, int64_t x_stride, float *out, int64_t num_rows,
                         int64_t num_cols, int64_t num_edges, int64_t batch, int64_t features,
                         void *workspace, size_t workspace_size, void *stream) {
  if (!valid_sizes(num_rows, num_edges, batch, features) || num_cols < 0 || num_cols >= INT_MAX) {
    return PERTURBCORE_INVALID_SIZE;
  }
  if ((weight_stride != 0 && weight_stride < num_edges) || (x_stride != 0 && x_stride < num_cols * features)) {
    return PERTURBCORE_INVALID_STRIDE;
  }
  if (num_rows == 0 || batch == 0 || features == 0) return PERTURBCORE_SUCCESS;
  if (!rowptr || !out || !workspace || (num_edges > 0 && (!col || (!x && num_cols > 0)))) {
    return PERTURBCORE_NULL_POINTER;
  }
  if (workspace_size < perturbcore_spmm_workspace_size(num_rows, num_edges, batch, features)) {
    return PERTURBCORE_WORKSPACE_TOO_SMALL;
  }
  const Graph graph{rowptr, col, edge, num_rows, num_cols, num_edges};
  const Operands ops{weight, x, out, weight_stride, x_stride, batch, features};
  char *bytes = static_cast<char *>(workspace);
  const Workspace parts{reinterpret_cast<float *>(bytes),
                        reinterpret_cast<int32_t *>(bytes + carry_bytes(graph, batch, features))};
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (lane_width(ops, parts)) {
    case 4:
      return launch<4>(graph, ops, parts, cuda_stream);
    case 2:
      return launch<2>(graph, ops, parts, cuda_stream);
    default:
      return launch<1>(graph, ops, parts, cuda_stream);
  }
}

int perturbcore_sddmm_f32(const int32_t *rowptr, const int32_t *col, const float *a, int64_t a_stride, const float *b,
                          int64_t b_stride, float *out, int64_t num_rows, int64_t num_cols, int64_t num_edges,
                          int64_t batch, int64_t features, int sum_over_batch, void *stream) {
  if (!valid_sizes(num_rows, num_edges, batch, features) || num_cols < 0 || num_cols >= INT_MAX) {
    return PERTURBCORE_INVALID_SIZE;
  }
  if ((a_stride != 0 && a_stride < num_rows * features) || (b_stride != 0 && b_stride < num_cols * features)) {
    return PERTURBCORE_INVALID_STRIDE;
  }
  const int64_t results = sum_over_batch ? 1 : batch;
  if (num_edges == 0 || results == 0) return PERTURBCORE_SUCCESS;
  if (num_rows == 0) return PERTURBCORE_INVALID_SIZE;
  if (!rowptr || !col || !out || (batch * features > 0 && (!a || (!b && num_cols > 0)))) {
    return PERTURBCORE_NULL_POINTER;
  }
  const Graph graph{rowptr, col, nullptr, num_rows, num_cols, num_edges};
  const Factors ops{a, b, out, a_stride, b_stride, batch, results, features};
  const int64_t blocks = blocks_for((num_edges + kWarp - 1) / kWarp * results);
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  sample_products<<<unsigned(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(graph, ops);
  return cudaGetLastError();
}
