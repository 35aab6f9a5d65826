// The C interface of the library: one structure of pointers, strides and sizes per op. calls.py mirrors them field by
// field, and `keysift_layouts` lets it check that it does.
#pragma once

#include <cstdint>

namespace keysift {

enum Type : std::int64_t { kFloat32, kBFloat16, kFloat16 };

// Strides count elements. The last axis of every tensor is contiguous unless a stride for it is named.
struct AttentionCall {
  const void* q;               // [T, Hq, D]
  const void* k;               // [N, Hkv, S, D]
  const void* v;               // [N, Hkv, S, D]
  const std::int32_t* frames;  // [R, Hkv, F]
  const std::int32_t* pages;   // [R, H, P]
  const std::int32_t* starts;  // [R]
  void* out;                   // [T, Hq, D], contiguous
  float* lse;                  // [T, Hq], contiguous
  std::int64_t q_strides[2], k_strides[3], v_strides[3], frames_strides[3], pages_strides[3];
  std::int64_t tokens, heads, kv_heads, lists, dim, page_size, rows, pages_per_list, queries_per_row, window;
  Type type;
  float scale;
};

// Weights of a linear layer: of the inputs' type, or int8 with a scale for every output and 64 inputs.
struct Matrix {
  const void* weight;   // [N, K], contiguous
  const float* scales;  // [N, K / 64], contiguous, or null
  const void* bias;     // [N] or null
  std::int64_t outputs, inputs;
};

struct LinearCall {
  const void* x;  // [B, K]
  void* out;      // [B, N], contiguous
  Matrix matrix;
  std::int64_t x_strides[1], batch;
  Type type;
};

// A decoder layer up to its attention; everything is contiguous.
struct LayerInCall {
  const void* x;     // [B, C]
  const void* norm;  // [C]
  const void* cos;   // [B, D]
  const void* sin;   // [B, D]
  void* q;           // [B, Hq, D]
  void* k;           // [B, Hkv, D]
  void* v;           // [B, Hkv, D]
  Matrix to_q, to_k, to_v;
  std::int64_t batch, dim;
  Type type;
  float eps;
};

// The rest of a decoder layer, after its attention.
struct LayerOutCall {
  const void* x;         // [B, C], the layer's input
  const void* attended;  // [B, Hq * D]
  const void* norm;      // [C]
  void* out;             // [B, C]
  Matrix to_out, gate, up, down;
  std::int64_t batch;
  Type type;
  float eps;
};

struct ScoresCall {
  const void* q;                  // [B * m, Hq, D]
  const void* k;                  // [N, Hkv, S, D]
  const std::int32_t* frames;     // [B, Hkv, F]
  const std::int32_t* positions;  // [B * m], contiguous
  float* mass;                    // [B, Hq, F], contiguous, zeros when the call begins; so are the next two
  float* peak;
  float* bands;  // or null
  std::int64_t q_strides[2], k_strides[3], frames_strides[3];
  std::int64_t probes, queries_per_probe, heads, kv_heads, dim, page_size, pages;
  Type type;
  float scale;
};

// One scan over the pages of single queries; each kind leaves null what it does not read.
struct PagesCall {
  const void* q;                  // [R, Hq, D]
  const void* k;                  // [*, Hkv, S, D], read for the rows' own pages
  const std::int32_t* own;        // [R, Hkv], their frames in k
  const void* summaries;          // [N, Hkv, 4, D], contiguous, as are the next three
  const std::int32_t* levels;     // [N, Hkv, W, S]
  const std::int8_t* bounds;      // [N, Hkv, 2, D]
  const float* scales;            // [N, Hkv, 2]
  const std::int32_t* frames;     // [R, Hkv, F]
  const std::int32_t* positions;  // [R], contiguous
  float* masses;                  // [R, Hq, F], contiguous
  std::int64_t q_strides[2], k_strides[3], frames_strides[3], own_strides[2];
  std::int64_t rows, heads, kv_heads, dim, page_size, pages, words, candidates;
  Type type;
  float scale, slack;
};

struct TopCall {
  const float* masses;         // [R, Hq, F], contiguous
  const std::int32_t* firsts;  // [R], contiguous
  const std::int32_t* lasts;   // [R], contiguous
  std::int32_t* out;           // [R, H, P], contiguous
  float* kept;                 // [R, Hq], contiguous
  std::int64_t rows, heads, lists, pages, width, sinks, budget;  // width: P
  float epsilon;
};

// A TopCall with the state that the previous token left; the epsilon of `top` is not read.
struct SteadyCall {
  TopCall top;
  const std::uint8_t* known;   // [R], contiguous, as all that follow
  const std::uint8_t* read;    // [R, H, F]
  const float* averages;       // [R, H, F]
  std::int32_t* refused;       // [R, H, Q]
  std::uint8_t* now_read;      // [R, H, F]
  float* now_averages;         // [R, H, F]
  float* overlap;              // [R, H]
  std::uint8_t* bound_exceeded;  // [R, H]
  std::int64_t queried, most;  // queried: Q, not above the budget; most: negative for any number
  std::int64_t refusable;      // the most that may be refused, in units of 2^-40
  float factor, keep;
};

struct ClusterCall {
  const void* k;               // [N, Hkv, S, D]
  const std::int32_t* frames;  // [n, Hkv, F], the pages of n segments
  void* centroids;             // [n, Hkv, C, D] of k's type; this and what follows contiguous
  std::int32_t* ends;          // [n, Hkv, C]
  std::int16_t* tokens;        // [n, Hkv, F * S]
  std::int64_t k_strides[3], frames_strides[3];
  std::int64_t segments, kv_heads, dim, page_size, pages, lists, iterations;
  Type type;
};

struct ProbeCall {
  const void* q;                      // [R, Hq, D]
  const void* k;                      // [N, Hkv, S, D]
  const std::int32_t* frames;         // [R, Hkv, F]
  const std::int32_t* positions;      // [R], contiguous
  const std::int32_t* places;         // [R, W], place of each row's segments in the three arrays below
  const void* const* centroids;       // of each segment [Hkv, C, D], contiguous
  const std::int32_t* const* ends;    // [Hkv, C]
  const std::int16_t* const* tokens;  // [Hkv, segment]
  float* masses;                      // [R, Hq, F], contiguous
  std::int64_t q_strides[2], k_strides[3], frames_strides[3], places_strides[1];
  std::int64_t rows, heads, kv_heads, dim, page_size, pages, width, segment, lists, probes;
  Type type;
  float scale;
};

// Graphs over a sequence's first `ends` tokens, one for each KV head. Row r's links [Hkv, ends[r], degree] and entry
// points [Hkv, hubs[r] + entries[r]] are tokens; -1 pads.
struct GraphSearchCall {
  const void* q;                  // [R, Hq, D]
  const void* k;                  // [N, Hkv, S, D]
  const std::int32_t* frames;     // [R, Hkv, F]
  const std::int32_t* positions;  // [R], contiguous, as all that follow
  const std::int32_t* ends;       // [R], tokens of each row's graph; 0: it has none
  const std::int32_t* hubs;       // [R], entry points that are scored and not walked from; they come first
  const std::int32_t* entries;    // [R], entry points after them
  const std::int32_t* const* links;
  const std::int32_t* const* points;
  std::int32_t* keys;     // [R, Hq, top_k]
  float* scores;          // [R, Hq, top_k]
  std::int32_t* scanned;  // [R, Hq]
  float* masses;          // [R, Hq, F]
  std::int64_t q_strides[2], k_strides[3], frames_strides[3];
  std::int64_t rows, heads, kv_heads, dim, page_size, pages, degree, beam, top_k, sink, window;
  Type type;
  float scale;
};

struct GraphNearestCall {
  const void* q;               // [Hkv, M, D], contiguous, as all that follow but the keys
  const void* k;               // [N, Hkv, S, D]
  const std::int32_t* frames;  // [F]
  std::int32_t* nearest;       // [Hkv, M, wanted]
  std::int64_t k_strides[3];
  std::int64_t kv_heads, queries, dim, page_size, wanted, first, end;  // of all tokens, those in [first, end)
  Type type;
};

struct GraphLinksCall {
  const std::int32_t* nearest;  // [Hkv, M, wanted], contiguous, as links; -1: none
  std::int32_t* links;          // [Hkv, tokens, degree]
  std::int64_t kv_heads, queries, wanted, tokens, degree;
};

// Frames that have just become full; each kind leaves null what it neither reads nor writes.
struct FillCall {
  const void* k;               // [N, Hkv, S, D]
  const void* v;               // [N, Hkv, S, D]
  void* summaries;             // [N, Hkv, 4, D]
  std::int32_t* levels;        // [N, Hkv, W, S]
  std::int8_t* bounds;         // [N, Hkv, 2, D]
  float* scales;               // [N, Hkv, 2]
  const std::int64_t* frames;  // [filled], contiguous
  std::int64_t k_strides[3], v_strides[3], summaries_strides[3], levels_strides[3], bounds_strides[3];
  std::int64_t scales_strides[2];
  std::int64_t filled, kv_heads, dim, page_size, words, bits;
  Type type;
};

// One layer's bounded pool, and the pages that it should hold.
struct AdmitCall {
  std::int32_t* where;         // [Hkv, N], contiguous, store frame -> slot, as are the next two
  std::int32_t* owner;         // [Hkv, C], slot -> store frame
  std::int32_t* used;          // [Hkv, C]
  const std::int32_t* frames;  // [R, Hkv, F]
  const std::int32_t* pages;   // [R, H, P]
  std::int32_t* loads;         // [Hkv, W], contiguous, as slots
  std::int32_t* slots;
  std::int64_t* found;         // [Hkv, 3]
  std::int32_t* table;         // [R, Hkv, F], contiguous
  std::int64_t frames_strides[3], pages_strides[3];
  std::int64_t count, capacity, rows, kv_heads, lists, pages_per_list, width;  // N, C, R, Hkv, H, P, W
  std::int64_t max_pages, now, before;                                       // F
};

// Reads of single heads of pages from a file into a pool.
struct ReadCall {
  char* pool;                 // [C, Hkv, piece]
  const std::int32_t* loads;  // [Hkv, W], contiguous, as slots; -1: nothing
  const std::int32_t* slots;
  std::int64_t kv_heads, width, file;
  std::int64_t extent, extent_bytes, layer_offset, piece_bytes;  // pages of an extent; a layer's offset in it
  std::int64_t error;  // 0, or the errno of the first piece that could not be read in full
};

// The kernels of one instruction set.
struct Kernels {
  void (*attention)(const AttentionCall&, int threads);
  void (*linear)(const LinearCall&, int threads);
  void (*layer_in)(const LayerInCall&, int threads);
  void (*layer_out)(const LayerOutCall&, int threads);
  void (*column_scores)(const ScoresCall&, int threads);
  void (*code_masses)(const PagesCall&, int threads);
  void (*page_bounds)(const PagesCall&, int threads);
  void (*top_pages)(const TopCall&, int threads);
  void (*steady_pages)(const SteadyCall&, int threads);
  void (*cluster)(const ClusterCall&, int threads);
  void (*probe)(const ProbeCall&, int threads);
  void (*graph_search)(const GraphSearchCall&, int threads);
  void (*graph_nearest)(const GraphNearestCall&, int threads);
  void (*summarize)(const FillCall&, int threads);
  void (*encode)(const FillCall&, int threads);
};

extern const Kernels kPortable, kAvx2, kAvx512, kAvx512Bf16;

}  // namespace keysift
