/* SPDX-License-Identifier: MIT */
/* phi3c's C side: packed weights, quantised activations, and the operations of a decoder layer.
 *
 * This is all that Cython sees. Kernels are chosen once by phi3c_init(), before any other call. Every function
 * that takes a pool splits its work over the pool's threads and returns when all of it is done; a pool runs one
 * such call at a time. Pointers are borrowed for the duration of the call unless it says otherwise. Sizes are
 * checked by the caller: C only asserts. Whatever the number of threads, rows in the call or the instruction
 * set, every output element is the result of one fixed sequence of operations (docs/architecture.md). */
#ifndef PHI3C_H
#define PHI3C_H

#include <stddef.h>
#include <stdint.h>

// clang-format off
/* ggml's type ids, as stored in GGUF files */
enum phi3c_type {
    PHI3C_F32 = 0, PHI3C_F16 = 1, PHI3C_Q4_0 = 2, PHI3C_Q4_1 = 3, PHI3C_Q5_0 = 6, PHI3C_Q5_1 = 7, PHI3C_Q8_0 = 8,
    PHI3C_Q2_K = 10, PHI3C_Q3_K = 11, PHI3C_Q4_K = 12, PHI3C_Q5_K = 13, PHI3C_Q6_K = 14, PHI3C_IQ4_NL = 20,
    PHI3C_IQ4_XS = 23, PHI3C_BF16 = 30, PHI3C_N_TYPES = 31,
};
// clang-format on

enum { PHI3C_PANEL = 16 };  /* rows of a packed panel: one per lane */
enum { PHI3C_SUPER = 256 }; /* columns of a super-block, and of a block of activations */
enum { PHI3C_TILE = 64 };   /* positions of a KV page, and keys of an attention tile */
enum { PHI3C_MAX_HEAD_DIM = 512 };

/* -- instruction sets ------------------------------------------------------------------------------------- */

/* Choose kernels: the best available, or those called `isa` ("scalar", "avx2", ...). Returns 0, or -1 when `isa`
 * is unknown or this machine cannot run it; then the kernels in use stay. */
int phi3c_init(const char *isa);
const char *phi3c_isa(void);
/* Name of the i-th instruction set this machine can run, worst first, or NULL past the last. */
const char *phi3c_available_isa(int i);
/* Space-separated CPU features found, for people to read. */
const char *phi3c_cpu_features(void);

/* -- threads ---------------------------------------------------------------------------------------------- */

typedef struct phi3c_pool phi3c_pool;
/* A pool of n_threads >= 1, the calling thread among them; gives it to the caller, NULL when out of memory. */
phi3c_pool *phi3c_pool_new(int n_threads);
void phi3c_pool_free(phi3c_pool *pool);
int phi3c_pool_size(const phi3c_pool *pool);

/* -- memory ----------------------------------------------------------------------------------------------- */

/* Zeroed memory that begins with a line of the cache, in huge pages from 2 MiB on where these are advised; NULL when
 * out of memory. */
void *phi3c_alloc(size_t n_bytes);
void phi3c_free(void *memory, size_t n_bytes);

typedef struct {
    int64_t value;
} atomic_word; /* that several threads change: atomic.h */

/* Have the system read a mapped file and map its pages, so that who needs them next does not wait for them; until
 * phi3c_stop(stop), which any thread may call. */
void phi3c_read_ahead(const uint8_t *file, size_t n_bytes, const atomic_word *stop);
void phi3c_stop(atomic_word *stop);

/* -- weights ---------------------------------------------------------------------------------------------- */

/* Columns in a block of `type` and its bytes in the file; 0 for types without kernels. */
int phi3c_block_columns(int type);
int phi3c_block_bytes(int type);

/* Rows of one type, packed: ceil(rows / 16) panels. */
typedef struct {
    int type;
    int64_t rows;
    const uint8_t *panels;
} phi3c_segment;

/* Bytes of a packed segment: those of the file, rows rounded up to whole panels. */
size_t phi3c_packed_bytes(int type, int64_t rows, int64_t columns);
/* Pack rows of GGUF blocks. Row i of the result is row order[i] of src, or row i when order is NULL. */
void phi3c_pack(uint8_t *panels, const uint8_t *src, int type, int64_t rows, int64_t columns, const int64_t *order,
                phi3c_pool *pool);
/* The GGUF blocks of one packed row. */
void phi3c_unpack_row(uint8_t *blocks, const uint8_t *panels, int type, int64_t row, int64_t columns);
/* Weights of a row of GGUF blocks as floats. */
void phi3c_dequantize_row(float *out, const uint8_t *blocks, int type, int64_t columns);
/* Whether phi3c_encode writes this type. */
int phi3c_has_encoder(int type);
/* n weights of one type as another, in whole blocks of both. Returns 0, or -1 when one is not finite or, unless `type`
 * is F32 or BF16, exceeds the largest half; then `out` is of no use. */
int phi3c_encode(uint8_t *out, int type, const uint8_t *in, int in_type, int64_t n, phi3c_pool *pool);

/* -- activations ------------------------------------------------------------------------------------------ */

/* Bytes of a quantised row: ceil(columns / 256) blocks of 320 and as many of outliers, 128 (blocks.h), and 64 that
 * nobody uses. */
size_t phi3c_x8_bytes(int64_t columns);

