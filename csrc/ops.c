/* SPDX-License-Identifier: MIT */
/* Row-wise operations of a layer, each spread over the pool. */
#include "kernels.h"
#include "pool.h"

/* The 64 bytes more keep rows from starting in the same sets of a cache: 32 super-blocks are 3.5 times 4096 bytes. */
size_t phi3c_x8_bytes(int64_t columns) {
    return (size_t)supers_of(columns) * (sizeof(block_x8) + sizeof(outliers_x8)) + 64;
}

size_t phi3c_outlier_bytes(int64_t n, int64_t columns) {
    int64_t tiles = (n + PHI3C_TOKENS - 1) / PHI3C_TOKENS;
    return (size_t)(tiles * supers_of(columns)) * list_bytes(PHI3C_TOKENS);
}

typedef struct {
    phi3c_activation out;
    const float *x, *weight;
    float eps;
} row_job;

static float *f32_row(phi3c_activation a, int64_t row) { return a.f32 + row * a.columns; }

/* Quantise n floats from super-block `super` of a row on. */
static void quantize_part(phi3c_activation a, int64_t row, int64_t super, int64_t n) {
    uint8_t *x8 = a.x8 + (size_t)row * phi3c_x8_bytes(a.columns);
    phi3c_kernel.quantize_row((block_x8 *)x8 + super, (outliers_x8 *)outliers_of(x8, a.columns) + super,
                              f32_row(a, row) + super * PHI3C_SUPER, n);
}

static void rms_norm(void *arg, int64_t first, int64_t last) {
    const row_job *job = arg;
    int64_t columns = job->out.columns;
    for (int64_t row = first; row < last; row++) {
        float *y = f32_row(job->out, row);
        phi3c_kernel.rms_norm_row(y, job->x + row * columns, job->weight, job->eps, columns);
        quantize_part(job->out, row, 0, columns);
    }
}

void phi3c_rms_norm(phi3c_activation out, const float *x, const float *weight, float eps, int64_t n, phi3c_pool *pool) {
    row_job job = {out, x, weight, eps};
    phi3c_pool_run(pool, rms_norm, &job, n, 4);
}

/* Items are super-blocks: a single row of 8192 columns keeps several threads busy. */
static void quantize(void *arg, int64_t first, int64_t last) {
    const row_job *job = arg;
    int64_t columns = job->out.columns, supers = supers_of(columns);
    for (int64_t item = first; item < last; item++) {
        int64_t row = item / supers, super = item % supers, c = super * PHI3C_SUPER;
        quantize_part(job->out, row, super, columns - c < PHI3C_SUPER ? columns - c : PHI3C_SUPER);
    }
}

void phi3c_quantize(phi3c_activation x, int64_t n, phi3c_pool *pool) {
    row_job job = {.out = x};
    phi3c_pool_run(pool, quantize, &job, n * supers_of(x.columns), 32);
}
