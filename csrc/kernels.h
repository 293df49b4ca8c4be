/* SPDX-License-Identifier: MIT */
/* The table of kernels: one row per instruction set, joined in kernels.c. A kernel is pure: no allocation, no
 * threads, no status. columns are a multiple of 32, head_dim and the n of row kernels of 16; no address need be
 * aligned. scalar/kernels_scalar.c defines what each computes; every other file equals it bit for
 * bit. */
#ifndef PHI3C_KERNELS_H
#define PHI3C_KERNELS_H

#include <string.h>

#include "blocks.h"
#include "compiler.h"
#include "phi3c.h"

typedef struct {
    float x;
    uint16_t column, row;
} listed_outlier;

/* The outliers of one super-block of some rows of activations, by column and then by row. */
typedef struct {
    uint32_t n;
    listed_outlier outliers[];
} outlier_list;

/* Rows whose lists are made for whole multiples of them. */
enum { PHI3C_TOKENS = 48 };

/* Bytes from the list of a super-block of n rows to that of the next: room for as many as there can be. */
static inline size_t list_bytes(int64_t n) {
    int64_t rows = (n + PHI3C_TOKENS - 1) / PHI3C_TOKENS * PHI3C_TOKENS;
    return sizeof(outlier_list) + (size_t)rows * MOST_OUTLIERS * sizeof(listed_outlier);
}

/* The list of super-block i, of those of n rows. */
static inline const outlier_list *list_at(const outlier_list *lists, int64_t i, int64_t n) {
    return (const outlier_list *)((const uint8_t *)lists + (size_t)i * list_bytes(n));
}

/* out[t * 16 + r] = sum_c w[r][c] x[t][c] for one panel and n rows of activations, x_stride bytes apart: for F32, F16
 * and BF16 weights floats, for the others x8 rows. lists: the outliers of these, by super-block, for kernels that would
 * rather have them sorted; NULL for few rows. */
typedef void phi3c_tile(float *out, const uint8_t *panel, const uint8_t *x, size_t x_stride, int n, int64_t columns,
                        const outlier_list *lists);

/* out[(i * n + t) * 16 + r] += that of panel i of two, panel_bytes apart, for any number of rows. They may begin and
 * end at any super-block: x is blocks alone. */
typedef void phi3c_pair(float *out, const uint8_t *panels, size_t panel_bytes, const uint8_t *x, size_t x_stride, int n,
                        int64_t columns, const outlier_list *lists);

/* One online-softmax step: n <= PHI3C_QUERIES queries against the 64 keys of a page.
 * q (n, head_dim); kv: keys and values of a kv head as in a page (docs/formats.md); query i sees keys
 * first[i] <= j < last[i] (at least one). max (n), sum (n) and o (n, head_dim) are the running state, begun as -inf,
 * 0, 0. next: the kv of the call to come, which may be fetched ahead; the same kv where there is none. */
typedef void phi3c_attend_tile(float *max, float *sum, float *o, const float *q, const uint8_t *kv, const uint8_t *next,
                               const int *first, const int *last, int n, int head_dim);
enum { PHI3C_QUERIES = 48 };

/* Rounds of a burst: the int16 sums of vpmaddubsw, which grow by 2 a round, still fit. */
enum { PEAK_ROUNDS = 8192 };

/* What an instruction set leaves NULL it has from the one before it in the ladder. */
typedef struct {
    const char *name;
    phi3c_tile *tile[PHI3C_N_TYPES];               /* by type of the weights */
    phi3c_pair *pair[PHI3C_N_TYPES];               /* two panels at once, for many rows; NULL: one by one */
    phi3c_attend_tile *attend_tile[PHI3C_N_TYPES]; /* by type of the cache */
    void (*quantize_row)(block_x8 *out, outliers_x8 *outliers, const float *x, int64_t columns);
    void (*rms_norm_row)(float *out, const float *x, const float *weight, float eps, int64_t columns);
    void (*silu_mul_row)(float *out, const float *gate, const float *up, int64_t n);
    void (*to_f16)(f16 *out, const float *x, int64_t n);
    int64_t (*peak)(void); /* a burst for phi3c_peak; NULL without an int8 multiply-add */
} phi3c_kernels;