/* Bytes in which matrices sort the outliers of n rows: lists (kernels.h) of every super-block. */
size_t phi3c_outlier_bytes(int64_t n, int64_t columns);

/* Rows of activations, as floats (n, columns) and quantised (n, x8_bytes), both always in step; and outlier_bytes. */
typedef struct {
    float *f32;
    uint8_t *x8, *outliers;
    int64_t columns;
} phi3c_activation;

/* out[i] = x[i] / sqrt(mean(x[i]^2) + eps) * weight, for n rows; x rows lie `columns` floats apart. */
void phi3c_rms_norm(phi3c_activation out, const float *x, const float *weight, float eps, int64_t n, phi3c_pool *pool);
/* Quantise the floats of x. */
void phi3c_quantize(phi3c_activation x, int64_t n, phi3c_pool *pool);

/* out[i][r] = sum_c w[r][c] x[i][c], or += when add is set; out (n, sum of segment rows). */
void phi3c_matmul(float *out, const phi3c_segment *segments, int n_segments, phi3c_activation x, int64_t n, int add,
                  phi3c_pool *pool);
/* out[i] = silu(gate x[i]) * (up x[i]), with gate above up: one segment of 2 out.columns rows, or two of out.columns,
 * which are whole panels; quantised as well. */
void phi3c_gate_up(phi3c_activation out, const phi3c_segment *segments, int n_segments, phi3c_activation x, int64_t n,
                   phi3c_pool *pool);

/* -- attention -------------------------------------------------------------------------------------------- */

/* cos and sin of (first + i) * frequency[j], i < n, j < n_frequencies, times `scale`; deterministic everywhere. */
void phi3c_rope_table(float *cosines, float *sines, const double *frequency, int64_t first, int64_t n,
                      int64_t n_frequencies, float scale);

/* Bytes that keys and values of one kv head take in a page, as `kv_type`: PHI3C_F16, or PHI3C_Q8_0 where head_dim is a
 * multiple of 32. 0 for what cannot be stored. */
size_t phi3c_kv_bytes(int kv_type, int head_dim);

/* The heads of a layer and where its keys and values lie. A page holds, for every layer and kv head, keys [head_dim][64
 * positions] and then values [64 positions][head_dim]; of q8_0 each with its scales before it (docs/formats.md). */
typedef struct {
    int head_count, head_count_kv, head_dim, rope_dims;
    int window; /* a query at position q sees keys k with q - window < k <= q; 0: all k <= q */
    int kv_type;
    int layer;
    uint8_t *const *pages;      /* by page id */
    const int32_t *page_tables; /* (n_sequences, table_stride): page ids, by position / 64 */
    int64_t table_stride;
} phi3c_attention;

/* cos and sin of one set of rotary frequencies, (positions, rope_dims / 2) each; row p belongs to position p. */
typedef struct {
    float *cosines, *sines;
} phi3c_rope;

/* A run of consecutive new positions of one sequence: rows [row, row + n) of the batch, rotated with ropes[rope]. */
typedef struct {
    int32_t sequence, row, n, position, rope;
} phi3c_span;

/* Rotate q and k of qkv (n_rows, (head_count + 2 head_count_kv) head_dim) in place, scale q by 1/sqrt(head_dim),
 * and write k and v to the pages; for keys in q8_0 q becomes H q / 32 and k becomes H k (docs/formats.md). */
void phi3c_rope_append(const phi3c_attention *a, float *qkv, const phi3c_span *spans, int n_spans,
                       const phi3c_rope *ropes, phi3c_pool *pool);
/* out row i (head_count head_dim floats) = softmax(q k) v over what row i may see; quantised as well. */
void phi3c_attend(phi3c_activation out, const phi3c_attention *a, const float *qkv, const phi3c_span *spans,
                  int n_spans, phi3c_pool *pool);

/* -- scores ----------------------------------------------------------------------------------------------- */

/* out[i] = log(sum_j exp(logits[i][j])) for n rows of n_vocab; NaN where a logit of the row is NaN or infinite. */
void phi3c_log_sum_exp(double *out, const float *logits, int64_t n, int64_t n_vocab, phi3c_pool *pool);

/* Another model's log-probabilities, about 0 at most: mins[i] + scales[i] steps[i * stride + j] of row i, token j. */
typedef struct {
    const uint16_t *steps;
    int64_t stride;
    const float *scales, *mins;
} phi3c_base;

/* out[i] = KL divergence, in nats, of row i from the base: sum_j p[j] (log p[j] - (logits[i][j] - log_sums[i])) over
 * the base's probabilities p above exp(-16). */
void phi3c_kl_divergence(double *out, phi3c_base base, const float *logits, const double *log_sums, int64_t n,
                         int64_t n_vocab, phi3c_pool *pool);

/* -- limits ----------------------------------------------------------------------------------------------- */

/* Read n_bytes of memory, a multiple of 64, every byte once. Returns the XOR of its 32-bit words. */
uint32_t phi3c_read(const uint8_t *memory, size_t n_bytes, phi3c_pool *pool);
/* n_bursts bursts of int8 multiply-adds out of registers, some 20 us each. Returns how many multiply-adds these were,
 * counted by themselves: all factors are 1. 0 where the instruction set has no such instruction. */
int64_t phi3c_peak(int64_t n_bursts, phi3c_pool *pool);

#endif