extern phi3c_kernels phi3c_kernel; /* those in use */
/* Whether kernels fetch weights into L1 ahead, for few tokens at least. No result depends on it. */
extern int phi3c_fetch_ahead;
extern const phi3c_kernels phi3c_kernels_scalar, phi3c_kernels_avx2, phi3c_kernels_avxvnni, phi3c_kernels_avx512,
    phi3c_kernels_neon, phi3c_kernels_dotprod;

/* Above which magnitude an activation is an outlier, where the n of its block add up to `sum`. Infinite or NaN, and so
 * above none, where one of them is. */
static inline float outlier_limit(float sum, int n) { return OUTLIER * sum / (float)n; }

/* Of a group of 32 activations: how many eighths of the largest magnitude in the block hold its own largest. */
static inline int group_factor(float group, float largest) {
    float eighths = group * (8.0f / largest);
    int factor = (int)eighths;
    factor += (float)factor < eighths;
    return factor < 1 ? 1 : factor > 8 ? 8 : factor; /* 9 by rounding */
}

/* What the activations of such a group are multiplied with: its range becomes 127. */
static inline float group_scale(int factor, float largest) { return 1016.0f / largest / (float)factor; }

/* Bit j of a block's wide16 and wide32, from the magnitudes of either half of group j and the sum of all. */
static inline unsigned wide16_bit(int j, int first, int second) {
    return (unsigned)(first > MOST_OF_16 || second > MOST_OF_16) << j;
}
static inline unsigned wide32_bit(int j, int first, int second, int sum) {
    return (unsigned)(first + second + (sum < 0 ? -sum : sum) > 2 * MOST_OF_SIGN) << j;
}

/* Of the keys, or the values, of a kv head in a page of q8_0: 64 positions times head_dim / 32 halves. */
static inline size_t q8_0_scale_bytes(int head_dim) { return (size_t)(head_dim / 32) * PHI3C_TILE * sizeof(f16); }

static inline int64_t supers_of(int64_t columns) { return (columns + PHI3C_SUPER - 1) / PHI3C_SUPER; }

/* An x8 row is a block for every super-block, then their outliers. */
static inline const outliers_x8 *outliers_of(const uint8_t *x8, int64_t columns) {
    return (const outliers_x8 *)(x8 + (size_t)supers_of(columns) * sizeof(block_x8));
}

/* Those of the row that lies t rows further. */
static inline const outliers_x8 *outliers_at(const outliers_x8 *outliers, size_t x_stride, int t) {
    return (const outliers_x8 *)((const uint8_t *)outliers + (size_t)t * x_stride);
}

/* Whether a quantised type has blocks of 32 columns with a float scale each, not 256 with integer scales. */
static inline int has_blocks_of_32(int type) { return type <= PHI3C_Q8_0 || type == PHI3C_IQ4_NL; }

/* float <-> half by integers: exact, round to nearest even */
static inline float f16_to_f32(f16 h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff, bits;
    if (exponent == 31)
        bits = 0x7f800000u | mantissa << 13;
    else if (exponent != 0)
        bits = (exponent + 112) << 23 | mantissa << 13;
    else {
        float subnormal = (float)mantissa * 0x1p-24f;
        memcpy(&bits, &subnormal, 4);
    }
    bits |= sign;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline f16 f32_to_f16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return (f16)(sign | 0x7e00 | (bits >> 13 & 0x3ff)); /* NaN, kept quiet */
    if (bits >= 0x47800000u) return (f16)(sign | 0x7c00);                       /* 65536 and more: inf */
    if (bits < 0x38800000u) {                                                   /* below 2^-14: subnormal */
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        float shifted = magnitude + 0.5f; /* the last bit of 0.5f's mantissa is worth 2^-24 */
        memcpy(&bits, &shifted, 4);
        return (f16)(sign | (bits - 0x3f000000u));
    }
    bits += 0xfff + (bits >> 13 & 1); /* round to nearest, ties to even */
    return (f16)(sign | ((bits - 0x38000000u) >> 13));
}

static inline float bf16_to_f32(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

/* To nearest, ties to even; x is finite. */
static inline uint16_t f32_to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#endif
